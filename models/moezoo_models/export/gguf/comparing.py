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
from moezoo_models.export.gguf.tensors import Stored
from moezoo_models.text.tokenizer import Tokenizer

_WIDTH = 32
_TIMEOUT = 60.0

SAMPLES = (
    "The quick brown fox doesn't jump; it's LAZY, they'll say: 'I'm sure we've seen'd re'd.",
    "  two spaces,   three,\tone tab,\t\ttwo,\n one line \n\n  two lines \r\n\r\nand \r ones  ",
    "0 1 12 123 1234 12345 3.14159 1,234,567 0x7fff 1e-5 ½ ² ٣ Ⅷ v2.0-rc1 99% #42 @home",
    'def f(x: int = 3) -> str:\n    """Doc."""\n    if x != 0 and y[i] >= {"a": 1}["a"]:\n'
    "        return f'{x!r}'\n\n\nclass A(B):\n\tpass  # comment\n",
    "Füße, café, naïve, Ærøskøbing, Łódź, İstanbul, ĳ, ß, ﬁ, Größe 5 €, £3, ¥, ¿qué?, «oui», „ja“",
    "Привет, мир! Ελληνικά κείμενο. שלום עולם. مرحبا بالعالم. हिन्दी में पाठ। ภาษาไทย ქართული",
    "中文文本，没有空格。日本語のテキスト、カタカナ。한국어 텍스트입니다. 𠮷野家",
    "emoji 😀😃 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 ✊🏽 ❤️ and symbols ∀x∈ℝ: ⌈x⌉ ≥ x → ∞ … — – ‘’ “” • ™ ©",
    "e\u0301 a\u0308 o\u0302\u0323 \u00a0nbsp\u2003em\u3000ideographic\u200bzero\u2028line\ufeffb",
    "https://example.org/a/b?c=d&e=%20#f user.name+tag@mail.co $HOME/.config *.py <|end|> </s>",
    "aaaaaaaaaaaaaaaa !!!!!!!!!! ---------- ========== ~~~~ .......... ____ 'S 'T 'RE 'VE 'M 'D",
    "\\begin{align} x^2 + y_1 &= \\frac{a}{b} \\\\ \\end{align} | a | b |\n|---|:-:|\n| 1 | 2 |\n",
)
"""Text in which pre-tokenizers that are alike differ."""


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
