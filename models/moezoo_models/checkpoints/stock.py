"""Stock models of transformers, loaded as they are and run as ours are.

A mixture's experts are computed by the kernels here, and linear maps by the library that multiplies
faster; the rest is transformers' own.

The models that `moezoo upcycle`, `carve` and `export` write, and the dense ones they start from,
keep transformers' classes and names: trained here and saved, they load in unmodified transformers
again.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from moezoo.errors import InputError
from moezoo.fast_products import use_fast_products
from moezoo.routing import RouterOptions
from moezoo.routing.choose import within_groups
from moezoo.routing.stats import expert_counts, mean_entropy
from moezoo.stock_experts import IMPLEMENTATION
from moezoo_models.checkpoints.dense import DENSE_CONFIGS, MIXTURES, older_names
from moezoo_models.checkpoints.directory import (
    CONFIG,
    choose_tokenizer,
    existing,
    load_checkpoint,
    load_with_tokenizer,
    quiet,
    read_json,
    read_tokenizer,
)
from moezoo_models.checkpoints.dtypes import choose_dtype
from moezoo_models.checkpoints.mapped import opened_as_views
from moezoo_models.families.unknown import instead
from moezoo_models.files.gate import (
    Admitted,
    admit,
    check_model,
    is_pickled,
    keep_generation,
    told,
)
from moezoo_models.model.attention_backends import check_backend
from moezoo_models.model.causal_lm import MoezooForCausalLM
from moezoo_models.model.config import MoezooConfig
from moezoo_models.model.head import next_token_loss
from moezoo_models.model.outputs import MoezooOutput
from moezoo_models.text.tokenizer import Tokenizer

DENSE = tuple(DENSE_CONFIGS)
"""Dense architectures of transformers that are trained and run here, by ``model_type``."""


def load_as_it_is(
    path: str | Path,
    device: str | torch.device = "cpu",
    attention: str | None = None,
    dtype: str | None = None,
) -> tuple[PreTrainedModel, Tokenizer | None]:
    """Load a checkpoint of ours as ours, and a stock one as transformers has it.

    Args:
        path: the directory.
        device: where to put the model.
        attention: attention backend; default sdpa.
        dtype: of the weights, as for :func:`moezoo_models.checkpoints.dtypes.choose_dtype`;
            default: the one they were saved in.

    Returns:
        The model in evaluation mode, and the tokenizer, or None if the directory holds none.

    Raises:
        InputError: no checkpoint there, a damaged or quantised one, one of another architecture, or
            one whose weights do not fit its config.json.
    """
    directory = existing(Path(path))
    if read_json(directory / CONFIG).get("model_type") == MoezooConfig.model_type:
        return load_checkpoint(directory, device, attention, dtype)
    check_backend(attention)
    model = load_stock(directory, attention, dtype=dtype, device=device)
    return model.to(device), read_tokenizer(directory)  # type: ignore[arg-type]


def load_any_with_tokenizer(
    path: str | Path,
    tokenizer: str | Path | None = None,
    device: str | torch.device = "cpu",
    attention: str | None = None,
    dtype: str | None = None,
) -> tuple[PreTrainedModel, Tokenizer]:
    """Load a model for text: as ours where that is possible, else as transformers has it.

    Args:
        path: the directory.
        tokenizer: directory of the tokenizer, or ``"hf:NAME"``; default: the checkpoint's own.
        device: where to put the model.
        attention: attention backend; default sdpa.

    Returns:
        The model in evaluation mode, in the dtype it was saved in, and the tokenizer.

    Raises:
        InputError: as :func:`load_as_it_is`; or there is no tokenizer.
    """
    kind = read_json(existing(Path(path)) / CONFIG).get("model_type")
    if kind in [MoezooConfig.model_type, *DENSE_CONFIGS]:
        return load_with_tokenizer(path, tokenizer, device, attention, dtype)
    model, own = load_as_it_is(path, device, attention, dtype)
    return model, choose_tokenizer(path, tokenizer, own)


def load_stock(
    directory: Path,
    attention: str | None = None,
    pickled: bool = False,
    dtype: str | None = None,
    device: str | torch.device = "cpu",
    sound: bool = False,
) -> PreTrainedModel:
    """Load a directory with transformers, for evaluation; a mixture's experts run by our kernels.

    Args:
        directory: the checkpoint.
        attention: attention backend; default sdpa.
        pickled: where there are no safetensors, let transformers unpickle tensors and nothing else.
        dtype: of the weights, as for :func:`load_as_it_is`.
        device: where the model will be put.
        sound: this process has looked at the checksums and the numbers of its files: not again.
            Safetensors are then mapped, not copied, for a model that is only read.

    Raises:
        InputError: weights are missing, unexpected or of another shape, or transformers refuses
            the configuration.
    """
    with warnings.catch_warnings():
        # An absent shared expert is, in stock architectures, one without neurons.
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
        admitted = admit(
            directory,
            stock_config,
            _build,
            renamed=True,
            pickled=pickled,
            sealed=not sound,
            layout=older_names,
        )
        config = admitted.config
        kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        mapped = sound and not is_pickled(admitted.files[0])
        opened = opened_as_views if mapped else Admitted.opened
        with quiet(), told(directory), opened(admitted) as tensors:
            model, problems = kind.from_pretrained(
                None,
                config=config,
                state_dict=tensors,
                dtype=choose_dtype(admitted, dtype, device),
                generation_config=admitted.generation,
                attn_implementation=attention,
                output_loading_info=True,
                trust_remote_code=False,
            )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(str(name) for name in problems[problem]):
            raise InputError(f"checkpoint: {problem.replace('_', ' ')} in {directory}: {names[0]}")
    model.name_or_path = model.config.name_or_path = str(directory)
    keep_generation(model, admitted)
    if not sound:
        check_model(model, directory)
    if config.model_type in MIXTURES:
        model.set_experts_implementation(IMPLEMENTATION)
    use_fast_products(model)
    return cast(PreTrainedModel, model.eval())


def stock_config(raw: Mapping[str, Any]) -> PreTrainedConfig:
    """Make transformers' configuration of a ``config.json`` of an architecture that is run here.

    Args:
        raw: its parsed contents.

    Raises:
        InputError: it is of another architecture.
    """
    kind = str(raw.get("model_type"))
    if kind not in (*DENSE, *MIXTURES):
        known = (MoezooConfig.model_type, *DENSE, *MIXTURES)
        raise InputError(f"model_type: '{kind}' cannot be loaded{instead(kind, known)}")
    return CONFIG_MAPPING[kind].from_dict(dict(raw))


def _build(config: PreTrainedConfig) -> PreTrainedModel:
    return cast(PreTrainedModel, AutoModelForCausalLM.from_config(config, trust_remote_code=False))


def predict(model: nn.Module, input_ids: Tensor, next_tokens: Tensor) -> MoezooOutput:
    """Compute the loss of a model, ours or transformers', as ours does; return no logits.

    A stock mixture's load-balancing loss is transformers' own, weighted by the
    ``router_aux_loss_coef`` of its configuration. It is taken over the choices of all layers
    together, so that one layer's imbalance may hide another's.

    Args:
        model: a causal language model.
        input_ids: ``(batch, sequence)`` int64.
        next_tokens: ``(batch, sequence)`` int64; -100 is left out.
    """
    if isinstance(model, MoezooForCausalLM):
        wanted: dict[str, Any] = {"shift_labels": next_tokens, "return_logits": False}
        return cast(MoezooOutput, model(input_ids=input_ids, use_cache=False, **wanted))
    config: Any = model.config
    mixture = config.model_type in MIXTURES
    asked = {"output_router_logits": True} if mixture else {}
    output = model(input_ids=input_ids, use_cache=False, **asked)
    lm_loss = next_token_loss(output.logits, next_tokens)
    losses: dict[str, Tensor] = {}
    balance = getattr(output, "aux_loss", None)
    coefficient = getattr(config, "router_aux_loss_coef", 0.0)
    if isinstance(balance, Tensor) and coefficient:
        losses["load_balancing"] = coefficient * balance
    return MoezooOutput(
        loss=sum(losses.values(), lm_loss),
        lm_loss=lm_loss,
        aux_losses=losses,
        ffn_stats=_statistics(model, output.router_logits) if mixture else (),
    )


def stacked_experts(model: nn.Module) -> dict[str, nn.Parameter]:
    """Find the weights ``(experts, out, in)`` of a stock mixture's routed experts, by name."""
    if getattr(getattr(model, "config", None), "model_type", None) not in MIXTURES:
        return {}
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3 and ".experts." in name
    }


