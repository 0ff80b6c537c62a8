"""What a swap sees of a foreign block, what it refuses, and that it then changes nothing."""

import pytest
import torch
from torch import nn

import moezoo
from moezoo.feed_forward import FeedForwardOutput

D = 16
IDS = torch.arange(8).reshape(2, 4)


class Block(nn.Module):
    """Attention (a running mean) and a feed-forward block, called in one of many ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.self_attn = nn.Linear(D, D)
        self.norm = nn.LayerNorm(D)
        self.mlp = MLP(way)
        if way in ("halves", "halves apart", "halves multiplied"):
            self.shared_mlp = MLP("plain")

    def forward(self, hidden):
        steps = torch.arange(1, hidden.shape[1] + 1)[:, None]
        hidden = hidden + self.self_attn(hidden).cumsum(1) / steps
        x = self.norm(hidden)
        if self.way == "tuple":
            answer, _ = self.mlp(x)
        elif self.way == "tuple whose second counts":
            answer, scores = self.mlp(x)
            answer = answer * scores
        elif self.way in ("residual", "residual by name", "residual scaled"):
            return self.mlp(x, hidden) if self.way == "residual" else self.mlp(x, residual=hidden)
        elif self.way == "unused tensor":
            answer = self.mlp(x, hidden)
        elif self.way == "by name":
            answer = self.mlp(x=x)
        elif self.way == "flat":
            answer = self.mlp(x).view(hidden.shape)
        elif self.way == "in place":
            answer = self.mlp(x)
            answer += hidden
            return answer
        elif self.way == "halves":
            answer = self.mlp(x) + self.shared_mlp(x)
        elif self.way == "halves apart":
            answer = self.mlp(x) + self.shared_mlp(hidden)
        elif self.way == "halves multiplied":
            answer = self.mlp(x) * self.shared_mlp(x)
        elif self.way == "dictionary":
            answer = self.mlp(x)["hidden"]
        elif self.way == "wider":
            answer = self.mlp(x)[..., :D]
        elif self.way == "by its parts":
            answer = self.mlp.down(self.mlp.up(x).relu())
        else:
            answer = self.mlp(x)
        return hidden + answer


class MLP(nn.Module):
    """A feed-forward block with one of many contracts."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.up = nn.Linear(D, 24)
        self.down = nn.Linear(24, 2 * D if way == "wider" else D)

    def forward(self, x, residual=None):
        answer = self.down(self.up(x).relu())
        if self.way == "residual scaled":
            return answer + 0.5 * residual
        if self.way.startswith("residual"):
            return answer + residual
        if self.way.startswith("tuple"):
            return answer, answer.mean(-1, keepdim=True)
        if self.way == "flat":
            return answer.flatten(0, 1)
        return {"hidden": answer} if self.way == "dictionary" else answer


class Model(nn.Module):
    """A decoder of such blocks."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(32, D)
        self.layers = nn.ModuleList(Block(way) for _ in range(2))
        self.layers[1].norm.eval()  # a mixed mode, which a trial must leave
        self.register_forward_hook(lambda *_: None)

    def forward(self, ids):
        if ids.device != self.embed.weight.device:
            raise RuntimeError("tensors on two devices")
        hidden = self.embed(ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


def state(model: nn.Module) -> list:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return [
        (name, id(m), m.training, [list(getattr(m, kind)) for kind in hooks])
        for name, m in model.named_modules()
    ]


KEPT = [
    "plain",
    "tuple",
    "residual",
    "residual by name",
    "unused tensor",
    "by name",
    "flat",
    "in place",
    "halves",
]


@pytest.mark.parametrize("way", KEPT)
def test_a_contract_is_kept(way):
    """With the block's own weights in the new layer, the model is the same model."""
    model = Model(way)
    was, expected = state(model), model(IDS)
    blocks = [(layer.mlp, getattr(layer, "shared_mlp", None)) for layer in model.layers]
    swapped = moezoo.swap(
        model, lambda d: moezoo.DenseFFN(d, 24, activation="relu", gated=False, bias=True)
    )
    with torch.no_grad():
        for layer, (mlp, shared) in zip(swapped, blocks, strict=True):
            layer.up_proj.load_state_dict(mlp.up.state_dict())
            layer.down_proj.load_state_dict(mlp.down.state_dict())
            if shared is not None:  # one layer is not two: let the other half be silent
                for parameter in shared.parameters():
                    parameter.zero_()
    if way == "halves":
        after = model(IDS)
        swapped.undo()
        torch.testing.assert_close(after, model(IDS))
    else:
        torch.testing.assert_close(model(IDS), expected)
        swapped.undo()
        assert torch.equal(model(IDS), expected)
    assert state(model) == was


@pytest.mark.parametrize("layer", ["moezoo.SparseMoE", "moezoo.TopKFFN", "moezoo.PEER"])
@pytest.mark.parametrize("way", ["in place", "residual", "flat"])
def test_what_is_changed_in_place_is_the_models_own(way, layer):
    model = Model(way)
    swapped = moezoo.swap(model, layer)
    answers = []
    swapped[1].register_forward_hook(lambda _, __, output: answers.append(output.hidden.clone()))
    with swapped.collect() as outputs:
        model(IDS).square().sum().backward()
    assert all(p.grad is not None for p in swapped[0].parameters() if p.ndim == 3)
    assert torch.equal(outputs[1].hidden, answers[0])


