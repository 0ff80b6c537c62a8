"""What stands before a text: what the tokenizer puts there, or what a model was trained on."""

import json

import pytest
import tokenizers
import transformers

from moezoo_models.checkpoints.directory import choose_tokenizer, read_tokenizer
from moezoo_models.evaluation.perplexity import evaluate_text, evaluate_tokens
from moezoo_models.generate import prompt_ids
from moezoo_models.text.tokenizer import HuggingFaceTokenizer, load_tokenizer

BOS, EOS = 256, 257


@pytest.fixture
def write(tmp_path):
    """Return a function that writes a tokenizer of bytes with a BOS, and its directory."""

    def directory(adds: bool) -> object:
        vocabulary = {c: i for i, c in enumerate(tokenizers.pre_tokenizers.ByteLevel.alphabet())}
        backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = tokenizers.decoders.ByteLevel()
        backend.add_special_tokens(["<bos>", "<eos>"])
        if adds:
            backend.post_processor = tokenizers.processors.TemplateProcessing(
                single="<bos> $A", special_tokens=[("<bos>", BOS)]
            )
        folder = tmp_path / f"adds-{adds}"
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>"
        ).save_pretrained(folder)
        fields = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(fields | {"add_bos_token": adds}))
        return folder

    return directory


@pytest.mark.parametrize("adds", [True, False])
def test_texts_begin_as_transformers_begins_them(adds, write):
    folder = write(adds)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer = read_tokenizer(folder)
    assert tokenizer.bos_id == BOS
    assert prompt_ids(tokenizer, "a b") == theirs("a b").input_ids
    assert prompt_ids(tokenizer, "") == (theirs("").input_ids or [EOS])
    assert tokenizer.start_id == (BOS if adds else EOS)
    assert tokenizer.opening == [BOS] * adds
    assert tokenizer.encode("a") == [theirs.convert_tokens_to_ids("a")]


def test_a_text_that_begins_with_the_token_itself_is_not_taken_for_it(write):
    tokenizer = load_tokenizer(write(False))
    assert tokenizer.encode("<bos>")[0] != BOS
    assert tokenizer.opening == []


@pytest.mark.parametrize("adds", [True, False])
def test_a_model_trained_here_keeps_what_it_was_trained_on(adds, write, tmp_path):
    tokenizer = load_tokenizer(write(adds))
    before = tokenizer.fingerprint()
    tokenizer.set_trained()
    assert tokenizer.opening == [BOS]
    tokenizer.save(tmp_path / "model")
    again = load_tokenizer(tmp_path / "model")
    assert prompt_ids(again, "a")[0] == BOS
    assert again.fingerprint() == before  # its tokens are the same
    again.save(tmp_path / "copy")  # as conversions and exports do
    assert load_tokenizer(tmp_path / "copy").opening == [BOS]
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "copy")("a").input_ids


def test_so_does_one_of_an_earlier_version(write, tmp_path):
    folder = write(False)
    (folder / "config.json").write_text(json.dumps({"trained_length": None}))
    assert read_tokenizer(folder).opening == []
    (folder / "config.json").write_text(json.dumps({"trained_length": 16}))
    own = read_tokenizer(folder)
    assert own.opening == [BOS]
    assert choose_tokenizer(folder, None, own) is own
    bare = write(True).rename(tmp_path / "elsewhere")
    assert choose_tokenizer(folder, bare, own).opening == [BOS]


def test_a_tokenizer_without_such_a_token_has_none_after_training_either(byte_level_tokenizer):
    byte_level_tokenizer.set_trained()
    assert byte_level_tokenizer.opening == []
    assert byte_level_tokenizer.start_id == byte_level_tokenizer.eos_id


@pytest.mark.parametrize("adds", [True, False])
def test_perplexity_begins_there_too(adds, make, write):
    tokenizer = load_tokenizer(write(adds))
    model = make(vocab_size=258)
    found = evaluate_text(model, tokenizer, "a text", sequence_length=8)
    ids = tokenizer.encode("a text")
    losses = [
        evaluate_tokens(model, ids, start_token=start, num_bytes=6, sequence_length=8).loss
        for start in (BOS, EOS)
    ]
    assert found.loss == losses[0 if adds else 1]
    assert losses[0] != losses[1]


def test_a_python_tokenizer_is_asked_too(write):
    class Slow:
        """What a tokenizer without a backend answers."""

        bos_token_id, eos_token_id, init_kwargs = BOS, EOS, {}

        def get_vocab(self):
            return {"<bos>": BOS, "<eos>": EOS, "a": 0}

        def encode(self, text, add_special_tokens=True, split_special_tokens=False):
            return [BOS] * add_special_tokens + [0] * len(text)

    assert HuggingFaceTokenizer(Slow()).opening == [BOS]
