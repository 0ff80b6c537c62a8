"""A sparse model's tokens, checked by all of the model every so often (Sirius): options and counts.

Zhou et al. 2024, arXiv:2409.03856: the sparse model writes a few tokens; the full one reads them in
one pass, whose keys and values stay in the cache; what it finds unlikely goes, with all behind it,
and its own choice stands there instead. Both have the same weights, so nothing else is loaded.
:mod:`moezoo_models.decoding.correcting` is the loop.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

from transformers import PreTrainedModel

from moezoo.convert.select import read_share
from moezoo.convert.select.prompt import kept_count
from moezoo.errors import InputError, check_int, check_number
from moezoo.feed_forward import FeedForward
from moezoo.layers.dense import DenseFFN
from moezoo.layers.selective_ffn import SelectiveFFN
from moezoo.selection import Selector
from moezoo_models.decoding.eligible import ineligible, turns_anew
from moezoo_models.decoding.griffin import dense_blocks
from moezoo_models.model.causal_lm import MoezooForCausalLM

_LEAST_TEMPERATURE = 1e-6


@dataclass(frozen=True)
class Sirius:
    """When all of the model checks what a part of it wrote, and what passes.

    Attributes:
        period: tokens that one check reads; all but the first were written by the sparse model.
            Default: no checks.
        threshold: a token that the full model would not choose itself passes if its probability
            there is at least this: 0 passes everything, 1 nothing but the full model's choice.
        temperature: divides the full model's logits before that probability is taken.
    """

    period: int | None = None
    threshold: float = 0.1
    temperature: float = 0.6

    def check(self) -> None:
        """Raise :class:`~moezoo.InputError` if a number is out of range."""
        if self.period is None:
            raise InputError(
                "sirius.period: no check is asked for; set it, or leave sirius' other options out"
            )
        check_int("sirius.period", self.period, minimum=2)
        check_number("sirius.threshold", self.threshold, maximum=1.0)
        if check_number("sirius.temperature", self.temperature) < _LEAST_TEMPERATURE:
            raise InputError(
                f"sirius.temperature: {self.temperature:g} is too little to divide by; give "
                f"{_LEAST_TEMPERATURE:g} or more"
            )

    def counts(self) -> Corrections | None:
        """Return where to count what checks find; None if there are to be none.

        Raises:
            InputError: a number is out of range.
        """
        if self == UNCHECKED:
            return None
        self.check()
        return Corrections()


UNCHECKED = Sirius()
"""The default: no checks."""


@dataclass
class Corrections:
    """What checks found, added over texts.

    Attributes:
        checks: passes of the full model, the prompts' apart.
        reread: tokens that they read.
        steps: tokens that the sparse model read.
        kept: of the tokens that it wrote, those that passed.
        dropped: those that did not, or stood behind one that did not.
        own: tokens that the checks wrote.
        step_work: share of the feed-forward blocks' products that one step of the sparse model
            needs, as calibrated.
        step_read: share of their weights that it reads, in whole rows and columns.
    """

    checks: int = 0
    reread: int = 0
    steps: int = 0
    kept: int = 0
    dropped: int = 0
    own: int = 0
    step_work: float = 1.0
    step_read: float = 1.0

    @property
    def tokens(self) -> int:
        """Tokens of the texts, without the first of each, which the prompt's pass gives."""
        return self.kept + self.own

    @property
    def advance(self) -> float:
        """Tokens by which a text grows from check to check, on average; at most the period."""
        return self.tokens / self.checks if self.checks else 0.0

    @property
    def rolled_back(self) -> float:
        """Share of what the sparse model wrote that did not stay."""
        written = self.kept + self.dropped
        return self.dropped / written if written else 0.0

    @property
    def work(self) -> float:
        """Products of feed-forward blocks, over those of the full model for the same tokens.

        A check multiplies every token with everything: ``(steps · step_work + reread) / tokens``.
        """
        return (self.steps * self.step_work + self.reread) / self.tokens if self.tokens else 1.0

    @property
    def read(self) -> float:
        """Weights of feed-forward blocks that are read, over the full model's for the same tokens.

        A check reads everything once: ``(steps · step_read + checks) / tokens``, the paper's
        effective density.
        """
        return (self.steps * self.step_read + self.checks) / self.tokens if self.tokens else 1.0

    def line(self) -> str:
        """Return the figures as one line of text."""
        if not self.checks:
            return "sirius: no check was needed"
        return (
            f"sirius: {self.checks} checks, {self.advance:.2f} tokens each; "
            f"{self.rolled_back:.1%} of the sparse model's tokens rolled back; of what the full "
            f"model takes per token in feed-forward blocks: {self.read:.2f} of the reading, "
            f"{self.work:.2f} of the products"
        )


