"""A dense model of ours as the stock architecture that it is, for `moezoo export`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

from moezoo.errors import InputError
from moezoo.layers.dense import DenseFFN
from moezoo.matrices import Matrix
from moezoo_kernels.activations import PLAIN_GLU
from moezoo_models.checkpoints.atomic import replacing_directory
from moezoo_models.checkpoints.companions import carry_over
from moezoo_models.checkpoints.dense import ACTIVATIONS, DENSE_CONFIGS, dense_config
from moezoo_models.checkpoints.directory import CONFIG, existing, load_checkpoint, write_model
from moezoo_models.checkpoints.locks import writing
from moezoo_models.model.causal_lm import MoezooForCausalLM
from moezoo_models.model.config import MoezooConfig
from moezoo_models.text.tokenizer import Tokenizer

_SAME = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rope_parameters",
    "rms_norm_eps",
    "attention_bias",
    "attention_dropout",
    "sliding_window",
    "layer_types",
    "tie_word_embeddings",
    "initializer_range",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "dtype",
)
"""Fields that have the same name and meaning here and there, where they are there."""

_STOCK = ("llama", "mistral", "qwen2", "qwen3", "stablelm")
"""Architectures that are written, by ``model_type``."""

_NAMELESS = ("_name_or_path", "architectures", "ffn", "transformers_version")


def export(checkpoint: str | Path, target: str | Path) -> Path:
    """Write a dense model of ours as a Llama, Mistral, Qwen2, Qwen3 or StableLM, whichever it is.

    The tensors are the same, under the same names; only the configuration changes, so that
    programs that know the stock architecture can read it. Matrices that are factored or sparse are
    written as they multiply, one plain matrix each.

    Args:
        checkpoint: directory of a model whose feed-forward blocks are all dense.
        target: directory to make.

    Returns:
        The directory.

    Raises:
        InputError: the model is none of them, or ``target`` has something in it.
    """
    with making(target) as directory:
        model, tokenizer = load_checkpoint(checkpoint)
        config = save_stock(directory, model, tokenizer, existing(Path(checkpoint)))
    print(f"{config.model_type:<8}{model.num_parameters() / 1e6:,.3g} M parameters, {directory}")
    return directory


@contextmanager
def making(target: str | Path) -> Iterator[Path]:
    """Yield the path of a directory to make, which nobody else makes meanwhile.

    Raises:
        InputError: there is something already, or another process is writing it.
    """
    directory = Path(target)
    _check_new(directory)
    with writing(directory, "target"):
        _check_new(directory)  # another process may have just made it
        yield directory


def _check_new(directory: Path) -> None:
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise InputError(f"target: {directory} is there already; name a new directory")


def save_stock(
    target: Path,
    model: MoezooForCausalLM,
    tokenizer: Tokenizer | None = None,
    source: Path | None = None,
) -> PreTrainedConfig:
    """Save a dense model in memory as the stock architecture that it is; see :func:`export`.

    Licence and README come from `source`, the directory that the model was loaded from.

    Raises:
        InputError: it is none.
    """
    config = stock_config(model)
    with torch.device("meta"):
        stock: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    stock.load_state_dict(plain_state_dict(model), assign=True)
    stock.tie_weights()
    with replacing_directory(target, "target") as fresh:
        write_model(fresh, target, stock)
        if tokenizer is not None:
            tokenizer.save(fresh)
        if source is not None:
            carry_over([source], fresh, written_as(config.model_type))
    return config


def written_as(kind: str) -> str:
    """Return what a README says of a model that was written as another architecture."""
    return f"`moezoo export` wrote the same weights as a `{kind}`, which computes the same."


@torch.no_grad()
def plain_state_dict(model: MoezooForCausalLM) -> dict[str, Tensor]:
    """Return a model's tensors with every projection of dense blocks as a plain matrix.

    Without what belongs to training: a warm-up's count of steps, masks, guides.
    """
    tensors = {k: t for k, t in model.state_dict().items() if not k.endswith(".l1_step")}
    blocks = [(name, part) for name, part in model.named_modules() if isinstance(part, DenseFFN)]
    for block, layer in blocks:
        for name, matrix in layer.projections().items():
            if isinstance(matrix, Matrix):
                for key in [key for key in tensors if key.startswith(f"{block}.{name}.")]:
                    del tensors[key]
                tensors[f"{block}.{name}.weight"] = matrix.dense().detach()
                if matrix.bias is not None:
                    tensors[f"{block}.{name}.bias"] = matrix.bias.detach()
    return tensors


def stock_config(model: MoezooForCausalLM) -> PreTrainedConfig:
    """Find the stock configuration that :func:`dense_config` would turn into this model's.

    Raises:
        InputError: there is none.
    """
    check_no_memories(model)
    width, activation, bias = _block(model)
    ours = _comparable(model.config)
    for stock in _candidates(model.config, width, activation, bias):
        if _comparable(dense_config(stock.to_dict())) == ours:
            return stock
    if model.config.parallel != "none":
        raise InputError(
            f"checkpoint: its blocks run beside attention (parallel {model.config.parallel}), and "
            "the stock format that holds such has one_norm, norm layer, one width of heads and no "
            "windows (stablelm); keep it as it is"
        )
    raise InputError(
        f"checkpoint: its attention is none of {', '.join(_STOCK)}; compare the norms, "
        f"biases and windows in its {CONFIG}, or keep it as it is"
    )


def check_no_memories(model: MoezooForCausalLM) -> None:
    """Refuse a model that has layers beside its feed-forward blocks.

    Raises:
        InputError: names the first, which no stock architecture has.
    """
    for number, block in enumerate(model.model.blocks()):
        for layer in block.memories:
            raise InputError(
                f"checkpoint: layer {number} has {type(layer).__name__} beside its block "
                "(memory), in no stock format; keep it as it is"
            )


def _block(model: MoezooForCausalLM) -> tuple[int, str, bool]:
    """Return width, activation and bias of the blocks, if they are what stock models have."""
    blocks = [layer.mlp for layer in model.model.layers]
    for number, block in enumerate(blocks):
        if not isinstance(block, DenseFFN):
            kind = type(block).__name__
            raise InputError(f"checkpoint: layer {number} is a {kind}; only dense models are stock")
        if block.glu != PLAIN_GLU:
            raise InputError(
                f"checkpoint: layer {number} bounds its gated linear units (glu); the stock "
                "architectures have no such option, so keep it as it is"
            )
        if block.activation_up is not None:
            raise InputError(
                f"checkpoint: layer {number} has a ReLU on both factors (activation_up); the stock "
                "architectures have none, so keep it as it is"
            )
        if not block.gated or _form(block) != _form(blocks[0]):
            raise InputError(
                f"checkpoint: layer {number} is not gated, or unlike the first; stock models have "
                "the same gated block everywhere"
            )
    theirs = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    return blocks[0].d_ff, theirs[blocks[0].activation], blocks[0].bias


def _form(block: DenseFFN) -> dict[str, Any]:
    """Return a block's options but for how its matrices are stored."""
    return {k: v for k, v in block.config()["init_args"].items() if k != "matrices"}


