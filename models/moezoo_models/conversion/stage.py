"""One decoder layer of a dense model at a time, as our decoder computes it.

A model of this one layer is made without memory; then the layer's tensors take their places. So
norms, windows, factors and positions of every family are those that its checkpoints load with, and
memory holds one layer.

Shapes: W windows, L tokens each, D d_model; T = W L.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moezoo.convert import Block
from moezoo.feed_forward import FeedForward, FeedForwardOutput
from moezoo_kernels.activations import ACTIVATIONS
from moezoo_models.checkpoints.directory import quiet
from moezoo_models.conversion.source import Source
from moezoo_models.model.causal_lm import MoezooForCausalLM
from moezoo_models.model.config import MoezooConfig
from moezoo_models.model.head import shaped_logits
from moezoo_models.model.inputs import scaled_embeddings
from moezoo_models.model.rotary import build_rotary

Answer = Callable[[Tensor], Tensor]
"""A feed-forward block: ``(T, D)`` to ``(T, D)``."""

_TOKENS = 8192
"""Tokens that pass through a layer at once."""


class _Replaced(FeedForward):
    """Stands in for the feed-forward block."""

    def __init__(self, d_model: int) -> None:
        super().__init__(d_model)
        self.answer: Answer = torch.zeros_like

    def forward(self, hidden: Tensor, **context: Tensor | None) -> FeedForwardOutput:
        answer = self.answer(hidden.flatten(0, -2)).view_as(hidden)
        return FeedForwardOutput(answer, {}, {})


class Stage:
    """A layer, in fp32.

    Args:
        source: the dense model.
        layer: number of the layer.
        device: where to compute.
    """

    def __init__(self, source: Source, layer: int, device: torch.device) -> None:
        self.model = _one_layer(source, layer).model
        self.model.norm = nn.Identity()
        self.model.embed_positions = None  # they are added before the first layer
        self.model.rotary_emb = build_rotary(self.model.config)
        self.model.rotary_emb = self.model.rotary_emb and self.model.rotary_emb.to(device)
        self.layer = next(self.model.blocks())
        self.layer.mlp = self.replaced = _Replaced(source.config.hidden_size)
        start = f"model.layers.{layer}."
        for name, _ in list(self.layer.named_parameters()):
            _place(self.layer, name, source.read(start + name), device)
        weights = {name: t.float().to(device) for name, t in source.block(layer).items()}
        act = ACTIVATIONS[source.ffn["activation"]]
        gate, biases = weights.get("gate"), (weights.get("bias_in"), weights.get("bias_out"))
        self.block = Block(gate, weights["up"], weights["down"], act, *biases)

    @torch.no_grad()
    def attended(self, states: Tensor) -> Iterator[Tensor]:
        """Yield what the feed-forward block's output is added to, ``(w, L, D)``, windows in order.

        Attention is most of a layer's time where windows are long; what depends on it goes on from
        here, by :meth:`inputs` and :meth:`answered`, however often.

        Args:
            states: ``(W, L, D)``, what comes into the layer.
        """
        return self.outputs(states, torch.zeros_like)

    @torch.no_grad()
    def inputs(self, attended: Tensor) -> Tensor:
        """Return what the feed-forward block sees, ``(T, D)``.

        Args:
            attended: ``(w, L, D)``, of :meth:`attended`.
        """
        return self.layer.feed_forward_input(attended.to(self.block.up.device)).flatten(0, 1)

    @torch.no_grad()
    def answered(self, attended: Tensor, answer: Answer) -> Tensor:
        """Return what comes out of the layer, ``(w, L, D)`` on the CPU.

        Args:
            attended: ``(w, L, D)``, of :meth:`attended`.
            answer: the feed-forward block.
        """
        return self.added(attended, answer(self.inputs(attended)))

    @torch.no_grad()
    def added(self, attended: Tensor, output: Tensor) -> Tensor:
        """Return what comes out of the layer, ``(w, L, D)`` on the CPU, given the block's output.

        That is not the plain sum in every family: Gemma norms the output first, Granite scales it.

        Args:
            attended: ``(w, L, D)``, of :meth:`attended`.
            output: ``(T, D)`` or ``(w, L, D)``, of the feed-forward block.
        """
        added = self.layer.with_answer(attended.to(output.device), output.view_as(attended))
        return added.cpu()

    @torch.no_grad()
    def outputs(self, states: Tensor, answer: Answer) -> Iterator[Tensor]:
        """Pass states through the layer, some windows at a time.

        Args:
            states: ``(W, L, D)``.
            answer: the feed-forward block.
        """
        self.replaced.answer = answer
        for windows in states.split(max(_TOKENS // states.shape[1], 1)):
            inputs = windows.to(self.block.up.device)
            yield self.model(inputs_embeds=inputs, use_cache=False).last_hidden_state.cpu()


class Head:
    """The part after the layers: the last norm and the output projection, in fp32."""

    def __init__(self, source: Source, device: torch.device) -> None:
        whole = _one_layer(source, 0)
        self.config, self.norm, self.lm_head = whole.config, whole.model.norm, whole.lm_head
        tied = source.ours.tie_word_embeddings
        projection = "model.embed_tokens.weight" if tied else "lm_head.weight"
        for name, _ in list(self.norm.named_parameters()):
            _place(self.norm, name, source.read(f"model.norm.{name}"), device)
        _place(self.lm_head, "weight", source.read(projection), device)

    @torch.no_grad()
    def logits(self, states: Tensor) -> Tensor:
        """Return the logits ``(L, V)`` of one window's last states ``(L, D)``."""
        logits = self.lm_head(self.norm(states.to(self.lm_head.weight.device)))
        return shaped_logits(logits, self.config)

    @torch.no_grad()
    def nats(self, states: Tensor, tokens: Tensor, skipped: int) -> Tensor:
        """Return the cross-entropy of all windows' tokens after their first, ``(W, ≤ L - 1)`` fp32.

        Args:
            states: ``(W, L, D)``, what the last layer put out.
            tokens: ``(W, L)``.
            skipped: tokens at the start of a window that need not be predicted.
        """
        rows = (self.logits(row) for row in states)
        return torch.stack(
            [next_token_nats(*each, skipped) for each in zip(rows, tokens, strict=True)]
        )


