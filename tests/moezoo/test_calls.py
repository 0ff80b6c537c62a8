"""What no layer of the zoo takes: arguments that would give wrong numbers, or lose gradients."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import moezoo
from moezoo.analysis.usage import routed_layers
from moezoo.feed_forward import FeedForwardOutput

METHODS = [pytest.param(method, id=method.name) for method in moezoo.zoo()]
D = 24
HIDDEN = torch.randn(2, 5, D)
IDS = torch.arange(10).reshape(2, 5)

WRONG = {
    "whole numbers": ({"hidden": HIDDEN.long()}, "hidden: torch.int64 is not floating point"),
    "truth values": ({"hidden": HIDDEN > 0}, "hidden: torch.bool is not floating point"),
    "complex": ({"hidden": HIDDEN + 0j}, "hidden: torch.complex64 is not floating point"),
    "no tensor": ({"hidden": [1.0] * D}, "hidden: list is not floating point"),
    "one number": ({"hidden": torch.tensor(1.0)}, r"hidden: is one number; give \(\.\.\., 24\)"),
    "width": ({"hidden": HIDDEN[..., :-1]}, "hidden: last dimension is 23, .* d_model is 24"),
    "no width": ({"hidden": HIDDEN[..., :0]}, "hidden: last dimension is 0"),
    "mask of numbers": ({"mask": torch.ones(2, 5)}, "mask: torch.float32 is not bool"),
    "mask of whole numbers": ({"mask": IDS}, "mask: torch.int64 is not bool"),
    "mask's shape": ({"mask": IDS.T > 0}, r"mask: shape \(5, 2\) does not match hidden's \(2, 5\)"),
    "mask's size": ({"mask": IDS[:1] > 0}, r"mask: shape \(1, 5\) does not match"),
    "mask of everything": ({"mask": HIDDEN > 0}, "mask: shape"),
    "names as numbers": ({"token_ids": IDS.float()}, "token_ids: torch.float32 holds no token ids"),
    "names as bytes": ({"token_ids": IDS.byte()}, "token_ids: torch.uint8 holds no token ids"),
    "router_input's shape": (
        {"router_input": HIDDEN[:1]},
        r"router_input: shape \(1, 5, 24\) does not match hidden's \(2, 5, 24\)",
    ),
    "router_input's width": ({"router_input": HIDDEN[..., :-1]}, "router_input: shape"),
    "router_input's dtype": (
        {"router_input": HIDDEN.long()},
        "router_input: torch.int64 is not floating point",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("method", METHODS)
def test_an_argument_that_does_not_fit_is_refused_in_one_line(method, wrong):
    layer = method.build(D).eval()
    changes, message = WRONG[wrong]
    arguments = {"token_ids": IDS, **changes}
    hidden = arguments.pop("hidden", HIDDEN)
    calls = [layer, layer.reference, *([layer.slot_load] if routed_layers(layer) else [])]
    for call in calls:
        with pytest.raises(moezoo.InputError, match=message) as error:
            call(hidden, **arguments)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("method", METHODS)
def test_token_ids_outside_the_vocabulary(method):
    layer = method.build(D).eval()
    if not layer.needs_token_ids:
        pytest.skip("it does not read them")
    for wrong in (-1, layer.vocab_size):
        with pytest.raises(moezoo.InputError, match=f"token_ids: id {wrong} is outside"):
            layer(HIDDEN, token_ids=IDS.index_fill(1, torch.tensor([3]), wrong))
    for ids in (IDS.T, IDS[0], torch.tensor(3)):
        with pytest.raises(moezoo.InputError, match="token_ids: shape"):
            layer(HIDDEN, token_ids=ids)
    with pytest.raises(moezoo.InputError, match="token_ids: missing"):
        layer(HIDDEN)


def gradients(layer, run) -> dict:
    """Return the gradients of a loss on the answer and all auxiliary losses."""
    layer.zero_grad()
    torch.manual_seed(1)
    output = run(HIDDEN.clone().requires_grad_())
    (output.hidden.sum() + sum(output.losses.values())).backward()
    return {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_reentrant_checkpointing_gives_all_gradients_or_none(method, training):
    """A block's losses are no tensors that it returns, so a reentrant checkpoint drops them."""
    layer = method.build(D).train(training)
    plain = gradients(layer, lambda h: layer(h, token_ids=IDS))

    def recomputed(hidden: torch.Tensor) -> FeedForwardOutput:
        def answer(h: torch.Tensor) -> tuple:
            return tuple(layer(h, token_ids=IDS))

        return FeedForwardOutput(*checkpoint(answer, hidden, use_reentrant=True))

    if layer(HIDDEN, token_ids=IDS).losses:
        with pytest.raises(moezoo.InputError, match=r"^use_reentrant: .* use_reentrant=False$"):
            gradients(layer, recomputed)
        return
    again = gradients(layer, recomputed)
    assert again.keys() == plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient)


def test_losses_without_a_graph_are_returned_where_none_is_wanted():
    layer = moezoo.SparseMoE(D)
    hidden = HIDDEN.clone().requires_grad_()
    with torch.no_grad():
        assert layer(hidden).losses.keys() == {"load_balancing"}
    with torch.inference_mode():
        assert layer(HIDDEN).losses


def test_a_compiler_records_reentrant_checkpoints_as_it_does_others():
    layer = moezoo.SparseMoE(D)
    plain = gradients(layer, layer)
    torch._dynamo.reset()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def recomputed(hidden: torch.Tensor) -> FeedForwardOutput:
        answer, losses, stats, _ = checkpoint(lambda h: tuple(layer(h)), hidden, use_reentrant=True)
        return FeedForwardOutput(answer, losses, stats)

    again = gradients(layer, recomputed)
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient)
