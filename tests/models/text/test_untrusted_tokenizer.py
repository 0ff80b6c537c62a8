"""Tokenizer files of others: no code of theirs is run, nothing is asked, damage is one line."""

import builtins
import contextlib
import json
import shutil

import pytest
from transformers import AutoTokenizer

from moezoo import InputError
from moezoo_models.checkpoints.directory import save_checkpoint
from moezoo_models.generate import generate
from moezoo_models.text.tokenizer import load_tokenizer

CODE = """
from pathlib import Path
Path({marker!r}).touch()
from transformers import PreTrainedTokenizerFast as Code
"""


@pytest.fixture
def files(tmp_path, byte_level_tokenizer):
    directory = tmp_path / "model"
    byte_level_tokenizer.save(directory)
    return directory


@pytest.fixture
def unasked(monkeypatch):
    """Fail where somebody is asked, and would answer with yes."""
    questions = []

    def answer(question=""):
        questions.append(question)
        return "y"

    monkeypatch.setattr(builtins, "input", answer)
    yield
    assert not questions


def change(file, **fields):
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize("config", ["tokenizer_config.json", "config.json"])
@pytest.mark.parametrize("place", ["code.Code", "someone/else--code.Code"])
def test_code_that_files_name_is_not_run(config, place, files, make, unasked):
    save_checkpoint(files.parent / "m", make(vocab_size=300))
    for file in files.iterdir():
        shutil.copy(file, files.parent / "m")
    directory = files.parent / "m"
    (directory / "code.py").write_text(CODE.format(marker=str(files.parent / "marker")))
    named = {"auto_map": {"AutoTokenizer": [place, place], "AutoConfig": place}}
    change(directory / config, **named, tokenizer_class="Code")
    for read in (load_tokenizer, lambda path: generate(path, max_new_tokens=1, stream=False)):
        with contextlib.suppress(InputError):  # or a class of transformers serves as well
            read(directory)
    assert not (files.parent / "marker").exists()


def test_code_that_is_wanted_is_refused(files, unasked):
    (files / "code.py").write_text(CODE.format(marker=str(files.parent / "marker")))
    named = {"auto_map": {"AutoTokenizer": ["code.Code", None]}}
    change(files / "tokenizer_config.json", **named, tokenizer_class="Code")
    (files / "tokenizer.json").rename(files / "vocab.json")
    with pytest.raises(InputError, match=r"^tokenizer: .* cannot be loaded: "):
        load_tokenizer(files)
    assert not (files.parent / "marker").exists()


def test_texts_are_neither_cut_nor_filled_up(files, byte_level_tokenizer):
    """A directory's own settings would do both without a word, and filling up has no bound."""
    change(
        files / "tokenizer.json",
        truncation={
            "direction": "Right",
            "max_length": 2,
            "strategy": "LongestFirst",
            "stride": 0,
        },
        padding={
            "strategy": {"Fixed": 1000},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "<|end|>",
        },
    )
    tokenizer = load_tokenizer(files)
    ids = byte_level_tokenizer.encode("abcd")
    assert tokenizer.encode("abcd") == ids
    assert tokenizer.encode_batch(["abcd"]) == [ids]
    assert tokenizer.fingerprint() == byte_level_tokenizer.fingerprint()


def test_a_text_is_spelt_the_same_each_time(files, byte_level_tokenizer):
    content = json.loads((files / "tokenizer.json").read_text())
    content["model"]["dropout"] = 1.0  # merges nothing
    (files / "tokenizer.json").write_text(json.dumps(content))
    text = "the cat sat on the mat"
    assert load_tokenizer(files).encode(text) == byte_level_tokenizer.encode(text)
    assert load_tokenizer(files).fingerprint() == byte_level_tokenizer.fingerprint()


@pytest.mark.parametrize("merge", [["a", "c"], "a c"])
def test_merges_begin_with_the_prefix_that_is_cut_off(merge, files):
    """The library does not look at what it cuts; here it is a letter that there is."""
    content = json.loads((files / "tokenizer.json").read_text())
    vocabulary = dict.fromkeys("abc") | {"ac": None, "<|end|>": None}
    content["model"] |= {
        "vocab": {token: number for number, token in enumerate(vocabulary)},
        "merges": [merge],
        "continuing_subword_prefix": "b",
    }
    (files / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"continuing_subword_prefix: 'b' does not begin all"):
        load_tokenizer(files)


def link_out(files):
    shutil.move(files / "tokenizer.json", files.parent / "elsewhere.json")
    (files / "tokenizer.json").symlink_to(files.parent / "elsewhere.json")


def text_of(name, text):
    return lambda files: (files / name).write_text(text)


DAMAGE = {
    "link": (link_out, "tokenizer.json is a link out of its directory"),
    "list": (text_of("tokenizer_config.json", "[]"), "is not a JSON object"),
    "nested": (text_of("tokenizer_config.json", "[" * 100_000), "cannot be read"),
    "digits": (text_of("tokenizer_config.json", f'{{"a": {"1" * 5000}}}'), "a number has 5,000"),
    "map": (text_of("special_tokens_map.json", "3"), "is not a JSON object"),
    "added": (text_of("added_tokens.json", '{"a": NaN}'), "NaN is not a finite number"),
    "vocabulary": (text_of("tokenizer.json", '{"model": {"type": "BPE"}}'), "cannot be loaded"),
    "nothing": (text_of("tokenizer.json", ""), "cannot be loaded"),
    "config": (text_of("config.json", "[1]"), "is not a JSON object"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_line(name, files):
    damage, message = DAMAGE[name]
    damage(files)
    with pytest.raises(InputError, match=f"^tokenizer: .*{message}") as caught:
        load_tokenizer(files)
    assert "\n" not in str(caught.value)


def test_where_the_library_stumbles_it_is_one_line(files, monkeypatch):
    class PanicException(BaseException):
        """What Rust raises in Python."""

    def stumble(*args, **options):
        raise PanicException("index out of bounds\nand more")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", stumble)
    with pytest.raises(InputError, match=r"cannot be loaded: index out of bounds$"):
        load_tokenizer(files)


def test_an_interrupt_stays_one(files, monkeypatch):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load_tokenizer(files)


def test_a_path_with_a_nul():
    with pytest.raises(InputError, match=r"tokenizer: .* holds a NUL character"):
        load_tokenizer("a\0b")