def _candidates(
    config: MoezooConfig, width: int, activation: str, bias: bool
) -> Iterator[PreTrainedConfig]:
    same = {name: getattr(config, name) for name in _SAME}
    # No field of theirs: it stands in config.json for readers that know it.
    more = {} if config.trained_length is None else {"trained_length": config.trained_length}
    own: dict[str, dict[str, Any]] = {
        "llama": {"mlp_bias": bias},
        "mistral": {},
        "qwen2": {"use_sliding_window": config.sliding_window is not None},
        "qwen3": {"use_sliding_window": config.sliding_window is not None},
        "stablelm": {
            "layer_norm_eps": config.rms_norm_eps,
            "use_qkv_bias": config.attention_bias,
            "use_parallel_residual": config.parallel == "one_norm",
            "rope_parameters": {"partial_rotary_factor": 1.0, **config.rope_parameters},
        },
    }
    for name in _STOCK:
        if bias and name != "llama":
            continue
        kind = DENSE_CONFIGS[name]
        known = {key: value for key, value in same.items() if hasattr(kind, key)}
        make: Callable[..., PreTrainedConfig] = kind
        yield make(intermediate_size=width, hidden_act=activation, **{**known, **own[name]}, **more)


def _comparable(config: MoezooConfig) -> dict[str, Any]:
    """Return the fields that matter; the blocks are compared where they are built."""
    return {key: value for key, value in config.to_dict().items() if key not in _NAMELESS}
