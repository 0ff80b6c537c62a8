"""Which mixture blocks of transformers a SparseMoE can hold: what each is made of, by class.

Read in the source of transformers 5.23.0, ``models/FAMILY/modeling_FAMILY.py``. What the rows say
is tried out at every adoption (:mod:`moezoo_models.adopt.trial`), so that a release which changes
one is refused and not believed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

VERSION = "5.23.0"
"""The release of transformers in whose source the table was read."""


@dataclass(frozen=True)
class Block:
    """A class of mixture blocks.

    Attributes:
        family: folder of its file.
        name: its class.
        router: class of its router.
        experts: class of its experts.
        convention: a key of :data:`moezoo_models.adopt.conventions.CONVENTIONS`.
        layout: a key of :data:`moezoo_models.adopt.layouts.LAYOUTS`.
        unit: a key of :data:`moezoo_models.adopt.units.UNITS`.
        router_at: name of the router within the block.
        weight: the router's weight, ``(E, D)``, within the block.
        experts_at: name of the experts within the block.
        bias: the selection bias within the block, if the convention has one.
        more: other tensors of the router: ours in :class:`moezoo.routing.Router`, and theirs.
        shared: name of the shared expert, which a configuration may leave out.
        shared_unit: of the shared expert, where it differs.
        latent: names of the linear maps between which the experts work, if there are any.
        norms: names of the norms of what experts read and of what each returns, if there are any.
        shared_form: a key of :data:`moezoo_models.adopt.layouts.SHARED`.
        shared_gate: name of the linear map whose sigmoid weighs the shared expert.
        passed: attributes of the block that its router is called with, after hidden states.
        flat: whether its router is called with ``(T, D)``; else with ``(B, T, D)``.
        after: name of a module that the block applies to the sum.
        added: name of a bias ``(D,)`` that the block adds to the sum.
        second: which output of its router the block returns beside hidden states, if any.
        flattened: whether it returns hidden states as ``(T, D)``.
        in_layer: whether it is a decoder layer, which runs router and experts itself.
    """

    family: str
    name: str
    router: str
    experts: str
    convention: str
    layout: str = "stacked"
    unit: str = "plain"
    router_at: str = "gate"
    weight: str = "gate.weight"
    experts_at: str = "experts"
    bias: str | None = None
    more: tuple[tuple[str, str], ...] = ()
    shared: str | None = None
    shared_form: str = "linears"
    shared_unit: str | None = None
    latent: tuple[str, str] | None = None
    norms: tuple[str, str] | None = None
    shared_gate: str | None = None
    passed: tuple[str, ...] = ()
    flat: bool = True
    after: str | None = None
    added: str | None = None
    second: int | None = None
    flattened: bool = False
    in_layer: bool = False

    @property
    def path(self) -> str:
        """Module path and name of the class."""
        return f"{module_of(self.family)}.{self.name}"


def module_of(family: str) -> str:
    """Return the module path of a family's file."""
    return f"transformers.models.{family}.modeling_{family}"


