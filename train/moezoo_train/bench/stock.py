"""Transformers' mixtures with the kernels or the decoder here, against its own implementations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moezoo.bench.case import Case, Package, Peer, Setting, Target
from moezoo.bench.end_to_end import Job, Task, timed
from moezoo_train.bench.training import stepping

_TRANSFORMERS = Package("transformers", "pip install 'moezoo[train]'")

# What each family calls the hidden width F, experts E and choices k, and what else it needs.
_FAMILIES: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "Mixtral": (
        {"F": "intermediate_size", "E": "num_local_experts", "k": "num_experts_per_tok"},
        {},
    ),
    "Qwen3Moe": (
        {"F": "moe_intermediate_size", "E": "num_experts", "k": "num_experts_per_tok"},
        {"norm_topk_prob": True},
    ),
    "Glm4Moe": (
        {"F": "moe_intermediate_size", "E": "n_routed_experts", "k": "num_experts_per_tok"},
        {"first_k_dense_replace": 1},
    ),
}


@dataclass(frozen=True)
class Stock:
    """What all sides are given: a model by its configuration and weights, and token ids."""

    family: str
    options: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    input_ids: Tensor
    new: int = 0

    def model(self, implementation: str) -> Any:
        """Build the model, with a given implementation of experts."""
        import transformers

        import moezoo

        moezoo.register_experts()
        config = getattr(transformers, f"{self.family}Config")(**self.options)
        model = getattr(transformers, f"{self.family}ForCausalLM")(config)
        if self.weights:
            model.load_state_dict(self.weights)
        model.set_experts_implementation(implementation)
        return model

    def training(self, implementation: str) -> Job:
        """Return the job of a training step."""
        model = self.model(implementation)

        def loss() -> Tensor:
            ids = self.input_ids
            found: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
            return found

        return stepping(model, loss)

    def decoded(self, implementation: str) -> Job:
        """Return the job of a greedy reply by the decoder here; prompts go by its model, too."""
        from moezoo_models.decoding.tokens import continue_tokens

        model = self.model(implementation).eval()
        ids, new = self.input_ids, self.new

        def written() -> Tensor:
            return continue_tokens(model, ids, max_new_tokens=new)[:, ids.shape[1] :]

        return Job(timed(written), lambda: {"the tokens": written()})

    def reply(self, implementation: str) -> Job:
        """Return the job of a greedy reply."""
        from transformers import GenerationConfig

        model = self.model(implementation).eval()
        ids, new = self.input_ids, self.new
        config = GenerationConfig(
            max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
        )

        def written() -> Tensor:
            mask = torch.ones_like(ids)
            with torch.no_grad():
                found: Tensor = model.generate(ids, attention_mask=mask, generation_config=config)
            return found[:, ids.shape[1] :]

        return Job(timed(written), lambda: {"the tokens": written()})


def _build(setting: Setting, folder: Path, family: str, job: Callable[[Stock, str], Job]) -> Task:
    sizes = setting.sizes
    names, others = _FAMILIES[family]
    options = {
        "vocab_size": sizes["V"],
        "hidden_size": sizes["d"],
        "num_hidden_layers": sizes["L"],
        "num_attention_heads": sizes["H"],
        "num_key_value_heads": sizes["H"],
        "head_dim": sizes["d"] // sizes["H"],
        "max_position_embeddings": 1024,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **{name: sizes[size] for size, name in names.items()},
        **others,
    }
    replying = "N" in sizes
    shape = (sizes["B"], sizes["P"] if replying else sizes["S"])
    parts = Stock(family, options, {}, torch.randint(sizes["V"], shape), sizes.get("N", 0))
    model = parts.model("eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # fresh ones are so small that every token is the likeliest
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    parts = replace(parts, weights={k: v.clone() for k, v in model.state_dict().items()})
    return Task(job(parts, "moezoo"), parts, sizes.get("N", 1), 2e-5 if replying else 2e-4)


_SIZES = {"V": 4096, "d": 256, "L": 4, "H": 8}
_QUICK = {"V": 64, "d": 32, "L": 2, "H": 2, "F": 24, "E": 4, "k": 2}
# The experts' width over the model's, and their number, as in models of the family.
_EXPERTS = {
    "Mixtral": {"F": 896, "E": 8, "k": 2},
    "Qwen3Moe": {"F": 96, "E": 64, "k": 8},
    "Glm4Moe": {"F": 88, "E": 64, "k": 8},
}


_KINDS: dict[str, tuple[str, Callable[..., Job], Callable[..., Job]]] = {
    "train": ("training step", Stock.training, Stock.training),
    "decode": ("greedy reply", Stock.reply, Stock.reply),
    "reply": ("greedy reply by our decoder", Stock.decoded, Stock.reply),
}
"""What is measured, by the word in a case's name: in words, what ours does, and what others do."""


def _case(family: str, kind: str) -> Case:
    title, ours, theirs = _KINDS[kind]
    replying = kind != "train"
    work = {"B": 1, "P": 16, "N": 32} if replying else {"B": 4, "S": 256}
    quick = {"B": 1, "P": 4, "N": 4} if replying else {"B": 2, "S": 8}
    target = Target(forward=1.5 if replying else 1.2)
    others = ("grouped_mm", "eager", "batched_mm") if replying else ("grouped_mm", "eager")
    return Case(
        f"stock-{kind}-{family.lower()}",
        "end-to-end",
        f"transformers' {family}, {title}",
        {**work, **_SIZES, **_EXPERTS[family]},
        {**quick, **_QUICK},
        partial(_build, family=family, job=ours),
        {
            f"transformers, {name}": Peer(
                partial(theirs, implementation=name), _TRANSFORMERS, target=target
            )
            for name in others
        },
        unit="ms/token" if replying else "ms",
    )


CASES = [_case(family, kind) for kind in _KINDS for family in _EXPERTS]
