"""What rounding a model's weights to the format of a file costs, as perplexity.

llama.cpp also rounds what the weights are multiplied with, which is not in these figures.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moezoo_models.checkpoints.stock import load_stock
from moezoo_models.evaluation.perplexity import evaluate_text
from moezoo_models.export.gguf.encoding import decode, encode, encoding_of
from moezoo_models.export.gguf.tensors import Stored
from moezoo_models.text.tokenizer import Tokenizer

_ROUTERS = ("mlp.gate.weight", "block_sparse_moe.gate.weight", "router.weight")


@dataclass(frozen=True)
class Rounded:
    """Perplexities of a text.

    Attributes:
        before: of the weights as they are.
        after: of the weights as the file has them.
    """

    before: float
    after: float


def measure_rounding(directory: Path, tokenizer: Tokenizer, text: str, dtype: str) -> Rounded:
    """Return the perplexity of a text before and after the weights are rounded.

    Args:
        directory: of a stock model that has passed the gate.
        tokenizer: the model's.
        text: of any length.
        dtype: f32, f16 or q8_0.

    Raises:
        InputError: the text is empty.
    """
    model: Any = load_stock(directory, pickled=True, dtype="float32")
    before = evaluate_text(model, tokenizer, text).perplexity
    round_weights(model, dtype)
    return Rounded(before, evaluate_text(model, tokenizer, text).perplexity)


@torch.no_grad()
def round_weights(model: nn.Module, dtype: str) -> None:
    """Round a model's matrices as a file of a format has them, in place.

    Of a stack of experts, the rows are those that the file has, though in another order.
    """
    for name, weight in model.named_parameters():
        if weight.numel() and not name.endswith(_ROUTERS):
            encoding = encoding_of(Stored(name, tuple(weight.shape)), dtype)
            for part in weight if weight.ndim == 3 else [weight]:
                part.copy_(decode(encode(name, part, encoding), encoding))
