"""What a conversion writes: nothing, if a tensor is not finite."""

import math

import pytest
import torch

from moezoo import InputError
from moezoo_models.conversion.targets import Output
from moezoo_models.conversion.writer import Shard, workspace


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_tensor_that_is_not_finite_leaves_no_directory(tmp_path, bad):
    weight = torch.ones(6, 5, dtype=torch.bfloat16)
    sound = Output("sound.weight", (6, 5), torch.bfloat16, lambda: iter([weight[:4], weight[4:]]))
    spoilt = weight.clone()
    spoilt[5, 3] = bad
    pieces = [spoilt[:4], spoilt[4:]]
    output = Output("spoilt.weight", (6, 5), torch.bfloat16, lambda: iter(pieces))
    message = "'spoilt.weight' holds NaN or an infinity, so model.safetensors is not written"
    with (
        pytest.raises(InputError, match=message),
        workspace(tmp_path / "out", "identity", force=False) as work,
    ):
        work.write(Shard("model.safetensors", (sound, output)), lambda _: None)
    assert list(tmp_path.iterdir()) == []
