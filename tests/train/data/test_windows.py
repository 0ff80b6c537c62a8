import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moezoo.errors import InputError
from moezoo_train.data.windows import BatchNumbers, TrainBatches, ValBatches


def starts(batch):
    """Return the first token of each window; with tokens 0, 1, 2 … that is its place."""
    return batch["input_ids"][:, 0].tolist()


class TestTrain:
    def test_windows_are_stretches_with_the_next_tokens_as_labels(self):
        batches = TrainBatches(np.arange(1000, dtype=np.uint16), 16, 4)
        for index in (0, 1, len(batches) - 1, 7 * len(batches) + 3):
            batch = batches[index]
            assert list(batch) == ["input_ids", "labels"]
            assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
            assert batch["input_ids"].shape == batch["labels"].shape == (4, 16)
            expected = torch.tensor(starts(batch))[:, None] + torch.arange(16)
            assert torch.equal(batch["input_ids"], expected)
            assert torch.equal(batch["labels"], expected + 1)

    @given(st.integers(2, 400), st.integers(1, 40), st.integers(0, 5), st.integers(0, 2**70))
    def test_an_epoch_has_no_window_twice(self, tokens, length, epoch, seed):
        if tokens <= length:
            return
        batches = TrainBatches(np.arange(tokens), length, 1, seed=seed)
        first = [starts(batches[epoch * len(batches) + i])[0] for i in range(len(batches))]
        ordered = np.sort(first)
        assert (np.diff(ordered) == length).all()
        assert 0 <= ordered[0] < length
        assert ordered[-1] + length < tokens
        assert len(first) == max(1, tokens // length - 1)

    def test_order_is_a_function_of_seed_and_number(self):
        def order(seed, numbers):
            batches = TrainBatches(np.arange(5000), 16, 4, seed=seed)
            return [starts(batches[i]) for i in numbers]

        forward = order(0, range(200))
        assert order(0, reversed(range(200)))[::-1] == forward
        assert order(1, range(200)) != forward
        flat = [start for batch in forward[:77] for start in batch]
        assert flat != sorted(flat)

    def test_epochs_differ_in_order_and_offset(self):
        batches = TrainBatches(np.arange(5000), 50, 1)
        epochs = [
            [starts(batches[epoch * len(batches) + i])[0] for i in range(len(batches))]
            for epoch in range(5)
        ]
        assert len({epoch[0] % 50 for epoch in epochs}) > 2
        windows = [[start // 50 for start in epoch] for epoch in epochs]
        assert all(windows[0] != other for other in windows[1:])

    @pytest.mark.parametrize("world_size", [2, 3])
    def test_processes_share_the_batches_of_one(self, world_size):
        tokens = np.arange(3000)
        alone = TrainBatches(tokens, 16, 2 * world_size)
        together = [
            TrainBatches(tokens, 16, 2, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        assert {len(batches) for batches in together} == {len(alone)}
        for index in (0, 5, len(alone) + 2):
            parts = [batches[index]["input_ids"] for batches in together]
            assert torch.equal(torch.cat(parts), alone[index]["input_ids"])

    def test_worker_gets_the_name_of_a_mapped_file(self, tmp_path):
        np.arange(100_000, dtype=np.uint16).tofile(tmp_path / "train.bin")
        mapped = np.memmap(tmp_path / "train.bin", dtype=np.uint16, mode="r")
        batches = TrainBatches(mapped, 16, 4)
        sent = pickle.dumps(batches)
        assert len(sent) < 2000
        assert torch.equal(pickle.loads(sent)[3]["labels"], batches[3]["labels"])

    def test_bad_input(self):
        tokens = np.arange(20)
        assert len(TrainBatches(tokens, 19, 1)) == 1
        for arguments, field in (
            ((tokens, 20, 1), "sequence_length: 20 needs more than 20 training tokens"),
            ((tokens, 0, 1), "sequence_length: 0"),
            ((tokens, 4, 0), "batch_size: 0"),
            ((tokens, 4, 5), "batch_size: 5 × 1 processes is more than the 4 windows"),
            ((tokens, 4, 1, -1), "seed: -1"),
        ):
            with pytest.raises(InputError) as error:
                TrainBatches(*arguments)
            assert str(error.value).startswith(field)
        with pytest.raises(InputError, match="batch_size: 3 × 2 processes"):
            TrainBatches(tokens, 4, 3, world_size=2)

    def test_id_outside_the_vocabulary(self):
        tokens = np.array([1, 2, 3, 50, 4, 5])
        for batches in (
            TrainBatches(tokens, 5, 1, vocab_size=50),
            ValBatches(tokens, 5, 1, vocab_size=50),
        ):
            with pytest.raises(
                InputError, match=r"vocab_size: the tokens hold id 50, but .* 50 ids"
            ):
                batches[0]
        assert TrainBatches(tokens, 5, 1, vocab_size=51)[0]["labels"].max() == 50


class TestVal:
    @given(st.integers(2, 300), st.integers(1, 40), st.integers(1, 5), st.integers(1, 4))
    def test_every_token_but_the_first_is_predicted_once(self, tokens, length, size, world_size):
        scored, windows = [], []
        for rank in range(world_size):
            batches = ValBatches(
                np.arange(tokens), length, size, pad_id=7, rank=rank, world_size=world_size
            )
            for batch in (batches[i] for i in range(len(batches))):
                inputs, labels = batch["input_ids"], batch["labels"]
                assert inputs.shape == labels.shape
                assert inputs.shape[1] == length
                assert 1 <= inputs.shape[0] <= size
                real = labels != -100
                assert (inputs[real] + 1 == labels[real]).all()
                assert (inputs[~real] == 7).all()
                scored += labels[real].tolist()
                windows.append(len(inputs))
        assert sorted(scored) == list(range(1, tokens))
        expected = -(-(tokens - 1) // (length * size * world_size)) * world_size
        assert len(windows) == expected

    def test_types(self):
        batch = ValBatches(np.arange(10, dtype=np.uint16), 4, 2)[0]
        assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64

    def test_too_few_tokens(self):
        with pytest.raises(InputError, match="val_fraction: validation needs two tokens"):
            ValBatches(np.arange(1), 4, 2)


def test_batch_numbers_start_where_the_run_stands():
    batches = TrainBatches(np.arange(100), 10, 2)
    position = 0
    numbers = BatchNumbers(batches, first=lambda: position)
    assert list(numbers) == [0, 1, 2, 3]
    position = 6
    assert list(numbers) == [6, 7, 8, 9]
    assert len(numbers) == len(batches) == 4
