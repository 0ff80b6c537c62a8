"""L3: every token has some rows of a table to itself, which the hidden state weighs.

``y = W_mix [RMSNorm(W_up Σ_i softmax(K_x n)_i V_x,i); n]`` with ``n = RMSNorm(h)``, x the token id
and K_x, V_x the rows of that token, 1 to C of them (Tseng & De Sa 2026, arXiv:2601.21461, section
3.1): attention whose keys and values are the token's own, and no other's. Frequent tokens get more
rows than rare ones (:mod:`moezoo.routing.row_allocation`).

Shapes: T tokens, D d_model, N rows in all, C rows of a token at most, E width of a value, U width
of what is mixed in, V size of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from moezoo.errors import InputError, check_choice, check_int, check_number
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
from moezoo.routing.deferred import statistics
from moezoo.routing.row_allocation import frequent_rows, uniform_rows, word_rows
from moezoo.routing.short_convolution import normalised
from moezoo.routing.stats import SlotLoad, slot_load, slot_stats
from moezoo.token_context import Place
from moezoo_kernels.dtypes import at_least_fp32, without_autocast
from moezoo_kernels.linear import Linear

ALLOCATIONS = ("uniform", "frequency", "words")


class L3(ReadsTokenRows):
    """Rows of a token, summed as far as they fit the hidden state, and mixed with it.

    The paper has it between blocks, as a model's ``memory`` is. Padding comes back as zeros. The
    ``stats`` are those of the rows: ``tokens``; ``usage``, the share of rows that were read;
    ``unevenness``, KL(weights || uniform) in nats; and of up to 4096 rows, ``expert_counts``. It
    has no losses.

    Args:
        d_model: width of the residual stream.
        vocab_size: number of tokens V; the model's vocabulary must not be larger.
        num_rows: rows N of all tokens together; default four times as many as tokens.
        max_rows: rows C of a token at most. So many are read for each, the others being nothing.
        d_value: width E of values; default: a row is key and value in one, which the authors find
            no worse.
        d_up: width U of what is mixed in; default twice ``d_model``.
        allocation: how many rows a token gets: ``uniform``, all the same; by ``frequency``; or by
            ``words``, of how many frequent words it is the last token, as in the paper. The latter
            two are found by ``moezoo fit`` in the training tokens, or by :meth:`allocate`.
        sparse: give the tables sparse gradients, so that a step moves only the rows that were read;
            not under torch.compile.
        offload: keep the tables in main memory, from which the rows that are read are fetched
            ahead; wants sparse gradients.
        table_lr_multiplier: learning rate of the tables, as a multiple of the run's. Their rows do
            not decay.
    """

    needs_token_ids: ClassVar[bool] = True
    added: ClassVar[Place | None] = "before_attention"
    added_as: ClassVar[Mapping[str, Any]] = {}
    starts: Tensor
    _is_allocated: bool

    def __init__(
        self,
        d_model: int,
        *,
        vocab_size: int = 32000,
        num_rows: int | None = None,
        max_rows: int = 8,
        d_value: int | None = None,
        d_up: int | None = None,
        allocation: Literal["uniform", "frequency", "words"] = "uniform",
        sparse: bool = False,
        offload: bool = False,
        table_lr_multiplier: float = 1.0,
    ) -> None:
        super().__init__(d_model)
        self.vocab_size = check_int("vocab_size", vocab_size)
        self.max_rows = check_int("max_rows", max_rows, maximum=4096)
        most = vocab_size * max_rows
        self.num_rows = min(4 * vocab_size, most)
        if num_rows is not None:
            self.num_rows = check_int("num_rows", num_rows, minimum=vocab_size, maximum=most)
        self.d_value = None if d_value is None else check_int("d_value", d_value)
        self.d_up = 2 * d_model if d_up is None else check_int("d_up", d_up)
        self.allocation = check_choice("allocation", allocation, ALLOCATIONS)
        self.sparse, self.offload = sparse, offload
        self.table_lr_multiplier = check_number("table_lr_multiplier", table_lr_multiplier)
        # Logits of a normalised state have unit variance.
        std = d_model**-0.5
        kind: dict[str, Any] = {"sparse": sparse, "offload": offload}
        self.keys = TokenTable(self.num_rows, d_model, width_name="d_model", std=std, **kind)
        self.values = None
        if d_value is not None:
            self.values = TokenTable(self.num_rows, d_value, width_name="d_value", **kind)
        self.norm = nn.RMSNorm(d_model, eps=1e-6)
        self.up_proj = Linear(d_value or d_model, self.d_up, bias=False)
        self.up_norm = nn.RMSNorm(self.d_up, eps=1e-6)
        self.mix_proj = Linear(self.d_up + d_model, d_model, bias=False)
        # The rows of token x are starts[x] to starts[x + 1].
        self.register_buffer("starts", torch.empty(vocab_size + 1, dtype=torch.int64))
        self._reset_rest()

    @property
    def missing_input(self) -> Literal["frequencies", "tokens"] | None:
        """What :meth:`allocate` waits for; None once tokens have their rows."""
        # Loaders that replace tensors one by one do not tell the layer: look, but only once.
        if not self._is_allocated:
            self._is_allocated = bool((self.starts >= 0).all())
        if self._is_allocated:
            return None
        return "frequencies" if self.allocation == "frequency" else "tokens"

    def reset_parameters(self, num_layers: int = 1) -> None:
        """Draw keys from N(0, 1 / D) and values from N(0, 1); forget what rows tokens have."""
        self.keys.reset_parameters()
        if self.values is not None:
            self.values.reset_parameters()
        self._reset_rest(num_layers)

    def _reset_rest(self, num_layers: int = 1) -> None:
        self.norm.reset_parameters()
        self.up_norm.reset_parameters()
        init_linear(self.up_proj, self.up_proj.in_features**-0.5)
        init_linear(self.mix_proj, output_std(self.mix_proj.in_features, num_layers))
        self._is_allocated = self.allocation == "uniform"
        if self.starts.is_meta:
            return  # its size may be a damaged file's, and nothing would keep what is dealt out
        if self._is_allocated:
            self.set_rows(uniform_rows(self.vocab_size, self.num_rows))
        else:
            self.starts.fill_(-1)

    def allocate(
        self,
        frequencies: Tensor | None = None,
        tokens: Tensor | None = None,
        end: int | None = None,
    ) -> None:
        """Decide how many rows each token has, before any training.

        Args:
            frequencies: ``(V,)``, how often each token occurs; for ``frequency``.
            tokens: ``(any,)`` ids of a text; for ``words``.
            end: the token that ends a document in it.

        Raises:
            InputError: what the allocation follows from is missing or of a wrong shape, or tokens
                are outside the vocabulary.
        """
        if self.allocation == "uniform":
            raise InputError("allocation: all tokens have the same rows; nothing to allocate")
        sizes = (self.num_rows, self.max_rows)
        if self.allocation == "frequency":
            if frequencies is None or frequencies.shape != (self.vocab_size,):
                given = "missing" if frequencies is None else f"there are {len(frequencies)}"
                raise InputError(f"frequencies: {given}; give one per token, {self.vocab_size}")
            self.set_rows(frequent_rows(frequencies, *sizes))
            return
        if tokens is None:
            raise InputError("tokens: missing; give the ids of a text")
        self.set_rows(word_rows(tokens.flatten().tolist(), self.vocab_size, *sizes, end))

    def set_rows(self, rows_V: Tensor) -> None:
        """Set each token's number of rows, ``(V,)``, on any device.

        Raises:
            InputError: they are not one to ``max_rows`` each, and ``num_rows`` together.
        """
        if rows_V.shape != (self.vocab_size,) or rows_V.is_floating_point():
            raise InputError(
                f"rows: give {self.vocab_size} integers, not {rows_V.dtype} {tuple(rows_V.shape)}"
            )
        low, high = int(rows_V.min()), int(rows_V.max())
        if low < 1 or high > self.max_rows or int(rows_V.sum()) != self.num_rows:
            raise InputError(
                f"rows: {low} to {high} of a token and {int(rows_V.sum())} in all; give 1 to "
                f"{self.max_rows}, and {self.num_rows} in all"
            )
        self.starts[0] = 0
        self.starts[1:] = rows_V.cumsum(dim=0)
        self._is_allocated = True

    def check_table(self) -> None:
        """Check what rows tokens have, as read from a file.

        Raises:
            InputError: they are not those of this table.
        """
        if self.starts.is_meta or bool((self.starts == -1).all()):
            return
        rows_V = self.starts.diff()
        fits = self.starts[0] == 0 and self.starts[-1] == self.num_rows
        if not fits or rows_V.min() < 1 or rows_V.max() > self.max_rows:
            raise InputError(
                f"starts: they are not those of {self.num_rows} rows, 1 to {self.max_rows} for "
                "each token; the weights are damaged"
            )

    def _compute(
        self, hidden: Tensor, context: TokenContext, brute_force: bool
    ) -> FeedForwardOutput:
        """Weigh each token's rows; by brute force, by indexing."""
        slots_TC, mask_T = self.rows_ahead(hidden, context)
        read = self.keys.reference_rows if brute_force else self.keys.rows
        given = hidden, slots_TC, slots_TC >= 0, mask_T, brute_force
        output, weights_TC = self._answer(read(slots_TC), *given)
        stats = statistics(self, slot_stats, slots_TC, weights_TC, self.num_rows, mask_T)
        return FeedForwardOutput(output, {}, stats)

    def infer(
        self,
        hidden: Tensor,
        *,
        token_ids: Tensor | None = None,
        router_input: Tensor | None = None,
        mask: Tensor | None = None,
        **more: Any,
    ) -> Tensor:
        """Weigh each token's rows, without checks and statistics."""
        alone = token_ids is not None and token_ids.shape == hidden.shape[:-1]
        if not alone or self.missing_input or self.values is not None:
            return super().infer(hidden, token_ids=token_ids, mask=mask)
        assert token_ids is not None
        mask_T = None if mask is None else mask.reshape(-1)
        slots_TC, end_T1 = self._slots(token_ids.reshape(-1, 1))
        # Where a token has no more rows, its last one is read and not weighed.
        keys_TCD = self.keys.looked_up(slots_TC.minimum(end_T1 - 1))
        return self._answer(keys_TCD, hidden, slots_TC, slots_TC < end_T1, mask_T, False)[0]

    def _answer(
        self,
        keys_TCD: Tensor,
        hidden: Tensor,
        slots_TC: Tensor,
        there_TC: Tensor,
        mask_T: Tensor | None,
        brute_force: bool,
    ) -> tuple[Tensor, Tensor]:
        """Return the output, ``(..., D)``, of each token's keys, and the weights ``(T, C)``."""
        x_TD = hidden.reshape(-1, self.d_model)
        normed_TD = normalised(self.norm, x_TD)
        keys_TCD = at_least_fp32(keys_TCD)
        weights_TC = self._weigh(normed_TD, keys_TCD, there_TC)
        if self.values is None:
            with without_autocast(hidden.device.type):
                sum_TE = torch.bmm(weights_TC.unsqueeze(1), keys_TCD).squeeze(1)
        elif brute_force:
            rows_TCE = self.values.reference_rows(slots_TC)
            sum_TE = (weights_TC.unsqueeze(-1) * rows_TCE).sum(dim=1)
        else:
            sum_TE = self.values(slots_TC, weights_TC, None)
        up_TU = normalised(self.up_norm, self.up_proj(sum_TE.to(x_TD.dtype)))
        output_TD = self.mix_proj(torch.cat([up_TU, normed_TD.to(up_TU.dtype)], -1).to(x_TD.dtype))
        if mask_T is not None:
            output_TD = output_TD.masked_fill(~mask_T.unsqueeze(-1), 0.0)
        return output_TD.reshape(hidden.shape), weights_TC

    def _weigh(self, normed_TD: Tensor, keys_TCD: Tensor, there_TC: Tensor) -> Tensor:
        """Return the weights ``(T, C)``, in fp32 at least; zeros where there is no row."""
        with without_autocast(normed_TD.device.type):
            wide = torch.promote_types(normed_TD.dtype, keys_TCD.dtype)
            scores_TC = torch.bmm(keys_TCD.to(wide), normed_TD.to(wide).unsqueeze(-1)).squeeze(-1)
        # A finite value, so that padding, which has no row, gets no NaN.
        least = torch.finfo(scores_TC.dtype).min
        weights_TC = scores_TC.masked_fill(~there_TC, least).softmax(dim=-1)
        return weights_TC.masked_fill(~there_TC, 0.0)

    def rows_of(self, hidden: Tensor, context: TokenContext) -> tuple[Tensor, Tensor | None]:
        """Return each token's rows, ``(T, C)``, -1 where it has no more, and the mask ``(T,)``.

        Raises:
            InputError: token ids are missing or outside the vocabulary, a shape does not match, or
                tokens have no rows yet.
        """
        if self.missing_input:
            raise InputError(
                f"allocation: no token has its rows by {self.allocation} yet; call allocate, load "
                "a checkpoint that has them, or train by moezoo fit"
            )
        ids_T1, mask_T = rows_of_tokens(hidden, context, self.vocab_size, "L3")
        slots_TC, end_T1 = self._slots(ids_T1.clamp(min=0))
        return slots_TC.masked_fill((slots_TC >= end_T1) | (ids_T1 < 0), -1), mask_T

    def _slots(self, ids_T1: Tensor) -> tuple[Tensor, Tensor]:
        """Return rows from each token's first on, ``(T, C)``, and where they end, ``(T, 1)``."""
        first_T1, end_T1 = self.starts[ids_T1], self.starts[ids_T1 + 1]
        return first_T1 + torch.arange(self.max_rows, device=ids_T1.device), end_T1

    def token_tables(self) -> list[TokenTable]:
        """Return keys and values."""
        return [self.keys] if self.values is None else [self.keys, self.values]

    def weighed_rows(self, hidden: Tensor, context: TokenContext) -> tuple[Tensor, Tensor]:
        """Return each token's rows, ``(T, C)``, -1 where it has no more, and their weights."""
        slots_TC, _ = self.rows_of(hidden, context)
        keys_TCD = at_least_fp32(self.keys.rows(slots_TC))
        normed_TD = normalised(self.norm, hidden.reshape(-1, self.d_model))
        return slots_TC, self._weigh(normed_TD, keys_TCD, slots_TC >= 0)

    def _slot_load(self, hidden: Tensor, context: TokenContext) -> SlotLoad:
        """Sum up the weights of the rows."""
        return slot_load(*self.weighed_rows(hidden, context), self.num_rows, kind="rows")

    def parameter_groups(self) -> list[ParameterGroup]:
        """Put the tables apart: a learning rate of their own, no decay, perhaps sparse."""
        rate = self.table_lr_multiplier
        special = [group for table in self.token_tables() for group in row_group(table, rate)]
        return set_apart(super().parameter_groups(), special)

    def cost(self) -> Cost:
        """Return the FLOPs of reading, weighing and summing a token's rows, and of the projections.

        ``2 D N / V`` and ``2 C D`` for keys, ``2 C D`` for keys that are values and ``2 E N / V``
        for others: N / V rows are a token's on average over the vocabulary, C are multiplied with.
        """
        rows = self.d_model + (self.d_value or 0)
        own = -(-self.num_rows // self.vocab_size)
        total = all_numbers(self)
        active = total - (self.num_rows - own) * rows
        projections = self.up_proj.weight.numel() + self.mix_proj.weight.numel()
        products = (4 if self.d_value is None else 2) * self.max_rows * self.d_model
        flops = 2 * rows * self.num_rows // self.vocab_size + products + 2 * projections
        return Cost(
            total_parameters=total,
            active_parameters=active,
            flops_per_token=flops,
            bytes_per_token=active * self.mix_proj.weight.element_size(),
        )


register(
    Method(
        "l3",
        L3,
        Paper("Tseng & De Sa", 2026, "L3: Large Lookup Layers", "2601.21461"),
    )
)
