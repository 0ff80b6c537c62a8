import hashlib
import random
import re

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DistributedSampler

from moezoo.errors import InputError
from moezoo_models.text.tokenizer import load_tokenizer
from moezoo_train.data.datamodule import TokenDataModule
from moezoo_train.data.prepare import prepare

pytestmark = [
    # Lightning 2.6 uses a name that torch 2.13 deprecates.
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    # It proposes as many workers as there are cores, and torch warns of more than that.
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
    # The checkpoint callback of a resumed run is another one.
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path."),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    chance = random.Random(0)
    sentence = "the expert router sends each token to two of its experts and adds them up"
    words = sentence.split()
    for i in range(30):
        text = "\n".join(" ".join(chance.choices(words, k=9)) for _ in range(20))
        (folder / f"{i}.txt").write_text(f"{text}\n{i}\n")
    return str(folder)


@pytest.fixture(scope="module")
def data_dir(source, tmp_path_factory):
    output = tmp_path_factory.mktemp("data")
    prepare(source, output, vocab_size=300, val_fraction=0.1)
    return str(output)


@pytest.fixture
def make_data(data_dir):
    def make(**options):
        return TokenDataModule(
            **{"source": None, "data_dir": data_dir, "sequence_length": 16, "batch_size": 8}
            | options
        )

    return make


def digest(batch):
    data = b"".join(batch[name].numpy().tobytes() for name in ("input_ids", "labels"))
    return hashlib.sha256(data).hexdigest()[:12]


class Recorder(pl.LightningModule):
    """Trains one number and notes which batches it saw; breaks off at one of them."""

    def __init__(self, break_at=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []
        self.validated = []
        self.break_at = break_at

    def training_step(self, batch, batch_idx):
        if len(self.seen) == self.break_at:
            raise KeyError("broken off")
        self.seen.append(digest(batch))
        return (self.weight - batch["labels"].float().mean()) ** 2

    def validation_step(self, batch, batch_idx):
        self.validated.append(digest(batch))

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def run(data, folder, model=None, resume=None, every=None, **options):
    """Train; return the module and where the last checkpoint is."""
    module = model or Recorder()
    callbacks = []
    if every is not None:
        callbacks = [ModelCheckpoint(folder, every_n_train_steps=every, save_last=True)]
    trainer = pl.Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "default_root_dir": folder,
            "callbacks": callbacks,
            "logger": False,
            "enable_checkpointing": every is not None,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "limit_val_batches": 0,
        }
        | options
    )
    trainer.fit(module, data, ckpt_path=resume, weights_only=True)
    return module