REFUSED = {
    "tuple whose second counts": "layer 0's mlp cannot be replaced by one layer",
    "residual scaled": "layer 0's mlp reads 'residual' beside its hidden states",
    "halves apart": "layer 0's mlp and shared_mlp cannot be replaced by one layer",
    "halves multiplied": "layer 0's mlp and shared_mlp cannot be replaced by one layer",
    "dictionary": "layer 0's mlp returns dict",
    "wider": r"layer 0's mlp turns shape \(2, 4, 16\) into \(2, 4, 32\)",
    "by its parts": "layer 0's mlp was not called as one block",
}


@pytest.mark.parametrize("way", REFUSED)
def test_what_no_layer_can_do_is_refused_and_nothing_changed(way):
    model = Model(way)
    was, expected, random = state(model), model(IDS), torch.get_rng_state()
    with pytest.raises(moezoo.InputError, match=f"^model: {REFUSED[way]}") as error:
        moezoo.swap(model, "moezoo.SparseMoE")
    assert "\n" not in str(error.value)
    assert state(model) == was
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(model(IDS), expected)


class Failing(moezoo.DenseFFN):
    """A layer that cannot run."""

    def forward(self, hidden, **context) -> FeedForwardOutput:
        raise RuntimeError("no\nkernel")


def test_layers_that_fail_are_taken_out_again():
    model = Model("halves")
    was = state(model)
    with pytest.raises(moezoo.InputError, match=r"Model fails with the new layers: no$"):
        moezoo.swap(model, lambda d: Failing(d, 24))
    assert state(model) == was


def test_a_model_that_takes_no_token_ids_is_taken_at_its_blocks_word():
    for way, message in [("plain", None), ("residual", "layer 0's mlp cannot be watched at work")]:
        model = Model(way)
        model.forward = lambda states, layers=model.layers: layers[0](states * 1.0)
        model.embed.weight.requires_grad_(False)
        del model.embed
        if message is None:
            assert len(moezoo.swap(model, lambda d: moezoo.DenseFFN(d, 24))) == 2
            continue
        with pytest.raises(moezoo.InputError, match=message):
            moezoo.swap(model, lambda d: moezoo.DenseFFN(d, 24))


def test_two_decoders_in_one_model_are_not_chosen_between():
    model = nn.ModuleDict({"seeing": Model("plain"), "reading": Model("plain")})
    with pytest.raises(moezoo.InputError, match=r"blocks: seeing\.layers, reading\.layers"):
        moezoo.swap(model, "moezoo.SparseMoE")
    model.get_decoder = lambda: model["reading"]
    model.forward = model["reading"].forward
    moezoo.swap(model, "moezoo.SparseMoE")
    kinds = [type(part.layers[0].mlp).__name__ for part in model.values()]
    assert kinds == ["MLP", "Adapter"]


def test_a_block_that_runs_at_two_depths_is_refused():
    model = Model("plain")
    model.layers[1] = model.layers[0]
    with pytest.raises(moezoo.InputError, match="model: Model runs one block at several depths"):
        moezoo.swap(model, "moezoo.SparseMoE")


def test_a_swapped_model_is_swapped_again_and_undone_in_order():
    model = Model("tuple")
    was, expected = state(model), model(IDS)
    first = moezoo.swap(model, "moezoo.SparseMoE")
    between = model(IDS)
    second = moezoo.swap(model, "moezoo.DenseFFN", where=[1])
    with pytest.raises(moezoo.InputError, match="undo: layer 1's mlp was replaced again"):
        first.undo()
    second.undo()
    assert torch.equal(model(IDS), between)
    first.undo()
    assert state(model) == was
    assert torch.equal(model(IDS), expected)
    with pytest.raises(moezoo.InputError, match="undo: the replaced blocks are not held"):
        first.undo()


def test_what_is_put_back_follows_the_model():
    model = Model("halves")
    swapped = moezoo.swap(model, "moezoo.SparseMoE")
    model.eval().to(torch.float64)
    swapped.undo()
    modes = {(m.training, p.dtype) for m in model.modules() for p in m.parameters()}
    assert modes == {(False, torch.float64)}


def test_gradients_are_right_or_refused_under_either_checkpointing():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": D, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).train()
    swapped = moezoo.swap(model, "moezoo.SparseMoE")

    def gradient() -> torch.Tensor:
        model.zero_grad()
        with swapped.collect() as outputs:
            loss = model(input_ids=IDS, labels=IDS).loss
        (loss + 100 * sum(sum(o.losses.values()) for o in outputs)).backward()
        return swapped[0].gate.weight.grad.clone()

    plain = gradient()
    for options in (None, {"use_reentrant": False}, {"use_reentrant": False, "debug": False}):
        model.activation_checkpointing_enable(options)
        torch.testing.assert_close(gradient(), plain)
    for options in ({"use_reentrant": True}, {"use_reentrant": True, "preserve_rng_state": False}):
        model.activation_checkpointing_enable(options)
        with pytest.raises(moezoo.InputError, match=r"use_reentrant: .* drops the gradients of"):
            gradient()
    for options in ({}, {"preserve_rng_state": False}):
        model.activation_checkpointing_enable(options)
        with (
            pytest.raises(moezoo.InputError, match=r"use_reentrant: .* drops the gradients of"),
            pytest.warns(UserWarning, match="use_reentrant parameter should be passed"),
        ):
            gradient()


def test_a_swapped_model_compiles_into_one_graph():
    model = Model("tuple").eval()
    moezoo.swap(model, "moezoo.SparseMoE")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(IDS), model(IDS))