def check_corrected(
    model: PreTrainedModel, options: Sirius, griffin: float | None, length: int, new_tokens: int
) -> None:
    """Raise :class:`~moezoo.InputError` if no text can be checked so.

    Args:
        model: the model.
        options: what to check.
        griffin: share of the neurons that a prompt keeps, if that makes the model sparse.
        length: tokens of the prompt.
        new_tokens: at most so many follow.
    """
    options.check()
    if griffin is not None:
        dense_blocks(model, griffin)
    elif not _selective(model):
        raise InputError(
            "sirius: every token is computed whole by this model; give a checkpoint that moezoo "
            "sparsify wrote, or add --griffin"
        )
    why = ineligible(model)
    if why is None and _turned_by_length(model, length, new_tokens):
        why = "its rotary embeddings turn otherwise at the length that the text grows past"
    if why is None and any(layer.keeps_history for _, layer in _added(model)):
        why = "its memories convolve over tokens that a check would have to take back"
    if why is not None:
        raise InputError(f"sirius: {why}, and only our own decoding is checked; leave it out")


def _added(model: PreTrainedModel) -> Iterator[tuple[int, FeedForward]]:
    return cast(MoezooForCausalLM, model).model.added_layers()


def _turned_by_length(model: PreTrainedModel, length: int, new_tokens: int) -> bool:
    dynamic = model.config.rope_parameters.get("rope_type") == "dynamic"
    longer = length + new_tokens > model.config.max_position_embeddings
    return (dynamic and longer) or turns_anew(model.config, length, new_tokens)


@contextmanager
def whole(model: PreTrainedModel) -> Iterator[None]:
    """Within the block, compute everything in blocks that else compute a part for each token."""
    layers = _selective(model)
    rules = [layer.selector for layer in layers]
    try:
        for layer in layers:
            layer.selector = Selector()
        yield
    finally:
        for layer, rule in zip(layers, rules, strict=True):
            layer.selector = rule


def _selective(model: PreTrainedModel) -> list[SelectiveFFN]:
    if not isinstance(model, MoezooForCausalLM):
        return []
    return [block.mlp for block in model.model.blocks() if type(block.mlp) is SelectiveFFN]


def step_shares(model: MoezooForCausalLM, griffin: float | None) -> tuple[float, float]:
    """Return what a token of the sparse model takes in feed-forward blocks, over the full model's.

    Returns:
        The shares of products, and of weights that are read in whole rows and columns; each block
        weighs by its products.
    """
    every = work = read = 0.0
    for block in model.model.blocks():
        layer = block.mlp
        cost, own = layer.cost(), 0
        shares = (1.0, 1.0)
        if type(layer) is SelectiveFFN:
            own = layer.selector.numbers()
            dense = cost.flops_per_token // 2 - own
            needed = dense + cost.active_parameters - cost.total_parameters
            found = layer.selector.calibrated()
            rows = read_share(found) if layer.gated else needed / dense
            shares = ((needed + own) / dense, rows + own / dense)
        elif type(layer) is DenseFFN and griffin is not None:
            kept = kept_count(layer.d_ff, griffin) / layer.d_ff
            shares = (kept, kept)
        full = cost.flops_per_token - 2 * own
        every, work, read = every + full, work + full * shares[0], read + full * shares[1]
    return (work / every, read / every) if every else (1.0, 1.0)