class TestResume:
    def test_epochs_are_not_alike(self, make_data, tmp_path):
        data = make_data()
        seen = run(data, tmp_path, max_epochs=3).seen
        assert len(seen) == 3 * len(data.train_dataloader())
        assert len(set(seen)) == len(seen)

    @pytest.mark.parametrize("workers", [0, 2])
    @pytest.mark.parametrize(
        ("accumulate", "steps"),
        [(1, 3), (2, 3), (1, "epoch"), (1, "epoch and 3")],
    )
    def test_goes_on_with_the_next_batch(self, make_data, tmp_path, workers, accumulate, steps):
        data = make_data(num_workers=workers)
        epoch = len(data.train_dataloader())
        assert epoch > 10
        steps = {"epoch": epoch, "epoch and 3": epoch + 3}.get(steps, steps)
        options = {"accumulate_grad_batches": accumulate, "max_epochs": 3}
        whole = run(data, tmp_path / "whole", **options)
        first = run(
            make_data(num_workers=workers), tmp_path, every=steps,
            accumulate_grad_batches=accumulate, max_steps=steps,
        )  # fmt: skip
        second = run(
            make_data(num_workers=workers), tmp_path, resume=tmp_path / "last.ckpt", **options
        )
        assert len(first.seen) == steps * accumulate
        assert first.seen + second.seen == whole.seen
        assert torch.equal(second.weight, whole.weight)

    @pytest.mark.parametrize("workers", [0, 2])
    def test_after_an_exception(self, make_data, tmp_path, workers):
        whole = run(make_data(), tmp_path / "whole", max_epochs=2)
        broken = Recorder(break_at=8)
        with pytest.raises(KeyError, match="broken off"):
            run(make_data(num_workers=workers), tmp_path, broken, every=5, max_epochs=2)
        resumed = run(
            make_data(num_workers=workers), tmp_path, resume=tmp_path / "last.ckpt", max_epochs=2
        )
        assert broken.seen == whole.seen[:8]
        assert resumed.seen == whole.seen[5:]
        assert torch.equal(resumed.weight, whole.weight)

    def test_twice_with_validation_in_between(self, make_data, tmp_path):
        options = {"limit_val_batches": 1.0, "val_check_interval": 4}
        whole = run(make_data(), tmp_path / "whole", max_steps=9, **options)
        first, second = tmp_path / "first", tmp_path / "second"
        one = run(make_data(), first, every=4, max_steps=4, **options)
        two = run(make_data(), second, resume=first / "last.ckpt", every=3, max_steps=6, **options)
        three = run(make_data(), second, resume=second / "last.ckpt", max_steps=9, **options)
        assert one.seen + two.seen + three.seen == whole.seen
        assert len(whole.seen) == 9
        assert len(set(whole.validated)) == len(make_data().val_dataloader())

    def test_shortened_epochs_go_on_through_the_data(self, make_data, tmp_path):
        whole = run(make_data(), tmp_path / "whole", max_epochs=1)
        short = run(make_data(), tmp_path / "short", max_epochs=3, limit_train_batches=4)
        assert short.seen == whole.seen[:12]

    def test_position_is_in_the_checkpoint(self, make_data, tmp_path):
        data = make_data()
        run(data, tmp_path, every=3, max_steps=3, accumulate_grad_batches=2)
        checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
        state = checkpoint["TokenDataModule"]
        assert state["batches_processed"] == 6
        assert state["order"]["tokens"] == data.prepared.inputs
        assert state["order"]["batch_size"] == 8

    def test_other_order_is_not_silent(self, make_data, tmp_path):
        run(make_data(), tmp_path, every=2, max_steps=2)
        with pytest.warns(UserWarning, match="resumed with other batch_size, seed than in the"):
            run(
                make_data(batch_size=4, seed=1),
                tmp_path, resume=tmp_path / "last.ckpt", max_steps=3,
            )  # fmt: skip


class TestLoaders:
    def test_train(self, make_data):
        data = make_data()
        loader = data.train_dataloader()
        batches = list(loader)
        assert len(batches) == len(loader)
        assert batches[0]["input_ids"].shape == batches[0]["labels"].shape == (8, 16)
        assert torch.equal(batches[0]["input_ids"][:, 1:], batches[0]["labels"][:, :-1])
        text = data.prepared.tokens("train")
        row = batches[2]["input_ids"][3].numpy()
        stretches = np.lib.stride_tricks.sliding_window_view(text, 16)
        assert (stretches == row).all(axis=1).any()

    def test_val_holds_all_tokens_in_order(self, make_data):
        data = make_data()
        labels = torch.cat([batch["labels"].flatten() for batch in data.val_dataloader()])
        assert labels[labels != -100].tolist() == data.prepared.tokens("val")[1:].tolist()
        tested = [digest(batch) for batch in data.test_dataloader()]
        assert tested == [digest(batch) for batch in data.val_dataloader()]

    def test_validate_and_test_without_fit(self, make_data, tmp_path):
        data = make_data()
        trainer = pl.Trainer(
            accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
            default_root_dir=tmp_path,
        )  # fmt: skip
        module = Recorder()
        trainer.validate(module, data, verbose=False)
        trainer.test(module, data, verbose=False)
        expected = [digest(batch) for batch in data.val_dataloader()]
        assert module.validated == expected * 2

    def test_processes_share_the_data(self, make_data):
        def batches(rank, world_size, **options):
            class Trainer:
                distributed_sampler_kwargs = {"num_replicas": world_size, "rank": rank}  # noqa: RUF012

                class fit_loop:
                    class epoch_loop:
                        from lightning.pytorch.loops.progress import _BatchProgress

                        batch_progress = _BatchProgress()

            data = make_data(**options)
            data.trainer = Trainer
            loaders = data.train_dataloader(), data.val_dataloader()
            # Lightning would replace any other sampler by a shuffling one.
            assert all(isinstance(loader.sampler, DistributedSampler) for loader in loaders)
            return [list(loader) for loader in loaders]

        train, val = batches(0, 1, batch_size=8)
        parts = [batches(rank, 2, batch_size=4) for rank in range(2)]
        for index, whole in enumerate(train):
            together = torch.cat([part[0][index]["labels"] for part in parts])
            assert torch.equal(together, whole["labels"])
        scored = torch.cat([batch["labels"].flatten() for part in parts for batch in part[1]])
        alone = torch.cat([batch["labels"].flatten() for batch in val])
        assert scored[scored != -100].sort()[0].equal(alone[alone != -100].sort()[0])
        assert len(parts[0][1]) == len(parts[1][1])


