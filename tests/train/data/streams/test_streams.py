"""Streamed text: every window once, in an order that only the text and the options decide."""

import json
import random
from collections import Counter
from itertools import islice

import lightning.pytorch as pl
import numpy as np
import pytest
import tokenizers
import torch
import transformers

from moezoo import InputError
from moezoo_models.text.corpus import open_corpus
from moezoo_models.text.tokenizer import load_tokenizer
from moezoo_train.data.datamodule import TokenDataModule
from moezoo_train.data.mixing import DataSource
from moezoo_train.data.sources import Cutting
from moezoo_train.data.streams.batches import Numbering, StreamBatches
from moezoo_train.data.streams.data import StreamedData
from moezoo_train.data.streams.reader import Position, Reader
from moezoo_train.data.streams.source import StreamedText

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
]

S, B, READERS = 8, 2, 4


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Return the directory of a tokenizer of bytes, with a BOS."""
    vocabulary = {c: i for i, c in enumerate(tokenizers.pre_tokenizers.ByteLevel.alphabet())}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<bos>", "<eos>"])
    folder = tmp_path_factory.mktemp("words")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>"
    ).save_pretrained(folder)
    return str(folder)


def write(file, name, count):
    """Write rows that say which they are."""
    chance = random.Random(name)
    rows = [f"{name}{n} " + "".join(chance.choices("etaoin", k=20)) for n in range(count)]
    file.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return rows


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Return a folder with two files of rows."""
    folder = tmp_path_factory.mktemp("corpus")
    for name in "xy":
        write(folder / f"{name}.jsonl", name, 90)
    return str(folder)


@pytest.fixture
def text(corpus, words):
    return StreamedText(corpus, "text", words, READERS, 0, 0.1, 0)


def windows(text, reader, count, position=None):
    found = Reader(text, reader, S, position or Position())
    return [found.next()[0].tolist() for _ in range(count)]


def test_every_token_that_is_not_held_out_is_predicted_once_an_epoch(text, corpus):
    """All but what is left over at the end, which is less than a window of each reader."""
    held = text.held_out(1 << 30)
    tokenizer = text.tokenizer
    expected, out = Counter(), 0
    held_rows = tokenizer.decode(held.tokens.tolist())
    for row in open_corpus(corpus).documents():
        ids = [tokenizer.bos_id, *tokenizer.encode(row), tokenizer.eos_id]
        if row in held_rows:
            out += len(ids)
        else:
            expected.update(ids)
    assert out == len(held.tokens)
    assert 0.02 < out / (out + expected.total()) < 0.3
    found = Counter()
    for number in range(READERS):
        reader, firsts, rest = Reader(text, number, S, Position()), [], 0
        while True:
            tokens, _ = reader.next()
            if reader.position.epoch:
                rest = len(reader.position.carry)
                found.update(reader.position.carry.tolist()[1:])
                break
            found.update(tokens.tolist()[1:])
            firsts.append(tokens.tolist())
        assert rest <= S
        # The first token of a reader alone is not predicted.
        order = text.order(number, 0)
        whole = np.concatenate([text.training_tokens(part) for part in order])
        found[int(whole[0])] += 1
        assert len(firsts) == (len(whole) - 1) // S
    assert found == expected


def test_a_reader_goes_on_from_anywhere(text):
    reader = Reader(text, 1, S, Position())
    states, seen = [], []
    for _ in range(150):  # over several epochs
        states.append(reader.position.state_dict())
        seen.append(reader.next()[0].tolist())
    assert states[-1]["epoch"] >= 1
    assert len(set(map(str, seen))) > 100
    for at in (0, 1, 40, 77, 120, 149):
        assert windows(text, 1, 150 - at, Position.of(states[at])) == seen[at:]


def test_windows_come_in_another_order_each_epoch_and_by_seed(corpus, words, text):
    first = windows(text, 0, 20)
    assert windows(text, 0, 20) == first
    other = StreamedText(corpus, "text", words, READERS, 1, 0.1, 0)
    assert windows(other, 0, 20) != first
    assert other.held_out(1 << 30).tokens.tolist() == text.held_out(1 << 30).tokens.tolist()
    another = StreamedText(corpus, "text", words, READERS, 0, 0.1, 1)
    assert another.held_out(1 << 30).tokens.tolist() != text.held_out(1 << 30).tokens.tolist()
    assert text.order(0, 0) != text.order(0, 1)
    assert sorted(text.order(0, 0)) == sorted(text.order(0, 1))


def batches(texts, count, world_size=1, rank=0, weights=(1.0,), positions=None, first=0):
    numbering = Numbering(B, world_size, rank, READERS)
    found = StreamBatches(texts, weights, S, numbering, positions or {}, first)
    return list(islice(found, count))


