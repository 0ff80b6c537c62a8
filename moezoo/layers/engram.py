"""Engram: a memory of n-grams, which the token's last ids address, beside a dense block or alone.

``y = FFN(h) + g v``, ``v = W_v e`` and ``g = σ(sign(z) sqrt(max(|z|, 1e-6)))``,
``z = RMSNorm(W_k e) · RMSNorm(h) / sqrt(D)``, where e are the rows of a token's n-grams, one per
hash function, end to end (Cheng et al. 2026, arXiv:2601.07372, sections 2.2 and 2.3). The paper
has no dense block in it, adds the memory to the residual stream before attention, and to that
``SiLU(Conv(RMSNorm(g v)))``, a short causal convolution of each feature.

Shapes: T tokens, those of B sequences of length S; D d_model, H hash functions of all orders, M
width of all H rows, V size of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from moezoo.errors import InputError, check_flag, check_int, check_number
from moezoo.experts.token_table import (
    ReadsTokenRows,
    TokenTable,
    all_numbers,
    row_group,
    rows_of_tokens,
)
from moezoo.feed_forward import (
    Cost,
    FeedForwardOutput,
    Method,
    Paper,
    ParameterGroup,
    TokenContext,
    register,
    set_apart,
)
from moezoo.init import init_linear, output_std
from moezoo.layers.dense import DenseFFN, default_width
from moezoo.routing.deferred import statistics
from moezoo.routing.hashing import aligned
from moezoo.routing.memory_numbers import memory_number
from moezoo.routing.ngram import Hash, NGramHash
from moezoo.routing.short_convolution import ShortConvolution, normalised
from moezoo.routing.stats import SlotLoad, slot_load, slot_stats
from moezoo.token_context import History, Place
from moezoo_kernels.linear import Linear

TAPS = 4
"""Of the convolution; they are as far apart as the longest n-gram is long."""


class Engram(ReadsTokenRows):
    """A gated linear unit beside rows of a table that hashes of the last tokens name.

    As one of a model's ``memory`` it is without the gated linear unit and has the convolution.

    A call takes ``token_ids`` of ``(..., S)``, or ``(..., L)`` with earlier tokens of the same
    sequences, of which the last ``max_ngram - 1`` are read. Padding comes back as zeros. The
    ``stats`` are those of the rows: ``tokens``; ``usage``, the share of rows that were read;
    ``unevenness``, KL(reads || uniform) in nats; and of up to 4096 rows, ``expert_counts``. It has
    no losses.

    Args:
        d_model: width of the residual stream.
        d_ff: hidden width of the dense block; 0 for none; default that of a gated linear unit.
        max_ngram: highest order of n-grams; all from 2 on are there.
        num_heads: hash functions per order.
        num_rows: rows of each at least; default d_model² / 4. See
            :class:`moezoo.routing.ngram.NGramHash`.
        d_memory: width M of a token's rows together, a multiple of their number; default d_model,
            rounded up to one.
        gate: scale what is read by how well it fits the hidden state.
        convolution: add a convolution of the last tokens' gated values; without a dense block that
            is the paper's memory. Needs a ``history`` in cached generation.
        hash_function: ``splitmix`` or ``numpy`` multipliers, or ``polynomial``.
        compression: hash classes of tokens that read alike in place of tokens. They are saved with
            the weights; ``moezoo fit`` makes them from the run's tokenizer, and without it
            :meth:`classify` does.
        index: which memory of the model this is, from 0; another has other hash functions. Default:
            the first number that no memory before it has.
        seed: where the hash functions' multipliers begin.
        vocab_size: number of tokens V; the model's vocabulary must not be larger.
        boundary_id: the token that ends a document, beyond which no n-gram reaches back; None:
            sequences are whole documents.
        sparse: give the table sparse gradients, so that a step moves only the rows that were read;
            not under torch.compile.
        offload: keep the table in main memory, from which the rows that are read are fetched
            ahead; wants sparse gradients.
        table_lr_multiplier: learning rate of the table, as a multiple of the run's. Its rows do not
            decay.
    """

    needs_token_ids: ClassVar[bool] = True
    added: ClassVar[Place | None] = "before_attention"
    added_as: ClassVar[Mapping[str, Any]] = {"d_ff": 0, "convolution": True}
    _is_classified: bool

    def __init__(
        self,
        d_model: int,
        *,
        d_ff: int | None = None,
        max_ngram: int = 3,
        num_heads: int = 8,
        num_rows: int | None = None,
        d_memory: int | None = None,
        gate: bool = True,
        convolution: bool = False,
        compression: bool = False,
        hash_function: Hash = "splitmix",
        index: int | None = None,
        seed: int = 0,
        vocab_size: int = 32000,
        boundary_id: int | None = None,
        sparse: bool = False,
        offload: bool = False,
        table_lr_multiplier: float = 5.0,
    ) -> None:
        super().__init__(d_model)
        usual = default_width(d_model, gated=True)
        self.d_ff = usual if d_ff is None else check_int("d_ff", d_ff, minimum=0)
        self.num_rows = max(2, d_model * d_model // 4) if num_rows is None else num_rows
        if index is not None:
            check_int("index", index, minimum=0)
        self.hash = NGramHash(
            vocab_size,
            max_ngram=max_ngram,
            num_heads=num_heads,
            num_rows=self.num_rows,
            index=memory_number(index),
            seed=seed,
            hash_function=hash_function,
            boundary_id=boundary_id,
        )
        self.max_ngram, self.num_heads, self.vocab_size = max_ngram, num_heads, vocab_size
        self.hash_function, self.index, self.seed = hash_function, index, seed
        self.boundary_id = boundary_id
        heads = len(self.hash.sizes)
        if d_memory is None:
            d_memory = -(-d_model // heads) * heads
        self.d_memory = check_int("d_memory", d_memory)
        if d_memory % heads:
            raise InputError(
                f"d_memory: {d_memory} is not a multiple of the {heads} rows of a token; "
                "make it one"
            )
        self.gate = check_flag("gate", gate)
        self.compression = check_flag("compression", compression)
        self._is_classified = not compression
        self.sparse, self.offload = sparse, offload
        self.table_lr_multiplier = check_number("table_lr_multiplier", table_lr_multiplier)
        self.ffn = DenseFFN(d_model, self.d_ff) if self.d_ff else None
        kind: dict[str, Any] = {"width_name": "d_memory", "sparse": sparse, "offload": offload}
        self.table = TokenTable(self.hash.total_rows, d_memory // heads, **kind)
        self.value_proj = Linear(d_memory, d_model, bias=False)
        if gate:
            self.key_proj = Linear(d_memory, d_model, bias=False)
            self.key_norm = nn.RMSNorm(d_model, eps=1e-6)
            self.query_norm = nn.RMSNorm(d_model, eps=1e-6)
        self.convolution = check_flag("convolution", convolution)
        self.conv = ShortConvolution(d_model, TAPS, max_ngram) if convolution else None
        self._forget_classes()
        self._reset_projections()

    @property
    def needs_earlier_tokens(self) -> bool:
        """True: n-grams reach back."""
        return True

    @property
    def keeps_history(self) -> bool:
        """Whether there is a convolution, which reads values of earlier tokens."""
        return self.convolution

    @property
    def missing_input(self) -> Literal["tokenizer"] | None:
        """What :meth:`classify` waits for; None once the classes are there."""
        # Loaders that replace tensors one by one do not tell the layer: look, but only once.
        if not self._is_classified:
            self._is_classified = bool((self.hash.compressed >= 0).all())
        return None if self._is_classified else "tokenizer"

    def classify(self, classes: Tensor) -> None:
        """Hash these classes in place of tokens, before any training.

        Args:
            classes: ``(V,)`` whole numbers; see :func:`moezoo.routing.ngram.text_classes`.

        Raises:
            InputError: the layer has no compression, or as :meth:`NGramHash.compress`.
        """
        if not self.compression:
            raise InputError("compression: this memory hashes tokens themselves; set it to true")
        self.hash.compress(classes)
        self._is_classified = True

    def _forget_classes(self) -> None:
        if self.compression and not self.hash.compressed.is_meta:
            self.hash.compressed.fill_(-1)
        self._is_classified = not self.compression

    def reset_parameters(self, num_layers: int = 1) -> None:
        """Draw rows from N(0, 1), projections as those of a dense block; hash as the seed says."""
        self.hash.reset_parameters()
        self._forget_classes()
        if self.ffn is not None:
            self.ffn.reset_parameters(num_layers)
        self.table.reset_parameters()
        self._reset_projections(num_layers)

    def _reset_projections(self, num_layers: int = 1) -> None:
        init_linear(self.value_proj, output_std(self.d_memory, num_layers))
        if self.gate:
            init_linear(self.key_proj, self.d_memory**-0.5)
            self.key_norm.reset_parameters()
            self.query_norm.reset_parameters()
        if self.conv is not None:
            self.conv.reset_parameters()

    def _compute(
        self, hidden: Tensor, context: TokenContext, brute_force: bool
    ) -> FeedForwardOutput:
        """Read each token's rows; by brute force, by indexing."""
        rows_TH, mask_T = self.rows_ahead(hidden, context)
        read = self.table.reference_rows if brute_force else self.table.rows
        if self.conv is not None:
            given = (context.token_ids, context.mask, self.vocab_size, "Engram")
            token_ids, mask = aligned(hidden, *given)
            context = context._replace(token_ids=token_ids, mask=mask)
        output = self._answer(read(rows_TH), hidden, context, mask_T, brute_force)
        stats = statistics(self, slot_stats, rows_TH, None, self.hash.total_rows, mask_T)
        return FeedForwardOutput(output, {}, stats)

    def infer(
        self,
        hidden: Tensor,
        *,
        token_ids: Tensor | None = None,
        router_input: Tensor | None = None,
        mask: Tensor | None = None,
        history: History | None = None,
        **more: Any,
    ) -> Tensor:
        """Read each token's rows, without checks and statistics."""
        context = TokenContext(token_ids, None, mask, history=history)
        whole = token_ids is not None and (mask is None or mask.shape == token_ids.shape)
        if not whole or hidden.ndim == 1 or self.missing_input:
            return super().infer(hidden, token_ids=token_ids, mask=mask, history=history)
        assert token_ids is not None
        length = hidden.shape[-2]
        rows_TH = self._hashed(token_ids, mask, length)
        mask_T = None if mask is None else mask[..., mask.shape[-1] - length :].reshape(-1)
        return self._answer(self.table.looked_up(rows_TH), hidden, context, mask_T, False)

    def _answer(
        self,
        rows_THM: Tensor,
        hidden: Tensor,
        context: TokenContext,
        mask_T: Tensor | None,
        brute_force: bool,
    ) -> Tensor:
        """Return the output, ``(..., D)``, of the rows of each token's hash functions."""
        x_TD = hidden.reshape(-1, self.d_model)
        e_TM = rows_THM.flatten(1).to(x_TD.dtype)
        memory_TD = self.value_proj(e_TM)
        if self.gate:
            memory_TD = self._openness(x_TD, e_TM).to(memory_TD.dtype) * memory_TD
        if self.conv is not None:
            memory_TD = memory_TD + self._convolved(memory_TD, hidden, context, brute_force)
        output_TD = memory_TD if self.ffn is None else self.ffn(x_TD).hidden + memory_TD
        if mask_T is not None:
            output_TD = output_TD.masked_fill(~mask_T.unsqueeze(-1), 0.0)
        return output_TD.reshape(hidden.shape)

    def _openness(self, x_TD: Tensor, e_TM: Tensor) -> Tensor:
        """Return the gates ``(T, 1)``, in fp32 at least; one half where z is 0."""
        key_TD = normalised(self.key_norm, self.key_proj(e_TM))
        query_TD = normalised(self.query_norm, x_TD)
        fit_T1 = (key_TD * query_TD).sum(dim=-1, keepdim=True) * self.d_model**-0.5
        return (fit_T1.sign() * fit_T1.abs().clamp(min=1e-6).sqrt()).sigmoid()

    def _convolved(
        self, memory_TD: Tensor, hidden: Tensor, context: TokenContext, brute_force: bool
    ) -> Tensor:
        """Return the convolution of gated values, ``(T, D)``; ids and mask are of one length."""
        assert self.conv is not None
        assert context.token_ids is not None
        length = hidden.shape[-2] if hidden.ndim > 1 else 1
        if context.token_ids.shape[-1] > length and context.history is None:
            raise InputError(
                "history: the convolution reads values of earlier tokens, which their ids do not "
                "give; give all tokens at once, or a cache"
            )
        last = slice(-(self.conv.reach + length), None)
        ends = None
        if self.boundary_id is not None:
            ends = context.token_ids[..., last] == self.boundary_id
        if context.mask is not None:
            padding = ~context.mask[..., last]
            ends = padding if ends is None else ends | padding
        if ends is not None:
            ends = ends.reshape(-1, ends.shape[-1])
        values_BSD = memory_TD.reshape(-1, length, self.d_model) if length else memory_TD[None]
        found: Tensor = self.conv(values_BSD, ends, context.history, brute_force)
        return found.reshape(memory_TD.shape)

    def rows_of(self, hidden: Tensor, context: TokenContext) -> tuple[Tensor, Tensor | None]:
        """Return each token's rows, ``(T, H)``, -1 at padding, and the mask ``(T,)``.

        Raises:
            InputError: token ids are missing or outside the vocabulary, a shape does not match, or
                the classes of tokens are not there.
        """
        if self.missing_input:
            raise InputError(
                "compression: the classes of tokens are not there; call classify, load a "
                "checkpoint that has them, or train by moezoo fit"
            )
        return rows_of_tokens(hidden, context, self.vocab_size, "Engram", self._hashed)

    def token_tables(self) -> list[TokenTable]:
        """Return the table."""
        return [self.table]

    def _hashed(self, token_ids: Tensor, mask: Tensor | None, length: int) -> Tensor:
        rows: Tensor = self.hash(token_ids, mask, length)
        return rows.flatten(1).t()

    def _slot_load(self, hidden: Tensor, context: TokenContext) -> SlotLoad:
        """Count how often each row is read."""
        rows_TH, _ = self.rows_of(hidden, context)
        return slot_load(rows_TH, None, self.hash.total_rows, kind="rows")

    def parameter_groups(self) -> list[ParameterGroup]:
        """Put the table apart: a learning rate of its own, no decay, perhaps sparse.

        The convolution's taps do not decay either.
        """
        special = row_group(self.table, self.table_lr_multiplier)
        if self.conv is not None and self.conv.weight.requires_grad:
            special.append(ParameterGroup("taps", [self.conv.weight], weight_decay=False))
        return set_apart(super().parameter_groups(), special)

    def cost(self) -> Cost:
        """Return the dense block's, ``2 M D`` FLOPs per projection and ``2 M`` of the rows.

        The convolution is no matrix product, and of as few operations as a norm.
        """
        table = self.table.num_slots * self.table.v_dim
        total = all_numbers(self)
        active = total - table + self.d_memory
        projections = (2 if self.gate else 1) * self.d_memory * self.d_model
        dense = 0 if self.ffn is None else self.ffn.cost().flops_per_token
        flops = dense + 2 * projections + 2 * self.d_memory
        return Cost(
            total_parameters=total,
            active_parameters=active,
            flops_per_token=flops,
            bytes_per_token=active * self.value_proj.weight.element_size(),
        )


register(
    Method(
        "engram",
        Engram,
        Paper(
            "Cheng et al.",
            2026,
            "Conditional Memory via Scalable Lookup: A New Axis of Sparsity for Large Language "
            "Models",
            "2601.07372",
        ),
    )
)
