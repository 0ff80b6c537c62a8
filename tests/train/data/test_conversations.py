"""Conversations from rows to batches: masks, packing, mixing, and what killed runs leave."""

import json
import pickle
import random
import shutil

import numpy as np
import pytest
import tokenizers
import torch
import transformers

from moezoo.errors import InputError
from moezoo_train.data import prepare as module
from moezoo_train.data.datamodule import TokenDataModule
from moezoo_train.data.mixing import BLOCK, DataSource, Schedule, shares
from moezoo_train.data.packing import TrainConversations, ValConversations, pack
from moezoo_train.data.prepare import prepare
from moezoo_train.data.prepared import OPENS, SCORED, PreparedData
from moezoo_train.data.windows import IGNORE_INDEX

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Return the directory of a byte tokenizer with a chat template."""
    vocabulary = {c: i for i, c in enumerate(tokenizers.pre_tokenizers.ByteLevel.alphabet())}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<|end|>", "<|user|>", "<|assistant|>"])
    hf = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    hf.chat_template = TEMPLATE
    directory = tmp_path_factory.mktemp("tokenizer")
    hf.save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def talks():
    chance = random.Random(0)
    letters = "abcdefgh über"

    def text(longest):
        return "".join(chance.choices(letters, k=chance.randint(1, longest)))

    return [
        [
            message
            for _ in range(chance.randint(1, 3))
            for message in (
                {"role": "user", "content": text(12)},
                {"role": "assistant", "content": text(60 if number % 7 == 0 else 9)},
            )
        ]
        for number in range(60)
    ]


@pytest.fixture(scope="module")
def rows(talks, tmp_path_factory):
    file = tmp_path_factory.mktemp("rows") / "talks.jsonl"
    file.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    return file


@pytest.fixture(scope="module")
def prepared(rows, tokenizer, tmp_path_factory):
    output = tmp_path_factory.mktemp("chat") / "data"
    return prepare(str(rows), output, tokenizer=tokenizer, messages_field="messages")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for i in range(12):
        (folder / f"{i}.txt").write_text(f"{i} " + "xyz" * (30 + i))
    return folder


def written(talk):
    return "".join(f"<|{m['role']}|>{m['content']}<|end|>" for m in talk)


def said(talk):
    return [m["content"] + "<|end|>" for m in talk if m["role"] == "assistant"]


class TestPrepare:
    def test_shards_hold_conversations_and_marks(self, prepared, talks, tokenizer):
        hf = transformers.AutoTokenizer.from_pretrained(tokenizer)
        found, scored = [], []
        for name in ("train", "val"):
            tokens, marks = np.array(prepared.tokens(name)), np.array(prepared.marks(name))
            begins = np.flatnonzero(marks & OPENS)
            assert prepared.split(name).documents == len(begins)
            assert prepared.split(name).scored == np.count_nonzero(marks & SCORED)
            found += [hf.decode(part) for part in np.split(tokens, begins)[1:]]
            scored.append(hf.decode(tokens[(marks & SCORED) > 0]))
            assert prepared.split(name).bytes == len(scored[-1].encode())
        assert sorted(found) == sorted(map(written, talks))
        by_text = {written(talk): talk for talk in talks}
        assert "".join(scored) == "".join("".join(said(by_text[text])) for text in found)

    def test_a_killed_run_ends_in_the_same_bytes(
        self, prepared, rows, tokenizer, tmp_path, monkeypatch
    ):
        monkeypatch.setattr(module, "SHARD_BYTES", 900)
        monkeypatch.setattr(module, "assemble", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        options = {"tokenizer": tokenizer, "messages_field": "messages", "workers": 2}
        with pytest.raises(KeyboardInterrupt):
            prepare(str(rows), tmp_path / "data", **options)
        work = tmp_path / "data" / "partial"
        shards = sorted(work.glob("*.marks"))
        assert len(shards) > 4
        for file in work.glob(f"{shards[3].stem}.index"):  # the fourth and those behind it are lost
            file.unlink()
        shards[2].write_bytes(b"")
        monkeypatch.undo()
        monkeypatch.setattr(module, "SHARD_BYTES", 900)
        again = prepare(str(rows), tmp_path / "data", **options)
        assert (again.train, again.val) == (prepared.train, prepared.val)
        again.check_sums()
        assert not work.exists()

    def test_nothing_is_done_twice_and_a_changed_template_is_seen(
        self, prepared, rows, tokenizer, tmp_path, capsys
    ):
        shutil.copytree(tokenizer, tmp_path / "tokenizer")
        shutil.copytree(prepared.directory, tmp_path / "data")
        options = {"messages_field": "messages", "tokenizer": str(tmp_path / "tokenizer")}
        prepare(str(rows), tmp_path / "data", **options)
        assert "nothing has changed" in capsys.readouterr().err
        template = tmp_path / "tokenizer" / "chat_template.jinja"
        template.write_text(TEMPLATE.replace("<|end|>{% endfor", "<|end|>\n{% endfor"))
        anew = prepare(str(rows), tmp_path / "data", **options)
        assert "this changed: chat_template" in capsys.readouterr().err
        assert anew.train.tokens > prepared.train.tokens
        assert anew.train.scored == prepared.train.scored

    @pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
    def test_damaged_marks_are_named(self, prepared, tmp_path, damage):
        shutil.copytree(prepared.directory, tmp_path / "data")
        file = tmp_path / "data" / "val.marks"
        content = file.read_bytes()
        file.unlink()
        if damage != "missing":
            other = bytes([content[0] ^ 1]) + content[1:]
            file.write_bytes(other if damage == "flipped" else content[1:])
        with pytest.raises(InputError, match=r"val\.marks is"):
            PreparedData.load(tmp_path / "data").check_sums()

    @pytest.mark.parametrize(
        ("line", "problem"),
        [
            ('{"messages": [{"role": "user", "content": "x"}]}', "line 3 has no message of role"),
            ('{"messages": 3}', "line 3 is not a list of messages"),
            ('{"massages": []}', "line 3 has no 'messages'; did you mean 'massages'"),
            ("{", "line 3 is not JSON"),
            (
                '{"messages": [{"role": "user", "content": "<|end|>"},'
                '{"role": "assistant", "content": ""}]}',
                "document 3 of .*: message 1 spells the special token",
            ),
        ],
    )
    def test_a_row_that_is_no_conversation_is_named(self, rows, tokenizer, tmp_path, line, problem):
        lines = rows.read_text().splitlines()
        (tmp_path / "a.jsonl").write_text("\n".join([*lines[:2], line, *lines[2:]]))
        with pytest.raises(InputError, match=problem):
            prepare(
                str(tmp_path / "a.jsonl"), tmp_path / "data", tokenizer=tokenizer,
                messages_field="messages",
            )  # fmt: skip
        assert not (tmp_path / "data" / "meta.json").exists()

    def test_what_has_no_rows_or_no_template_is_refused(self, tokenizer, tmp_path):
        (tmp_path / "a.txt").write_text("x")
        for source in ("stdlib", str(tmp_path)):
            with pytest.raises(InputError, match="no rows"):
                prepare(source, tmp_path / "d", tokenizer=tokenizer, messages_field="messages")
        (tmp_path / "b.jsonl").write_text("{}")
        with pytest.raises(InputError, match="messages_field: conversations need a chat template"):
            prepare(str(tmp_path / "b.jsonl"), tmp_path / "d", messages_field="messages")
        assert not (tmp_path / "d").exists()


class TestPacking:
    @pytest.mark.parametrize("length", [7, 31, 200, 5000])
    def test_all_that_is_said_is_predicted_once_and_from_its_own(self, prepared, length):
        tokens, marks = np.array(prepared.tokens("train")), np.array(prepared.marks("train"))
        own = np.cumsum((marks & OPENS) > 0)
        ends = {*np.flatnonzero(marks & OPENS).tolist(), len(tokens)}
        seen = np.zeros(len(tokens), int)
        for window in pack(marks, length + 1):
            assert sum(piece.length for piece in window) <= length + 1
            for begin, size in window:
                assert len(set(own[begin : begin + size])) == 1
                assert size == length + 1 or begin + size in ends
                seen[begin + 1 : begin + size] += 1
        assert set(seen[(marks & SCORED) > 0]) == {1}
        if length == 5000:
            assert len(pack(marks, length + 1)) == 1

    def test_windows_are_filled(self, prepared):
        marks = np.array(prepared.marks("train"))
        windows = pack(marks, 301)
        assert len(windows) <= 1.05 * len(marks) / 301 + 1

    def test_labels_are_the_next_tokens_or_left_out(self, prepared):
        tokens, marks = prepared.tokens("val"), prepared.marks("val")
        batches = ValConversations(tokens, marks, 40, 3)
        total = 0
        for i in range(len(batches)):
            batch = batches[i]
            ids, labels = batch["input_ids"], batch["labels"]
            assert ids.shape == labels.shape
            assert ids.shape[1] == 40
            kept = labels[:, :-1] != IGNORE_INDEX
            assert torch.equal(labels[:, :-1][kept], ids[:, 1:][kept])
            total += int((labels != IGNORE_INDEX).sum())
        assert total == prepared.val.scored

    def test_processes_share_the_windows(self, prepared):
        data = (prepared.tokens("train"), prepared.marks("train"), 50)
        one = TrainConversations(*data, 4, seed=3)
        two = [TrainConversations(*data, 2, seed=3, rank=r, world_size=2) for r in range(2)]
        for i in (0, len(one) - 1, len(one), 5 * len(one)):
            both = torch.cat([part[i]["input_ids"] for part in two])
            assert torch.equal(both, one[i]["input_ids"])
        assert not torch.equal(one[0]["input_ids"], one[len(one)]["input_ids"])
        val = [
            ValConversations(prepared.tokens("val"), prepared.marks("val"), 300, 1, rank, 2)
            for rank in range(2)
        ]
        assert len(val[0]) == len(val[1]) == 1
        assert (val[1][0]["labels"] == IGNORE_INDEX).all()

    def test_a_worker_is_sent_names_only(self, prepared):
        marks = prepared.marks("train")
        batches = TrainConversations(prepared.tokens("train"), marks, 5000, 1)
        sent = pickle.dumps(batches)
        assert marks.tobytes() not in sent
        assert batches.tokens.tobytes() not in sent
        assert torch.equal(pickle.loads(sent)[2]["labels"], batches[2]["labels"])

    def test_too_few_windows_are_refused(self, prepared):
        with pytest.raises(InputError, match="packed; lower it"):
            TrainConversations(prepared.tokens("train"), prepared.marks("train"), 5000, 2)


class TestMixing:
    @pytest.mark.parametrize("weights", [[1], [1, 1], [0.7, 0.2, 0.1], [1e-3, 5, 2.5], [1] * 7])
    def test_a_window_is_the_next_of_its_source_and_shares_are_kept(self, weights):
        schedule = Schedule(weights, seed=1)
        counts = [0] * len(weights)
        for number in range(2 * BLOCK + 100):
            if number in (0, 17, BLOCK, BLOCK + 1, 2 * BLOCK + 99):
                assert Schedule(weights, 1).taken(number) == counts
                assert Schedule(weights, 1)[number] == schedule[number]
            source, window = schedule[number]
            assert window == counts[source]
            counts[source] += 1
            if number == 2 * BLOCK - 1:
                exact = 2 * BLOCK * np.array(weights) / sum(weights)
                assert (np.abs(counts - exact) <= 2).all()

    def test_shares_that_no_window_has_are_refused(self):
        assert shares([1, 4095]) == [1, 4095]
        for weights, problem in (
            ([1, 0], r"sources\[1\].weight: 0 takes nothing"),
            ([1, -1.0], r"sources\[1\].weight: -1 is out of range"),
            ([1e-9, 1], r"sources\[0\].weight: 1e-09 is less than one window"),
            ([float("nan"), 1], r"sources\[0\].weight: nan"),
        ):
            with pytest.raises(InputError, match=problem):
                shares(weights)

    @pytest.fixture
    def mixed(self, prepared, texts, tokenizer, tmp_path):
        """Return a function that makes data of conversations and text."""

        def make(**options):
            sources = [
                DataSource(str(prepared.directory), 3.0),
                DataSource(str(texts), 1.0),
            ]
            data = TokenDataModule(
                **{
                    "sources": sources,
                    "data_dir": str(tmp_path / "data"),
                    "tokenizer": tokenizer,
                    "sequence_length": 40,
                    "batch_size": 4,
                    "val_fraction": 0.2,
                }
                | options
            )
            data.prepare_data()
            data.setup()
            return data

        return make

    def test_batches_are_the_sources_windows(self, mixed):
        data = mixed()
        one = data.train_dataloader().dataset
        talks, _ = one.sources
        of_text = of_talks = 0
        for i in range(3 * len(one)):
            rows = one[i]["input_ids"]
            for row, (source, number) in zip(rows, one.windows(i), strict=True):
                assert torch.equal(row, one.sources[source][number]["input_ids"][0])
                of_text, of_talks = of_text + source, of_talks + 1 - source
        assert of_text > 10
        assert of_talks > len(talks)
        again = mixed().train_dataloader().dataset
        last = 3 * len(one) - 1
        assert torch.equal(again[last]["labels"], one[last]["labels"])
        assert (again[last]["labels"] == IGNORE_INDEX).any()

    def test_validation_goes_through_every_source_once(self, mixed):
        data = mixed()
        scored = sum(int((b["labels"] != IGNORE_INDEX).sum()) for b in data.val_dataloader())
        talks, texts = data.all_prepared
        assert scored == talks.val.scored + texts.val.tokens - 1
        expected = (talks.val.bytes + texts.val.bytes) / (talks.val.scored + texts.val.tokens)
        assert data.bytes_per_token == expected

    def test_what_does_not_go_together_is_refused(self, mixed, rows, tmp_path):
        for options, problem in (
            ({"source": str(rows)}, "there is a source too"),
            ({"messages_field": "messages"}, "each has its own text_field"),
            ({"tokenizer": None}, "tokenizer: several sources need one"),
            ({"sources": []}, "sources: there are none"),
            ({"sources": [DataSource("")]}, r"sources\[0\].path: it is empty"),
            ({"sources": [DataSource(str(tmp_path / "none"))]}, r"sources\[0\]: .*does not exist"),
        ):
            with pytest.raises(InputError, match=problem):
                mixed(**options)
        prepare("stdlib", tmp_path / "other", vocab_size=400, max_bytes=20_000)
        with pytest.raises(InputError, match="made with another tokenizer"):
            mixed(sources=[DataSource(str(tmp_path / "other"))])
