"""Experts and shared experts of transformers' mixtures, weights copied: output and all gradients.

Experts get the same choices and weights as theirs, skewed: one expert has most tokens, one none.
Biases are not zero, and pre-activations go beyond the limits.
"""

import importlib

import pytest
import torch
from torch import nn

from moezoo import BalanceOptions, DenseFFN, GLUOptions, RouterOptions, SparseMoE
from moezoo.experts import MLPExperts

transformers = pytest.importorskip("transformers")

T, D, F, E, K = 63, 24, 18, 6, 3
ALIKE = {torch.float32: 1e-6, torch.float64: 1e-12}
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def _make(model: str, name: str, config: str, *arguments, **fields):
    """Build a part of one of transformers' models."""
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    owner = importlib.import_module(f"transformers.models.{model}.configuration_{model}")
    made = getattr(owner, config)(hidden_size=D, num_experts_per_tok=K, **fields)
    made._experts_implementation = "eager"
    return getattr(module, name)(made, *arguments)


def _draw(module: nn.Module, dtype: torch.dtype, scale: float) -> nn.Module:
    """Give every parameter values away from those of an initialization; first products are wide."""
    torch.manual_seed(0)
    module = module.to(dtype)
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            first = any(part in name for part in ("gate", "up_proj", "fc1"))
            wide = scale if first and "bias" not in name else 1.0
            tensor.copy_(torch.randn(tensor.shape).to(dtype) * wide * D**-0.5)
    return module


HALVES = {"gate_up_proj": "gate_up_proj", "down_proj": "down_proj"}
SIZES = {"num_local_experts": E, "intermediate_size": F}
FINE = {"num_local_experts": E, "moe_intermediate_size": F}

# Their class and configuration; our options; where pre-activations are bounded.
EXPERTS = {
    "gpt_oss": (
        lambda: _make("gpt_oss", "GptOssExperts", "GptOssConfig", **SIZES),
        {
            "activation": "quick_gelu",
            "glu": GLUOptions(limit=7.0, up_shift=1.0),
            "interleaved": True,
            "bias": True,
        },
        7.0,
    ),
    "openai_privacy_filter": (
        lambda: _make(
            "openai_privacy_filter",
            "OpenAIPrivacyFilterExperts",
            "OpenAIPrivacyFilterConfig",
            **SIZES,
        ),
        {"activation": "quick_gelu", "glu": GLUOptions(limit=7.0, up_shift=1.0), "bias": True},
        7.0,
    ),
    "minimax_m3": (
        lambda: _make("minimax_m3_vl", "MiniMaxM3VLExperts", "MiniMaxM3VLTextConfig", **SIZES),
        {"activation": "quick_gelu", "glu": GLUOptions(limit=7.0, up_shift=1.0)},
        7.0,
    ),
    "deepseek_v4": (
        lambda: _make("deepseek_v4", "DeepseekV4Experts", "DeepseekV4Config", **FINE),
        {"glu": GLUOptions(limit=10.0)},
        10.0,
    ),
    "glm5_next": (
        lambda: _make("glm5_next", "Glm5NextTextExperts", "Glm5NextTextConfig", **FINE),
        {"glu": GLUOptions(limit=10.0)},
        10.0,
    ),
    "hy_v4": (
        lambda: _make("hy_v4", "HYV4Experts", "HYV4Config", **FINE),
        {"glu": GLUOptions(limit=10.0)},
        10.0,
    ),
    "step3p7": (
        lambda: _make(
            "step3p7",
            "Step3p7Experts",
            "Step3p7TextConfig",
            7.0,
            n_routed_experts=E,
            moe_intermediate_size=F,
        ),
        {"glu": GLUOptions(limit=7.0, limit_after=True)},
        7.0,
    ),
    "inkling2": (
        lambda: _make(
            "inkling2",
            "Inkling2Experts",
            "Inkling2TextConfig",
            n_routed_experts=E,
            moe_intermediate_size=F,
        ),
        {"glu": GLUOptions(gate_softcap=4.0, up_softcap=25.0)},
        4.0,
    ),
    "nemotron_h": (
        lambda: _make(
            "nemotron_h",
            "NemotronHExperts",
            "NemotronHConfig",
            n_routed_experts=E,
            moe_intermediate_size=F,
        ),
        {"activation": "relu2", "gated": False},
        None,
    ),
}
# These compute between the products in fp32 whatever the dtype of the model.
IN_FP32 = {"inkling2", "openai_privacy_filter"}