def active_share(model: nn.Module) -> float:
    """Return the share of a stock mixture's routed experts that a token is routed to."""
    config: Any = model.config
    return float(config.num_experts_per_tok / next(iter(stacked_experts(model).values())).shape[0])


def flops_of_experts(model: nn.Module) -> int:
    """Count a token's forward FLOPs in a stock mixture's routers and routed experts."""
    experts = stacked_experts(model)
    if not experts:
        return 0
    chosen = sum(p.numel() for p in experts.values()) * active_share(model)
    stacks = sum(name.endswith("down_proj") for name in experts)
    count, width = next(p.shape[:2] for name, p in experts.items() if name.endswith("down_proj"))
    return round(2 * (chosen + stacks * count * width))


@torch.no_grad()
def _statistics(
    model: nn.Module, router_logits: tuple[Tensor, ...]
) -> tuple[dict[str, Tensor], ...]:
    """Count each block's choices from its logits ``(tokens, experts)``; nothing of dense blocks."""
    config: Any = model.config
    remaining = iter(router_logits)
    statistics: list[dict[str, Tensor]] = []
    for block in cast(Any, model).model.layers:
        if not any(parameter.ndim == 3 for parameter in block.parameters()):
            statistics.append({})
            continue
        logits = next(remaining).float()
        scores, grouped = logits, _groups(config)
        for name, bias in block.named_buffers():
            if name.endswith("e_score_correction_bias"):
                scores = logits.sigmoid() + bias
                grouped = replace(grouped, group_score="sum_of_two")
        chosen = within_groups(scores, grouped).topk(config.num_experts_per_tok, dim=-1).indices
        statistics.append(
            {
                "tokens": torch.tensor(len(logits), device=logits.device),
                "expert_counts": expert_counts(chosen, logits.shape[-1]),
                "router_entropy": mean_entropy(logits.softmax(-1), None),
            }
        )
    return tuple(statistics)


def _groups(config: Any) -> RouterOptions:
    """Return from which groups of experts a stock mixture's routers choose."""
    groups = getattr(config, "n_group", None) or 1
    if groups == 1 or getattr(config, "topk_method", None) == "greedy":
        return RouterOptions()
    return RouterOptions(num_groups=groups, top_groups=config.topk_group, group_score="max")
