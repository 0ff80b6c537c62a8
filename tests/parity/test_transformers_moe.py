"""SparseMoE against transformers' blocks, weights copied: same experts, weights and output."""

import pytest
import torch

from moezoo import BalanceOptions, RouterOptions, SparseMoE

transformers = pytest.importorskip("transformers")

D, F, E, K = 32, 48, 8, 3


def block(name: str, **changes):
    """Build one of transformers' MoE blocks with random weights."""
    module = f"transformers.models.{name}.modeling_{name}"
    prefix = {
        "mixtral": "Mixtral",
        "qwen3_moe": "Qwen3Moe",
        "olmoe": "Olmoe",
        "deepseek_v2": "DeepseekV2",
        "deepseek_v3": "DeepseekV3",
    }[name]
    suffix = {"deepseek_v2": "Moe", "deepseek_v3": "MoE"}.get(name, "SparseMoeBlock")
    sizes = {"hidden_size": D, "num_experts_per_tok": K, "moe_intermediate_size": F}
    if name in ("mixtral", "olmoe"):
        sizes["intermediate_size"] = F
    count = {"mixtral": "num_local_experts", "deepseek_v2": "n_routed_experts"}
    count["deepseek_v3"] = "n_routed_experts"
    sizes[count.get(name, "num_experts")] = E
    config = getattr(transformers, f"{prefix}Config")(**sizes, **changes)
    config._experts_implementation = "eager"
    made = getattr(__import__(module, fromlist=["x"]), f"{prefix}{suffix}")(config)
    torch.manual_seed(0)
    for parameter in [*made.parameters(), *made.buffers()]:
        torch.nn.init.normal_(parameter, std=D**-0.5)
    return made.eval()


CASES = {
    "mixtral": (block, {}, RouterOptions(), 0),
    "qwen3_moe": (block, {"norm_topk_prob": True}, RouterOptions(), 0),
    "qwen3_moe (raw)": (block, {"norm_topk_prob": False}, RouterOptions(normalize=False), 0),
    "olmoe": (block, {"norm_topk_prob": False}, RouterOptions(normalize=False), 0),
    "deepseek_v2": (
        block,
        {"topk_method": "greedy", "routed_scaling_factor": 2.0, "n_shared_experts": 2},
        RouterOptions(normalize=False, scale=2.0),
        2,
    ),
    "deepseek_v2 (groups)": (
        block,
        {
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 16.0,
            "n_shared_experts": 1,
        },
        RouterOptions(normalize=False, scale=16.0, num_groups=4, top_groups=2),
        1,
    ),
    "deepseek_v3": (
        block,
        {
            "n_group": 4,
            "topk_group": 2,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "n_shared_experts": 1,
        },
        RouterOptions(score="sigmoid", scale=2.5, num_groups=4, top_groups=2, selection_bias=True),
        1,
    ),
}


def pair(case: str):
    make, changes, router, shared = CASES[case]
    theirs = make(case.split()[0], **changes)
    ours = SparseMoE(
        D,
        num_experts=E,
        top_k=K,
        d_expert=F,
        num_shared_experts=shared,
        router=router,
        balance=BalanceOptions(load_balancing=0.0),
    ).eval()
    state = {
        name.replace("shared_experts.", "shared_expert.").replace(
            "e_score_correction_bias", "selection_bias"
        ): tensor
        for name, tensor in theirs.state_dict().items()
    }
    ours.load_state_dict(state)
    return ours, theirs


@pytest.mark.parametrize("case", CASES)
def test_router_is_bit_equal(case):
    ours, theirs = pair(case)
    hidden = torch.randn(1, 257, D)
    routing = ours.route(hidden)
    _, weights, indices = theirs.gate(hidden)
    order, their_order = routing.indices.argsort(-1), indices.argsort(-1)
    assert torch.equal(routing.indices.gather(1, order), indices.gather(1, their_order))
    assert torch.equal(routing.weights.gather(1, order), weights.gather(1, their_order))


@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_agree(case):
    ours, theirs = pair(case)
    hidden = torch.randn(3, 43, D)
    direction = torch.randn(3, 43, D)
    found = []
    for module, call in ((ours, lambda x: ours(x).hidden), (theirs, theirs)):
        x = hidden.clone().requires_grad_()
        (call(x) * direction).sum().backward()
        found.append([call(x).detach(), x.grad, *(p.grad for p in module.parameters())])
    assert len(found[0]) == len(found[1])
    by_size = [sorted(values, key=lambda t: (t.shape, t.abs().sum())) for values in found]
    for mine, other in zip(*by_size, strict=True):
        error = (mine - other).abs().max() / other.abs().max()
        assert error < 2e-6