def _ours(theirs: nn.Module, **options) -> tuple[MLPExperts, dict[str, nn.Parameter]]:
    """Return our experts with their weights, and whose gradient is to equal which of ours."""
    made = MLPExperts(D, F, E, **({"activation": "silu", "gated": True, "bias": False} | options))
    names = {"gate_up_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj"}
    names |= {"gate_up_proj_bias": "gate_up_bias", "down_proj_bias": "down_bias"}
    pairs = {names[name]: tensor for name, tensor in theirs.named_parameters()}
    made = made.to(next(theirs.parameters()).dtype)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.copy_(_as_ours(pairs[name], parameter))
    return made, pairs


def _as_ours(theirs: torch.Tensor, ours: torch.Tensor) -> torch.Tensor:
    """Transpose stacked matrices that are stored as (E, in, out)."""
    return theirs if theirs.shape == ours.shape else theirs.mT


def _routing(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return choices and weights of skewed logits; the last expert gets no token."""
    logits = torch.randn(T, E) + torch.linspace(3, -1, E)
    logits[:, -1] = -50.0
    weights, indices = logits.softmax(-1).topk(K)
    return indices, weights.to(dtype)


def _assert_alike(ours: list[torch.Tensor], theirs: list[torch.Tensor], bound: float) -> None:
    for place, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a.shape == b.shape, place
        assert b.any(), place
        assert (a - b).norm() <= bound * b.norm(), (place, float((a - b).norm() / b.norm()))


@BOTH
@pytest.mark.parametrize("name", EXPERTS)
def test_experts(name, dtype):
    make, options, limit = EXPERTS[name]
    theirs = _draw(make(), dtype, 2 * (limit or 1))
    ours, pairs = _ours(theirs, **options)
    hidden, direction = torch.randn(2, T, D, dtype=dtype)
    indices, weights = _routing(dtype)
    if limit is not None:
        first = torch.einsum("td,eid->tei", hidden, ours.gate_up_proj.detach())
        assert 0.05 < (first > limit).float().mean() < 0.5
    found = []
    calls = (
        (theirs, lambda x, w: theirs(x, indices, w)),
        (ours, lambda x, w: ours(x, indices, w, T * K)),
        (ours, lambda x, w: ours.reference(x, indices, w)),
    )
    for module, call in calls:
        x, w = hidden.clone().requires_grad_(), weights.clone().requires_grad_()
        output = call(x, w)
        names = [n for n, _ in ours.named_parameters()]
        parameters = [pairs[n] if module is theirs else getattr(ours, n) for n in names]
        gradients = torch.autograd.grad((output * direction).sum(), [x, w, *parameters])
        if module is theirs:
            for i, n in enumerate(names, start=2):
                gradients = (
                    *gradients[:i],
                    _as_ours(gradients[i], getattr(ours, n)),
                    *gradients[i + 1 :],
                )
        found.append([output.detach(), *gradients])
    bound = 1e-6 if name in IN_FP32 else ALIKE[dtype]
    _assert_alike(found[1], found[0], bound)
    _assert_alike(found[2], found[0], bound)


@BOTH
def test_decoding_reads_them_alike(dtype):
    theirs = _draw(EXPERTS["gpt_oss"][0](), dtype, 14.0)
    ours, _ = _ours(theirs, **EXPERTS["gpt_oss"][1])
    hidden = torch.randn(2, D, dtype=dtype)
    indices, weights = (part[:2] for part in _routing(dtype))
    with torch.no_grad():
        answer = ours.infer(hidden, indices, weights, 2 * K)
        _assert_alike([answer], [theirs(hidden, indices, weights)], ALIKE[dtype])


DENSE = {
    "deepseek_v4": (
        lambda: _make("deepseek_v4", "DeepseekV4MLP", "DeepseekV4Config", moe_intermediate_size=F),
        GLUOptions(limit=10.0),
    ),
    "glm5_next": (
        lambda: _make("glm5_next", "Glm5NextTextMLP", "Glm5NextTextConfig", intermediate_size=F),
        GLUOptions(limit=10.0),
    ),
    "hy_v4": (
        lambda: _make("hy_v4", "HYV4MLP", "HYV4Config", intermediate_size=F),
        GLUOptions(),
    ),
    "step3p7": (
        lambda: _make(
            "step3p7", "Step3p7MLP", "Step3p7TextConfig", 1, intermediate_size=F,
            swiglu_limits_shared=[None, 16.0],
        ),
        GLUOptions(limit=16.0, limit_after=True),
    ),
}  # fmt: skip


@BOTH
@pytest.mark.parametrize("name", DENSE)
def test_dense_blocks(name, dtype):
    make, glu = DENSE[name]
    theirs = _draw(make(), dtype, 2 * (glu.limit or 1.0))
    bias = theirs.up_proj.bias is not None
    ours = DenseFFN(D, F, glu=glu, bias=bias).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    hidden, direction = torch.randn(2, T, D, dtype=dtype)
    found = []
    for module, call in ((theirs, theirs), (ours, lambda x: ours(x).hidden)):
        x = hidden.clone().requires_grad_()
        output = call(x)
        parameters = [tensor for _, tensor in sorted(module.named_parameters())]
        gradients = torch.autograd.grad((output * direction).sum(), [x, *parameters])
        found.append([output.detach(), *gradients])
    _assert_alike(found[1], found[0], ALIKE[dtype])


NO_BALANCE = BalanceOptions(load_balancing=0.0)
BIASED = {"score": "sigmoid", "selection_bias": True}
GROUPS = {"n_group": 2, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5}
GROUPED = RouterOptions(**BIASED, scale=2.5, num_groups=2)
SHARED = {"shared_experts": "shared_expert", "e_score_correction_bias": "selection_bias"}

# Their block, our options, and what their tensors are called here.
BLOCKS = {
    "nemotron_h": (
        lambda: _make(
            "nemotron_h",
            "NemotronHMoE",
            "NemotronHConfig",
            n_routed_experts=E,
            moe_intermediate_size=F,
            moe_latent_size=10,
            moe_shared_expert_intermediate_size=14,
            **GROUPS,
        ),
        {
            "d_latent": 10,
            "d_shared": 14,
            "gated": False,
            "activation": "relu2",
            "router": GROUPED,
        },
        {
            **SHARED,
            "fc1_latent_proj": "latent_down",
            "fc2_latent_proj": "latent_up",
            "experts.up_proj": "experts.gate_up_proj",
        },
    ),
    "hy_v4": (
        lambda: _make("hy_v4", "HYV4MoE", "HYV4Config", **FINE, n_shared_experts=1, **GROUPS),
        {"glu": GLUOptions(limit=10.0), "shared_glu": GLUOptions(), "router": GROUPED},
        SHARED,
    ),
    "glm5_next": (
        lambda: _make(
            "glm5_next",
            "Glm5NextTextMoE",
            "Glm5NextTextConfig",
            **FINE,
            n_shared_experts=1,
            **GROUPS,
        ),
        {"glu": GLUOptions(limit=10.0), "router": GROUPED},
        SHARED,
    ),
    "step3p7": (
        lambda: _make(
            "step3p7",
            "Step3p7SparseMoeBlock",
            "Step3p7TextConfig",
            1,
            n_routed_experts=E,
            moe_intermediate_size=F,
            share_expert_dim=F,
            moe_router_scaling_factor=3.0,
            swiglu_limits=[None, 7.0],
            swiglu_limits_shared=[None, 16.0],
        ),
        {
            "glu": GLUOptions(limit=7.0, limit_after=True),
            "shared_glu": GLUOptions(limit=16.0, limit_after=True),
            "router": RouterOptions(**BIASED, scale=3.0),
        },
        SHARED,
    ),
    "ernie4_5": (
        lambda: _make(
            "ernie4_5_moe",
            "Ernie4_5_MoeSparseMoeBlock",
            "Ernie4_5_MoeConfig",
            moe_num_experts=E,
            moe_k=K,
            moe_intermediate_size=F,
            moe_num_shared_experts=2,
            use_bias=True,
        ),
        {
            "num_shared_experts": 2,
            "shared_bias": True,
            "router": RouterOptions(selection_bias=True),
        },
        {
            "shared_experts": "shared_expert",
            "gate.moe_statics.e_score_correction_bias": "gate.selection_bias",
        },
    ),
    "longcat_flash": (
        lambda: _make(
            "longcat_flash",
            "LongcatFlashMoE",
            "LongcatFlashConfig",
            n_routed_experts=E,
            zero_expert_num=4,
            expert_ffn_hidden_size=F,
            moe_topk=K,
            routed_scaling_factor=6.0,
        ),
        {
            "num_shared_experts": 0,
            "num_identity_experts": 4,
            "router": RouterOptions(normalize=False, scale=6.0, selection_bias=True),
        },
        {
            "router.classifier.": "gate.",
            "router.e_score_correction_bias": "gate.selection_bias",
        },
    ),
}


def _cut(theirs: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Leave out rows that none of their tokens reads: LongCat's of identity experts."""
    return theirs[: shape[0]].reshape(shape)


def _block(name: str, dtype: torch.dtype) -> tuple[nn.Module, SparseMoE, dict[str, torch.Tensor]]:
    """Return their block, ours with its weights, and their tensors under our names."""
    make, options, names = BLOCKS[name]
    theirs = _draw(make(), torch.float64, 20.0)
    options = {"num_shared_experts": 1, "balance": NO_BALANCE, **options}
    ours = SparseMoE(D, num_experts=E, top_k=K, d_expert=F, **options)
    with torch.no_grad():
        router = theirs.gate if hasattr(theirs, "gate") else theirs.router.classifier
        router.weight.copy_(torch.randn(router.weight.shape) * D**-0.5)
        router.weight[:, 0] += torch.linspace(1, -1, len(router.weight))
        for key, buffer in theirs.state_dict().items():
            if key.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn(buffer.shape) * 0.1)
    renamed = {}
    for key, tensor in theirs.to(dtype).state_dict(keep_vars=True).items():
        for old, new in names.items():
            key = key.replace(old, new)
        renamed[key] = tensor
    shapes = {key: tensor.shape for key, tensor in ours.state_dict().items()}
    state = {key: _cut(tensor, shapes[key]).detach() for key, tensor in renamed.items()}
    ours.to(dtype).load_state_dict(state)
    return theirs.eval(), ours.eval(), renamed


@BOTH
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name, dtype):
    theirs, ours, renamed = _block(name, dtype)
    hidden, direction = torch.randn(2, 3, 21, D, dtype=dtype)
    hidden[..., 0] = 1.0
    names = [key for key, _ in ours.named_parameters()]
    calls = (
        (renamed, theirs),
        (dict(ours.named_parameters()), lambda x: ours(x).hidden),
        (dict(ours.named_parameters()), lambda x: ours.reference(x).hidden),
    )
    found = []
    for tensors, call in calls:
        x = hidden.clone().requires_grad_()
        output = call(x)
        of_x, *others = torch.autograd.grad(
            (output * direction).sum(), [x, *(tensors[n] for n in names)]
        )
        gradients = [
            _cut(g, ours.get_parameter(n).shape) for g, n in zip(others, names, strict=True)
        ]
        found.append([output.detach(), of_x, *gradients])
    # Their routers compute in fp32 in a model of any dtype.
    bound = 1e-6
    _assert_alike(found[1], found[0], bound)
    _assert_alike(found[2], found[0], bound)
    with torch.no_grad():
        _assert_alike([ours.infer(hidden)], [found[0][0]], bound)
