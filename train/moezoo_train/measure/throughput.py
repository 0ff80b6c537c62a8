"""How much arithmetic a token takes, and how much the machine can do.

Model FLOPs utilisation (PaLM, arXiv:2204.02311, appendix B) is the first times tokens per second
over the second. The matrix products of the model are counted, attention with its full square;
recomputation under activation checkpointing is not. On a CPU the second is what one product of
square matrices reached in the run's dtype when the run began: a share of that, not of a data sheet.
"""

from __future__ import annotations

import itertools
import time
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from moezoo import FeedForward
from moezoo_kernels.linear import multiply
from moezoo_models.checkpoints.stock import active_share, flops_of_experts, stacked_experts
from moezoo_models.model.latent_options import head_widths
from moezoo_models.model.mixture_attention import MixtureAttention
from moezoo_train.adapters.deepspeed import full_shape
from moezoo_train.finetune.parts import is_added
from moezoo_train.parallel.state_dicts import unsharded_model

PROBE_SECONDS = 0.1
"""Seconds for measuring a CPU; the product that ends it may exceed this by its own time."""

# Dense (not 2:4 sparse) tensor-core peaks in FLOP/s from the vendors' data sheets, for bf16.
PEAK_BF16 = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def forward_flops_per_token(model: PreTrainedModel, sequence_length: int) -> int:
    """Count the forward pass of one token in a sequence: a multiply-add is two operations.

    Adapters are not counted.
    """
    model = unsharded_model(model)
    layers = ffn_layers(model)
    inside = {id(m) for layer in layers for m in layer.modules()}
    linear = sum(
        2 * module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module) not in inside and not is_added(name)
    )
    config: Any = model.config
    mixing = _mixing_attention(model)
    usual = config.num_hidden_layers - len(mixing)
    attention = 2 * usual * config.num_attention_heads * sum(head_widths(config)) * sequence_length
    attention += sum(module.flops_per_token(sequence_length) for module in mixing)
    ffn = sum(layer.cost().flops_per_token for layer in layers)
    return linear + attention + ffn + flops_of_experts(model)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return how many parameters a model has, and how many of them one token touches.

    What fine-tuning adds to weights that stay, adapters and slices of neurons, is not counted: the
    model that is written has it in its weights.
    """
    model = unsharded_model(model)
    added = {id(p) for name, p in model.named_parameters() if is_added(name)}
    total = sum(p.numel() for p in model.parameters() if id(p) not in added)
    costs = [layer.cost() for layer in ffn_layers(model)]
    idle = sum(c.total_parameters - c.active_parameters for c in costs)
    idle += sum(module.idle_parameters() for module in _mixing_attention(model))
    if experts := stacked_experts(model):
        stored = sum(p.numel() for p in experts.values())
        idle += stored - round(stored * active_share(model))
    return total, total - idle


def count_trained(model: nn.Module) -> int:
    """Return how many numbers are trained: all of the parameters, or those that are not frozen."""
    return sum(full_shape(p).numel() for p in model.parameters() if p.requires_grad)


def _mixing_attention(model: nn.Module) -> list[MixtureAttention]:
    return [module for module in model.modules() if isinstance(module, MixtureAttention)]


def ffn_layers(model: nn.Module) -> list[FeedForward]:
    """Return the FFN layers of a model in order, without the layers inside them.

    Those that blocks have beside their FFN come last.
    """
    found: list[FeedForward] = []
    beside: list[FeedForward] = []
    inside: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, FeedForward) and id(module) not in inside:
            (beside if ".memories." in f".{name}" else found).append(module)
            inside.update(id(m) for m in module.modules())
    return [*found, *beside]


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Return what the device can do per second in matrix products of a dtype, and its source.

    Known GPUs in half precision are looked up; everything else is measured with one square
    matrix product, the best of several. On a CPU these begin small and grow up to 1,024³ while that
    takes a tenth of a second: there are CPUs that need seconds for a product of that size in bf16.
    """
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        name = torch.cuda.get_device_name(device)
        for known, peak in PEAK_BF16.items():
            if known in name:
                return peak, f"{known} data sheet"
    measure = _measure_cpu if device.type == "cpu" else _measure_accelerator
    return measure(device, dtype), "measured matmul"


def _measure_accelerator(device: torch.device, dtype: torch.dtype) -> float:
    size = 8192 if device.type == "cuda" else 1024
    return 2 * size**3 / min(_product_seconds(device, dtype, size) for _ in range(6))


def _measure_cpu(device: torch.device, dtype: torch.dtype) -> float:
    _product_seconds(device, dtype, 64)  # the first of all sets libraries up
    best = spent = 0.0
    # Twice each, as the first of a size may compile its kernel; more of the smallest, which decide
    # whether to go on: on a busy machine some have to wait for longer than they take.
    for size in itertools.chain([64] * 8, (128, 128, 256, 256, 512, 512), [1024] * 6):
        flops = 2 * size**3
        # A product of twice the size takes eight times as long, or less.
        if size > 64 and spent + flops / best > PROBE_SECONDS:
            break
        best = max(best, flops / _product_seconds(device, dtype, size))
        spent += flops / best  # without what it has waited
    return best


def _product_seconds(device: torch.device, dtype: torch.dtype, size: int) -> float:
    # Constants, not random numbers: the run's random state stays as it is.
    left = torch.full((size, size), 0.5, device=device, dtype=dtype)
    right = torch.full((size, size), 0.25, device=device, dtype=dtype)
    start = _now(device)
    multiply(left, right)
    return _now(device) - start


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
