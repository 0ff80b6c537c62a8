"""Whether llama.cpp cuts text into the same tokens: asked of itself, where it is installed."""

from __future__ import annotations

import importlib
import json
import tempfile
import unicodedata
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moezoo.errors import InputError
from moezoo_models.export.gguf.file import write_file
from moezoo_models.export.gguf.samples import SAMPLES
from moezoo_models.export.gguf.tensors import Stored
from moezoo_models.text.tokenizer import Tokenizer

_WIDTH = 32
_TIMEOUT = 60.0


def compare_encodings(keys: dict[str, Any], tokenizer: Tokenizer, *, composed: bool) -> str:
    """Return what was found by encoding varied text on both sides.

    Args:
        keys: that describe the tokenizer in a GGUF file.
        tokenizer: the model's.
        composed: whether to compare texts of composed characters only (NFC).

    Raises:
        InputError: a text has other ids in llama.cpp.
    """
    try:
        llama: Any = importlib.import_module("xllamacpp")
    except ImportError:
        return "known by its definition; xllamacpp is not installed, to encode text on both sides"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tokenizer.gguf"
        _write_tiny_model(file, keys)
        encode = _encoder(llama, file)
        for sample in SAMPLES:
            text = unicodedata.normalize("NFC", sample) if composed else sample
            ours, theirs = tokenizer.encode(text), encode(text)
            if ours != theirs:
                place = next(
                    (n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
                    min(len(ours), len(theirs)),
                )
                raise InputError(
                    f"tokenizer: llama.cpp encodes {text[:40]!r} otherwise, from token {place} on: "
                    f"{theirs[place : place + 3]} and not {ours[place : place + 3]}; serve the "
                    "model with transformers"
                )
    size = sum(len(text.encode()) for text in SAMPLES)
    return f"{len(SAMPLES)} texts, {size / 1000:.1f} kB, have the same ids in llama.cpp"


def _write_tiny_model(file: Path, keys: dict[str, Any]) -> None:
    """Write the smallest Llama that has a vocabulary: llama.cpp opens no file without a model."""
    rows = len(keys["tokenizer.ggml.tokens"])
    shapes = {
        "token_embd": (rows, _WIDTH),
        "output_norm": (_WIDTH,),
        "blk.0.attn_norm": (_WIDTH,),
        "blk.0.ffn_norm": (_WIDTH,),
        **{f"blk.0.attn_{x}": (_WIDTH, _WIDTH) for x in ("q", "k", "v", "output")},
        **{f"blk.0.ffn_{x}": (_WIDTH, _WIDTH) for x in ("gate", "up", "down")},
    }
    tensors = [Stored(f"{name}.weight", shape, [_zeros(shape)]) for name, shape in shapes.items()]
    sizes = {
        "block_count": 1,
        "context_length": _WIDTH,
        "embedding_length": _WIDTH,
        "feed_forward_length": _WIDTH,
        "attention.head_count": 1,
        "attention.layer_norm_rms_epsilon": 1e-6,
    }
    model = {f"llama.{key}": value for key, value in sizes.items()}
    write_file(file, "llama", {**model, **keys}, tensors, {}, "f16", file)


def _zeros(shape: tuple[int, ...]) -> Callable[[Any], torch.Tensor]:
    return lambda opened: torch.zeros(shape)


def _encoder(llama: Any, file: Path) -> Callable[[str], list[int]]:
    """Return a function that encodes text by llama.cpp's server, which runs in this process."""
    parameters = llama.CommonParams()
    parameters.model.path = str(file)
    parameters.n_ctx, parameters.n_parallel, parameters.n_gpu_layers = _WIDTH, 1, 0
    parameters.warmup, parameters.verbosity = False, -1
    server = llama.Server(parameters)

    def encode(text: str) -> list[int]:
        content = {"content": text, "add_special": False, "parse_special": False}
        request = urllib.request.Request(
            f"{server.listening_address}/tokenize",
            json.dumps(content).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
            found: list[int] = json.loads(answer.read())["tokens"]
            return found

    return encode