class TestModule:
    def test_prepares_and_describes_itself(self, source, tmp_path):
        data = TokenDataModule(
            source, str(tmp_path), vocab_size=300, sequence_length=16, val_fraction=0.1
        )
        assert data.vocab_size == 300
        data.prepare_data()
        data.setup("fit")
        prepared = data.prepared
        assert data.bytes_per_token == prepared.val.bytes / prepared.val.tokens
        assert data.tokenizer.eos_id == load_tokenizer(tmp_path / "tokenizer").eos_id
        assert data.tokenizer is data.tokenizer

    def test_workers_start_quietly_after_tokenizing(self, source, tmp_path, capfd):
        data = TokenDataModule(
            source, str(tmp_path), vocab_size=300, sequence_length=16, num_workers=2
        )
        data.prepare_data()
        assert data.tokenizer.encode("the expert")
        capfd.readouterr()
        assert len(list(data.train_dataloader())) == len(data.train_dataloader())
        assert capfd.readouterr() == ("", "")

    def test_vocabulary_comes_from_the_tokenizer(self, source, data_dir, tmp_path):
        data = TokenDataModule(source, str(tmp_path), tokenizer=f"{data_dir}/tokenizer")
        assert data.vocab_size == 300
        data.prepare_data()
        data.setup()
        assert data.prepared.vocab_size == 300

    def test_another_order_needs_no_other_tokens(self, source, data_dir, capfd):
        data = TokenDataModule(source, data_dir, vocab_size=300, val_fraction=0.1, seed=99)
        data.prepare_data()
        assert "nothing has changed" in capfd.readouterr().err

    def test_nothing_prepared(self, tmp_path):
        with pytest.raises(InputError, match=r"data_dir: .* holds no prepared tokens"):
            TokenDataModule(None, str(tmp_path))

    def test_tokens_of_a_larger_vocabulary(self, source, data_dir):
        data = TokenDataModule(source, data_dir, vocab_size=290)
        with pytest.raises(InputError, match=r"vocab_size: the tokens in .* have 300 ids, .* 290"):
            data.setup()

    def test_sequence_longer_than_the_data(self, make_data):
        with pytest.raises(InputError, match="sequence_length: 1000000 needs more than"):
            make_data(sequence_length=1_000_000).train_dataloader()

    @pytest.mark.parametrize(
        "options",
        [{"sequence_length": 0}, {"batch_size": 0}, {"num_workers": -1}, {"seed": -1}],
    )
    def test_bad_setting(self, make_data, options):
        with pytest.raises(InputError, match=next(iter(options))):
            make_data(**options)

    def test_missing_tokenizer(self, source, tmp_path):
        with pytest.raises(InputError, match=r"tokenizer: .* is not a directory"):
            TokenDataModule(source, str(tmp_path), tokenizer=str(tmp_path / "missing"))


def test_a_batch_is_named_by_where_its_windows_begin(make_data):
    data = make_data(batch_size=10)
    batch = next(iter(data.train_dataloader()))
    named = data.name_batch(0)
    tokens = data.prepared.tokens("train")
    starts = [int(word) for word in re.findall(r"\d+", named.partition(" of ")[0])]
    assert len(starts) == 1 + 8
    for row, start in zip(batch["input_ids"], starts[1:], strict=False):
        assert row.tolist() == tokens[start : start + 16].tolist()
    assert named.startswith("batch 1, whose windows begin at tokens ")
    assert named.endswith(f", … of {data.prepared.file('train')}")
