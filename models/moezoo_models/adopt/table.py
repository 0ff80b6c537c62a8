"""Which mixture blocks of transformers a SparseMoE can hold: what each is made of, by class.

Read in the source of transformers 5.23.0, ``models/FAMILY/modeling_FAMILY.py``. What the rows say
is tried out at every adoption (:mod:`moezoo_models.adopt.trial`), so that a release which changes
one is refused and not believed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moezoo_models.adopt.block import Block

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
    Block(
        "ernie4_5_vl_moe",
        "Ernie4_5_VLMoeSparseMoeBlock",
        "Ernie4_5_VLMoeMoeTopKRouter",
        "Ernie4_5_VLMoeMoeExperts",
        "ernie",
        bias="gate.moe_statics.e_score_correction_bias",
        second=0,
        in_one_row=True,
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
        table="gate.tid2eid",
        table_router="DeepseekV4HashRouter",
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
        unread=("router.classifier.bias",),
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
    Block(
        "dbrx",
        "DbrxFFN",
        "DbrxRouter",
        "DbrxExperts",
        "dbrx",
        layout="dbrx",
        router_at="router",
        weight="router.layer.weight",
        unit_at="experts.mlp",
        width_at=("experts.ffn_hidden_size", "experts.mlp.ffn_hidden_size"),
    ),
    Block(
        "switch_transformers",
        "SwitchTransformersSparseMLP",
        "SwitchTransformersTop1Router",
        "SwitchTransformersExperts",
        "switch",
        layout="switch",
        router_at="router",
        weight="router.classifier.weight",
        more=(("bias", "router.classifier.bias"),),
        unit_at="experts.expert_0",
        flat=False,
    ),
    Block(
        "zaya",
        "ZayaSparseMoeBlock",
        "ZayaRouter",
        "ZayaExperts",
        "zaya",
        weight="gate.router_mlp.out_proj.weight",
        reads="gate.down_proj.weight",
        bias="gate.balancing_biases",
        more=(
            ("mlp.down.weight", "gate.down_proj.weight"),
            ("mlp.down.bias", "gate.down_proj.bias"),
            ("mlp.state_scale", "gate.router_states_scale"),
            ("mlp.norm_scale", "gate.router_mlp.norm.weight"),
            ("mlp.fc1.weight", "gate.router_mlp.fc1.weight"),
            ("mlp.fc1.bias", "gate.router_mlp.fc1.bias"),
            ("mlp.fc2.weight", "gate.router_mlp.fc2.weight"),
            ("mlp.fc2.bias", "gate.router_mlp.fc2.bias"),
        ),
        skips=True,
        carries=True,
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