def next_token_nats(logits: Tensor, tokens: Tensor, skipped: int) -> Tensor:
    """Return the cross-entropy of one window's tokens after the first, fp32.

    Args:
        logits: ``(L, vocabulary)``.
        tokens: ``(L,)`` int64.
        skipped: tokens at the start that need not be predicted.
    """
    first = max(skipped - 1, 0)
    targets = tokens[first + 1 :].to(logits.device)
    return F.cross_entropy(logits[first:-1].float(), targets, reduction="none").cpu()


def embed(source: Source, tokens: Tensor) -> Tensor:
    """Embed tokens, and where positions are learned, these: ``(W, L)`` to ``(W, L, D)`` fp32."""
    found = source.read("model.embed_tokens.weight")[tokens].float()
    found = scaled_embeddings(found, source.ours)
    if source.ours.positions == "learned":
        found += source.read("model.embed_positions.weight")[: tokens.shape[1]].float()
    return found


def _one_layer(source: Source, layer: int) -> MoezooForCausalLM:
    """Make a model of a single layer, without memory."""
    ours = source.ours
    fields = {
        "num_hidden_layers": 1,
        "layer_types": [ours.layer_types[layer]],
        "nope_layers": [0] if layer in ours.nope_layers else [],
    }
    config = MoezooConfig.from_dict(ours.to_dict() | fields)
    with torch.device("meta"), quiet():
        return MoezooForCausalLM(config).float().eval()


def _place(module: nn.Module, name: str, weight: Tensor, device: torch.device) -> None:
    """Put a tensor in the place of a parameter."""
    path, _, last = name.rpartition(".")
    parameter = nn.Parameter(weight.float().to(device), requires_grad=False)
    setattr(module.get_submodule(path), last, parameter)