def path_of(module: Any) -> str:
    """Return module path and name of an object's class."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


_BIAS = "gate.e_score_correction_bias"


def _softmax(family: str, prefix: str, **changes: Any) -> Block:
    names = (f"{prefix}SparseMoeBlock", f"{prefix}TopKRouter", f"{prefix}Experts")
    return Block(family, *names, **{"convention": "softmax", **changes})


def _granite(family: str, prefix: str) -> Block:
    names = (f"{prefix}MoE", f"{prefix}TopKRouter", f"{prefix}Experts")
    at = {"router_at": "router", "weight": "router.weight"}
    return Block(family, *names, "top_k_softmax", **at)  # type: ignore[arg-type]


def _grouped(family: str, prefix: str, **changes: Any) -> Block:
    names = (f"{prefix}MoE", f"{prefix}TopkRouter", f"{prefix}Experts")
    arguments = {"convention": "sigmoid_groups", "bias": _BIAS, "shared": "shared_experts"}
    return Block(family, *names, **(arguments | changes))


_GATED = {"shared": "shared_expert", "shared_gate": "shared_expert_gate"}
_TALKER = "Qwen3OmniMoeTalkerText"
_THINKER = "Qwen3OmniMoeThinkerText"

BLOCKS = (
    _softmax("flex_olmo", "FlexOlmo"),
    _softmax("mellum", "Mellum"),
    _softmax("minimax", "MiniMax"),
    _softmax("mixtral", "Mixtral"),
    _softmax("olmoe", "Olmoe"),
    _softmax("qwen2_moe", "Qwen2Moe", **_GATED),
    _softmax("qwen3_5_moe", "Qwen3_5Moe", **_GATED),
    _softmax("qwen3_moe", "Qwen3Moe"),
    _softmax("qwen3_next", "Qwen3Next", **_GATED),
    _softmax("qwen3_omni_moe", _TALKER, **_GATED),
    _softmax("qwen3_omni_moe", _THINKER),
    _softmax("qwen3_vl_moe", "Qwen3VLMoeText"),
    _softmax("qwen4_exp", "Qwen4ExpText", **_GATED),
    Block(
        "hunyuan_v1_moe",
        "HunYuanMoEV1Moe",
        "HunYuanMoEV1Gate",
        "HunYuanMoEV1Experts",
        "softmax",
        weight="gate.wg.weight",
        shared="shared_mlp",
    ),
    _softmax(
        "jamba", "Jamba", convention="softmax_raw", router_at="router", weight="router.weight"
    ),
    _granite("granitemoe", "GraniteMoe"),
    _granite("granitemoe_swa", "GraniteMoeSWA"),
    _granite("granitemoehybrid", "GraniteMoeHybrid"),
    _granite("granitemoeshared", "GraniteMoeShared"),
    Block(
        "aria",
        "AriaTextMoELayer",
        "AriaTextTopKRouter",
        "AriaExperts",
        "top_k_softmax",
        layout="transposed",
        router_at="router",
        weight="router.weight",
        shared="shared_experts",
    ),
    _softmax("cohere2_moe", "Cohere2Moe", convention="cohere", shared="shared_experts"),
    *(
        Block(
            family,
            f"{prefix}Moe",
            f"{prefix}TopkRouter",
            f"{prefix}Experts",
            "softmax_groups",
            shared="shared_experts",
        )
        for family, prefix in (
            ("deepseek_ocr2", "DeepseekOcr2Text"),
            ("deepseek_v2", "DeepseekV2"),
            ("unlimited_ocr", "UnlimitedOcrText"),
        )
    ),
    _grouped("mistral4", "Mistral4", convention="softmax_group_pairs", bias=None),
    _grouped("mistral_large4", "MistralLarge4Text", convention="softmax_group_pairs", bias=None),
    _grouped("axk1", "AXK1", after="post_mlp_layernorm"),
    _grouped("bailing_hybrid", "BailingHybrid"),
    _grouped("deepseek_v3", "DeepseekV3"),
    _grouped("deepseek_v32", "DeepseekV32"),
    _grouped("dots1", "Dots1"),
    replace(_grouped("dots3_note", "Dots3NoteText"), experts="Dots3NoteExperts"),
    replace(_grouped("exaone_moe", "ExaoneMoe"), name="ExaoneMoeSparseMoEBlock"),
    _grouped("glm4_moe", "Glm4Moe"),
    _grouped("glm4_moe_lite", "Glm4MoeLite"),
    _grouped("glm4v_moe", "Glm4vMoeText"),
    _grouped("glm_moe_dsa", "GlmMoeDsa"),
    _grouped("kimi_linear", "KimiLinear"),
    _grouped("mimo_v2_flash", "MiMoV2Flash", shared=None),
    _grouped(
        "nemotron_h",
        "NemotronH",
        layout="ungated",
        shared_form="ungated",
        latent=("fc1_latent_proj", "fc2_latent_proj"),
    ),
    _grouped(
        "muse_spark",
        "MuseSpark",
        convention="muse",
        shared=None,
        latent=("pre_expert_proj", "post_expert_proj"),
        norms=("pre_expert_norm", "experts.post_expert_norm"),
    ),
    _grouped("glm5_next", "Glm5NextText", unit="limited_silu"),
    _grouped("hy_v4", "HYV4", unit="limited_silu", shared_unit="plain"),
    _grouped("solar_open", "SolarOpen"),
    replace(_grouped("beam", "Beam", shared=None), router="BeamTopKRouter"),
    Block(
        "afmoe",
        "AfmoeSparseMoeBlock",
        "AfmoeTokenChoiceRouter",
        "AfmoeExperts",
        "sigmoid_bias_eps",
        router_at="router",
        weight="router.gate.weight",
        bias="expert_bias",
        shared="shared_experts",
        passed=("expert_bias",),
        flat=False,
    ),
    Block(
        "dots3_note",
        "Dots3NoteVisionMoE",
        "Dots3NoteVisionTopKRouter",
        "Dots3NoteExperts",
        "sigmoid_bias_eps",
        bias="e_score_correction_bias",
        passed=("e_score_correction_bias",),
    ),
    Block(
        "hy_v3",
        "HYV3MoE",
        "HYV3TopKRouter",
        "HYV3Experts",
        "sigmoid_bias_eps",
        bias="e_score_correction_bias",
        shared="shared_experts",
        passed=("e_score_correction_bias",),
    ),
    _softmax(
        "minimax_m2",
        "MiniMaxM2",
        convention="sigmoid_bias",
        bias="e_score_correction_bias",
        passed=("e_score_correction_bias",),
    ),
    _softmax("flint", "Flint", convention="sigmoid", shared="shared_expert"),
    _grouped("axk2", "AXK2", convention="sigmoid_groups_zero"),
    _softmax(
        "ernie4_5_moe",
        "Ernie4_5_Moe",
        convention="ernie",
        bias="gate.moe_statics.e_score_correction_bias",
        shared="shared_experts",
    ),
    _softmax(
        "lfm2_moe",
        "Lfm2Moe",
        convention="lfm",
        bias="expert_bias",
        passed=("expert_bias",),
    ),
    _softmax("laguna", "Laguna", convention="laguna", bias=_BIAS, shared="shared_experts"),
    _softmax("kolibri1", "Kolibri1", convention="kolibri", bias=_BIAS, shared="shared_experts"),
    Block(
        "jetmoe",
        "JetMoeMoE",
        "JetMoeTopKGating",
        "JetMoeParallelExperts",
        "top_k_softmax",
        layout="jetmoe",
        router_at="router",
        experts_at="input_linear",
        weight="router.layer.weight",
        added="bias",
    ),
    Block(
        "inkling",
        "InklingMoE",
        "InklingTopkRouter",
        "InklingExperts",
        "inkling",
        bias=_BIAS,
        more=(("learned_scale", "gate.global_scale"),),
        shared="shared_experts",
        shared_form="stacked",
    ),
    Block(
        "llama4",
        "Llama4TextMoe",
        "Llama4Router",
        "Llama4TextExperts",
        "llama4",
        layout="transposed",
        router_at="router",
        weight="router.weight",
        shared="shared_expert",
        second=1,
        flattened=True,
    ),
    Block(
        "gpt_oss",
        "GptOssMLP",
        "GptOssTopKRouter",
        "GptOssExperts",
        "biased_softmax",
        layout="interleaved",
        unit="shifted",
        router_at="router",
        weight="router.weight",
        more=(("bias", "router.bias"),),
        second=1,
    ),
    Block(
        "openai_privacy_filter",
        "OpenAIPrivacyFilterMLP",
        "OpenAIPrivacyFilterTopKRouter",
        "OpenAIPrivacyFilterExperts",
        "biased_softmax",
        layout="biased",
        unit="shifted",
        router_at="router",
        weight="router.weight",
        more=(("bias", "router.bias"),),
        second=1,
    ),
    _softmax(
        "minimax_m3_vl",
        "MiniMaxM3VL",
        convention="sigmoid_bias",
        bias=_BIAS,
        unit="shifted",
        shared="shared_experts",
        shared_form="fused",
    ),
    _softmax(
        "step3p7",
        "Step3p7",
        convention="sigmoid_bias",
        bias=_BIAS,
        unit="limited_after",
        shared="shared_experts",
    ),
    Block(
        "deepseek_v4",
        "DeepseekV4SparseMoeBlock",
        "DeepseekV4TopKRouter",
        "DeepseekV4Experts",
        "named_score",
        bias=_BIAS,
        unit="limited",
        shared="shared_experts",
    ),
    Block(
        "inkling2",
        "Inkling2SparseMoeBlock",
        "Inkling2TopKRouter",
        "Inkling2Experts",
        "named_score",
        bias=_BIAS,
        unit="capped",
    ),
    Block(
        "longcat_flash",
        "LongcatFlashMoE",
        "LongcatFlashTopkRouter",
        "LongcatFlashExperts",
        "longcat",
        layout="longcat",
        router_at="router",
        weight="router.classifier.weight",
        bias="router.e_score_correction_bias",
    ),
    *(
        Block(
            family,
            f"{prefix}Layer",
            f"{router}Router",
            f"{router}Experts",
            "gemma",
            router_at="router",
            weight="router.proj.weight",
            more=(("input_scale", "router.scale"), ("expert_scale", "router.per_expert_scale")),
            in_layer=True,
        )
        for family, prefix, router in (
            ("gemma4", "Gemma4TextDecoder", "Gemma4Text"),
            ("diffusion_gemma", "DiffusionGemmaDecoderText", "DiffusionGemmaText"),
            ("diffusion_gemma", "DiffusionGemmaEncoderText", "DiffusionGemmaText"),
        )
    ),
    _softmax(
        "phimoe",
        "Phimoe",
        convention="mixer",
        router_at="router",
        weight="router.weight",
    ),
)
"""The blocks that are held."""

BY_CLASS = {block.path: block for block in BLOCKS}
