"""Why a stock format cannot hold a dense model's attention: each function names one reason."""

from __future__ import annotations

from moezoo_models.conversion.source import Source
from moezoo_models.conversion.targets.base import Target


def partial_rotary_factor(source: Source) -> float:
    """Return the share of each head that rotary positions turn."""
    return float(source.ours.rope_parameters.get("partial_rotary_factor", 1.0))


def partial_rotary_problem(target: Target, source: Source) -> str | None:
    """Name heads of which a part is turned where the target turns whole ones."""
    if (share := partial_rotary_factor(source)) == 1.0:
        return None
    return f"partial_rotary_factor: {target.name} turns whole heads, not {share:g} of each"


def positions_problem(target: Target, source: Source) -> str | None:
    """Name layers without rotary positions."""
    if not source.ours.nope_layers:
        return None
    return f"no_rope_layers: {target.name} has rotary positions in all layers"


def head_dim(source: Source) -> int:
    """Return the width of an attention head."""
    config = source.config
    derived = config.hidden_size // config.num_attention_heads
    return getattr(config, "head_dim", None) or derived


def attention_bias_problem(target: Target, source: Source) -> str | None:
    """Name a bias in attention's output, which few mixtures have."""
    if not getattr(source.config, "attention_bias", False):
        return None
    return (
        f"attention_bias: {target.name} has no bias in o_proj, and dropping it would change "
        "the model"
    )


def window_problem(target: Target, source: Source) -> str | None:
    """Name sliding windows where the target would attend to everything."""
    slides = "sliding_attention" in source.ours.layer_types
    return f"sliding_window: {target.name} attends to all positions" if slides else None


def head_dim_problem(target: Target, source: Source) -> str | None:
    """Name heads that do not add up to the model's width where the target derives theirs."""
    config = source.config
    if head_dim(source) == config.hidden_size // config.num_attention_heads:
        return None
    return f"head_dim: {target.name} derives it from hidden_size and num_attention_heads"