def ids(streamed):
    return [each.batch["input_ids"].tolist() for each in streamed]


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_share_the_batches_of_one(text, world_size):
    whole = ids(batches([text], 12))
    shared = [ids(batches([text], 12 // world_size, world_size, r)) for r in range(world_size)]
    assert [shared[m % world_size][m // world_size] for m in range(12)] == whole


def test_labels_are_the_next_tokens(text):
    (found,) = batches([text], 1)
    assert found.batch["input_ids"].shape == (B, S)
    assert torch.equal(found.batch["input_ids"][:, 1:], found.batch["labels"][:, :-1])
    assert all(text.name_of(part).startswith("bytes ") for _, part in found.places)


@pytest.fixture(scope="module")
def make(corpus, words):
    def module(**options):
        defaults = {
            "source": corpus,
            "tokenizer": words,
            "sequence_length": S,
            "batch_size": B,
            "val_fraction": 0.1,
            "stream": True,
            "stream_readers": READERS,
        }
        return TokenDataModule(**defaults | options)

    return module


class Recorder(pl.LightningModule):
    """Trains one number, and notes the batches."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen, self.validated = [], []

    def training_step(self, batch, _):
        self.seen.append(batch["input_ids"].tolist())
        return (self.weight - batch["labels"].float().mean()) ** 2

    def validation_step(self, batch, _):
        self.validated += batch["labels"][batch["labels"] >= 0].tolist()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-6)


def fit(data, folder, steps, resume=None, **options):
    model = Recorder()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        val_check_interval=5,
        check_val_every_n_epoch=None,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        use_distributed_sampler=False,
        **options,
    )
    trainer.fit(model, datamodule=data, ckpt_path=resume, weights_only=True if resume else None)
    trainer.save_checkpoint(folder / f"{steps}.ckpt")
    return model


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_sees_the_batches_of_the_uninterrupted_one(workers, make, tmp_path):
    whole = fit(make(), tmp_path, 23)
    assert whole.seen == ids(batches(make()._text.texts, 23))
    assert len({str(batch) for batch in whole.seen}) == 23
    fit(make(), tmp_path, 11)
    rest = fit(make(num_workers=workers), tmp_path, 23, tmp_path / "11.ckpt")
    assert rest.seen == whole.seen[11:]
    again = fit(make(), tmp_path, 30, tmp_path / "23.ckpt")
    assert again.seen == ids(batches(make()._text.texts, 30))[23:]
    held = whole.validated[: len(whole.validated) // 4]
    assert held == make()._text.held_out[0].tokens.tolist()[1:]


def test_streamed_text_has_no_tokens_on_disk(make):
    with pytest.raises(InputError, match="stream: streamed text has no prepared tokens"):
        make().prepared  # noqa: B018 - read now
    with pytest.raises(InputError, match="stream: streamed tokens are not counted beforehand"):
        make().token_counts()


def test_epochs_of_a_limited_length_go_on_too(make, tmp_path):
    whole = fit(make(), tmp_path, 12)
    assert fit(make(), tmp_path, 12, limit_train_batches=5).seen == whole.seen


def test_several_texts_are_mixed_by_weight_and_resume(make, words, tmp_path):
    for name, count in (("p", 120), ("q", 40)):
        write(tmp_path / f"{name}.jsonl", name, count)
    sources = [
        DataSource(str(tmp_path / "p.jsonl"), 3.0),
        DataSource(str(tmp_path / "q.jsonl"), 1.0),
    ]
    own = {"source": None, "sources": sources}
    whole = fit(data := make(**own), tmp_path, 40)
    fit(make(**own), tmp_path, 17)
    assert fit(make(**own), tmp_path, 40, tmp_path / "17.ckpt").seen == whole.seen[17:]
    first, second = data.source_counts()
    assert first["windows"] + second["windows"] == 40 * B
    assert 0.6 < first["windows"] / (40 * B) < 0.9
    assert second["tokens"] == second["windows"] * S
    letters = load_tokenizer(words).decode(
        [t for batch in whole.seen for row in batch for t in row]
    )
    assert letters.count("p") > letters.count("q") > 0


def test_another_number_of_processes_goes_on_with_the_same_batches(text):
    numbering = Numbering(B, 1, 0, READERS)
    before = list(islice(StreamBatches([text], [1.0], S, numbering, {}, 0), 10))
    positions = {each.reader: each.positions for each in before}
    rest = ids(batches([text], 20))[10:]
    shared = [ids(batches([text], 5, 2, r, (1.0,), positions, 10)) for r in range(2)]
    assert [shared[m % 2][m // 2] for m in range(10)] == rest


def test_a_checkpoint_of_two_processes_goes_on_in_one(corpus, words, monkeypatch):
    def data():
        return StreamedData([DataSource(corpus)], words, READERS, 0, 0.1, 0, 1000)

    def train(data, processes, count, processed=0):
        cutting = Cutting(S, B, 0, 258, *processes)
        loader = data.train_loader(cutting, lambda: processed, workers=0)
        return [batch["input_ids"].tolist() for batch in islice(loader, count)]

    def gather(own):
        return [{n: each._progress.positions[n] for n in each._progress.moved} for each in both]

    whole = ids(batches(data().texts, 20))
    both = [data(), data()]
    for rank, each in enumerate(both):
        assert train(each, (2, rank), 7) == whole[rank:14:2]  # two more than are trained on
        each._progress.settle(5)
    monkeypatch.setattr("moezoo_train.data.streams.data.gather_from_ranks", gather)
    states = [each.state_dict(5) for each in both]
    assert str(states[0]) == str(states[1])
    assert states[0]["first"] == 10
    one = data()
    one.load_state_dict(states[0])
    assert train(one, (1, 0), 10, processed=5) == whole[10:20]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_workers": 3}, "stream_readers: 4 is not a multiple of 3, the 1 processes times"),
        ({"tokenizer": None}, "tokenizer: streamed text needs one that is there"),
        ({"source": "stdlib"}, "source: stdlib is not made of files"),
        ({"source": None}, r"sources\[0\].path: it is empty"),
        ({"messages_field": "talk"}, "messages_field: conversations are packed as a whole"),
        ({"max_bytes": 100}, "max_bytes: streamed text is not counted"),
        ({"val_fraction": 0.0}, "val_fraction: 0 holds nothing out"),
        ({"val_fraction": 1e-9}, "val_fraction: 1e-09 holds out nothing of"),
        ({"stream_readers": 4000}, "stream_readers: .*; lower it"),
        ({"stream_readers": 0}, "stream_readers: 0 is out of range"),
        ({"text_field": "txt"}, "text_field: .* has no 'txt'"),
    ],
    ids=str,
)
def test_what_does_not_go_is_one_line(options, message, make, tmp_path):
    with pytest.raises(InputError, match=message) as error:
        fit(make(**options), tmp_path, 2)
    assert "\n" not in str(error.value)


def test_passes_over_the_text_are_refused(make, tmp_path):
    trainer = pl.Trainer(accelerator="cpu", max_epochs=2, logger=False, default_root_dir=tmp_path)
    with pytest.raises(InputError, match="max_epochs: 2 passes have no known end"):
        trainer.fit(Recorder(), datamodule=make())


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"sequence_length": 4}, "sequence_length"),
        ({"seed": 3}, "seed"),
        ({"split_seed": 3}, "text"),
    ],
)
def test_a_position_of_something_else_is_refused(options, name, make, tmp_path):
    fit(make(), tmp_path, 3)
    with pytest.raises(InputError, match=f"the checkpoint has another {name} in data"):
        fit(make(**options), tmp_path, 6, tmp_path / "3.ckpt")


@pytest.mark.parametrize(
    "spoiled",
    [{"block": -1}, {"window": "3"}, {"carry": [1]}, {"carry": torch.zeros(2)}, {"epoch": 1.5}],
    ids=str,
)
def test_a_damaged_position_is_one_line(spoiled, make, tmp_path):
    fit(make(), tmp_path, 3)
    state = torch.load(tmp_path / "3.ckpt", weights_only=True)
    for readers in state["TokenDataModule"]["readers"].values():
        readers[0] |= spoiled
    torch.save(state, tmp_path / "bad.ckpt")
    with pytest.raises(InputError, match="ckpt_path: the position in the checkpoint is damaged"):
        fit(make(), tmp_path, 6, tmp_path / "bad.ckpt")


def test_a_bad_row_ends_the_run_in_one_line_from_a_worker_too(make, tmp_path):
    file = tmp_path / "a.jsonl"
    write(file, "z", 60)
    with file.open("a") as stream:
        stream.write('{"text": 3}\n')
    for workers in (0, 2):
        with pytest.raises(InputError, match=r"'text' in .*a\.jsonl at byte \d+ is a int") as error:
            fit(make(source=str(file), num_workers=workers), tmp_path, 200)
        assert "\n" not in str(error.value)


def test_models_keep_the_beginning_that_documents_had(make, words):
    data = make()
    assert load_tokenizer(words).opening == []
    assert data.tokenizer.opening == [data.tokenizer.bos_id]
