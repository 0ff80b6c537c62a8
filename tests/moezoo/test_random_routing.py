"""The random-routing ablation: the method in everything, but who answers ignores the content."""

import pytest
import torch
from torch import nn

import moezoo
from moezoo.random_routing import RandomRouting, can_be_random

D = 24
ROUTED = [method for method in moezoo.zoo() if can_be_random(method.build(D))]
WEIGHED_BY_CONTENT = ("top_k_ffn", "spark_ffn", "deepseek_v4_hash", "mole", "l3")


def make(method, seed: int = 0, **arguments) -> RandomRouting:
    torch.manual_seed(3)
    # Neurons that are zero by their activation would not show that they were chosen.
    smooth = {"activation": "gelu"} if method.name == "top_k_ffn" else {}
    # Of as many rows as there are, few tokens would all read different ones.
    few = {"vocab_size": 50} if method.name in ("per_layer_embedding", "stem") else {}
    layer = method.build(D, **smooth, **few)
    for parameter in layer.parameters():  # zero-initialised routers would tie
        nn.init.normal_(parameter, std=0.1)
    return RandomRouting(layer, seed=seed, **arguments)


def hidden(count: int = 60) -> torch.Tensor:
    return torch.randn(1, count, D, generator=torch.Generator().manual_seed(1))


def test_everything_but_dense_and_attention_has_an_ablation():
    without = {method.name for method in moezoo.zoo()} - {method.name for method in ROUTED}
    # These choose by what neurons compute.
    neurons = {
        "cats",
        "teal",
        "drelu",
        "l1_reglu",
    }
    everyone = {"finedeep"}  # all experts answer
    matrices = {m.name for m in moezoo.zoo() if m.arguments.get("matrices") is not None}
    assert (
        without == {"dense_mlp", "dense_glu", "persistent_memory"} | neurons | matrices | everyone
    )


@pytest.mark.parametrize("method", ROUTED, ids=lambda method: method.name)
def test_choices_ignore_the_content(method):
    layer = make(method).eval()
    x = hidden()
    tokens = torch.randint(50, (1, 60))
    mask = torch.rand(1, 60) < 0.8
    first = layer(x, token_ids=tokens, router_input=x, mask=mask)
    order = torch.randperm(60)
    others = layer(x[:, order] * 1.5, token_ids=tokens[:, order], router_input=-x, mask=mask)
    assert first.stats.keys() == others.stats.keys()
    for name, value in first.stats.items():
        # How strongly what is chosen answers follows what it reads.
        if not (method.name in WEIGHED_BY_CONTENT and name == "unevenness"):
            assert torch.equal(value, others.stats[name]), name
    assert layer(x, mask=mask).hidden.equal(first.hidden)


@pytest.mark.parametrize("method", ROUTED, ids=lambda method: method.name)
def test_the_method_itself_does_look_at_the_content(method):
    """What the test above compares does change where the choice follows the content."""
    layer = make(method).eval().layer
    if not layer.causal:
        pytest.skip("expert choice fills every expert, whoever asks")
    x, tokens = hidden(), torch.randint(50, (1, 60))
    first = layer(x, token_ids=tokens).stats
    changed = layer(x.roll(1, -1), token_ids=(tokens * 7 + 3) % 50).stats
    assert any(not torch.equal(value, changed[name]) for name, value in first.items())


def noted(output: moezoo.FeedForwardOutput) -> dict[str, torch.Tensor]:
    """Return what the choice shows in: statistics, or the output where all answer anyway."""
    counts = output.stats.get("expert_counts")
    everyone = counts is not None and bool((counts == output.stats["tokens"]).all())
    return {"hidden": output.hidden} if everyone else dict(output.stats)


@pytest.mark.parametrize("method", ROUTED, ids=lambda method: method.name)
def test_noise_is_fresh_in_training_and_repeats_in_evaluation(method):
    layer, x = make(method), hidden()
    if not layer.causal:
        pytest.skip("expert choice fills every expert, whoever asks")
    seen = [noted(layer.train()(x)) for _ in range(2)]
    assert any(not torch.equal(value, seen[1][name]) for name, value in seen[0].items())
    assert layer.eval()(x).hidden.equal(layer(x).hidden)
    other = noted(make(method, seed=5).eval()(x))
    assert any(not torch.equal(value, other[name]) for name, value in noted(layer(x)).items())


def test_tokens_of_one_call_get_noise_of_their_own():
    layer = RandomRouting(moezoo.SparseMoE(D, num_experts=8, top_k=2)).eval()
    same = hidden(1).expand(1, 200, D)
    assert (layer(same).stats["expert_counts"] > 20).all()


def test_the_answers_still_read_the_hidden_state():
    by_name = {method.name: method for method in moezoo.zoo()}
    layer, x = make(by_name["st_moe"]), hidden().requires_grad_()
    layer(x).hidden.sum().backward()
    assert x.grad.abs().sum(-1).gt(0).all()


def test_fast_path_equals_reference():
    for method in ROUTED:
        layer, x = make(method).double().eval(), hidden().double()
        torch.testing.assert_close(layer(x).hidden, layer.reference(x).hidden)


class Gain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x


def test_noise_has_the_scale_of_what_the_norm_makes():
    norm, read = Gain(), []
    layer = RandomRouting(moezoo.SparseMoE(D), norm)
    layer.layer.gate.register_forward_hook(lambda module, args, output: read.append(args[0]))
    layer(hidden(2000)).hidden.sum().backward()
    assert read[0].std() == pytest.approx(2.5, rel=0.02)
    assert read[0].mean() == pytest.approx(0, abs=0.05)
    assert norm.weight.grad is None
    assert not any(name.startswith("_norm") or "Gain" in name for name in layer.state_dict())


@pytest.mark.parametrize("method", ROUTED, ids=lambda method: method.name)
def test_it_costs_and_trains_as_the_method(method):
    layer = make(method)
    assert layer.cost() == layer.layer.cost()
    wanted, found = (
        {(g.name, g.lr_multiplier, g.weight_decay, len(g.parameters)) for g in groups}
        for groups in (layer.layer.parameter_groups(), layer.parameter_groups())
    )
    assert found == wanted
    assert type(layer.layer).__name__ in str(layer)


def test_training_state_follows_the_random_load():
    router = moezoo.RouterOptions(score="sigmoid", selection_bias=True)
    layer = RandomRouting(moezoo.SparseMoE(D, router=router))
    layer.observe(layer(hidden()).stats)
    layer.step()
    assert layer.layer.gate.selection_bias.any()


def test_a_layer_without_routing_is_refused():
    with pytest.raises(moezoo.InputError, match="DenseFFN chooses nothing per token"):
        RandomRouting(moezoo.DenseFFN(D))
