"""Hash layers: a fixed function of the token, not a learned router, chooses its expert.

``y_t = FFN_{hash(x_t)}(h_t)`` with x the token ids and h the hidden states (Roller et al. 2021,
arXiv:2106.04426, section 3). With R hash functions (MultiHash, section 3.3) the hidden width is cut
into R segments, and each hash function chooses the expert that lends its segment:
``y_t = Σ_r C^r_{hash_r(x_t)} relu(B^r_{hash_r(x_t)} h_t)``. No router, no auxiliary loss.

DeepSeek-V4 sends a token to K whole experts by its id and learns how they are weighed, from the
hidden state (DeepSeek-AI 2026, arXiv:2606.19348, section 2.1):
``y_t = Σ_k w_k(h_t) FFN_{hash_k(x_t)}(h_t)``.

Shapes: S tokens of a sequence, L >= S tokens known of it, T tokens of the batch, V size of the
vocabulary, E experts, R hash functions, or K experts per token: C choices, of which one is 1.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from moezoo.errors import InputError, check_choice, check_int, check_number
from moezoo.experts import MLPExperts
from moezoo.feed_forward import (
    Cost,
    FeedForward,
    FeedForwardOutput,
    Method,
    Paper,
    TokenContext,
    flatten_tokens,
    register,
)
from moezoo.init import output_std
from moezoo.layers.dense import Activation, default_width
from moezoo.routing import Routing, hashing
from moezoo.routing.deferred import statistics
from moezoo.routing.hash_gate import SCORES, HashGate, Score, check_learned
from moezoo.routing.stats import SlotLoad, slot_load, slot_stats
from moezoo_kernels.activations import ACTIVATIONS

KEYS = ("token", "previous", "bigram", "position", "future")
HASH_FUNCTIONS = ("random", "balanced", "clustered", "dispersed")


class HashLayer(FeedForward):
    """Experts chosen by hashing token ids; each is a dense block's feed-forward network.

    The hash is a table, int64, in the state dict. A random one is drawn from ``seed``; for the
    others call :meth:`build_table` with what they follow from, once, before the first use.

    A call takes ``token_ids`` of ``(..., S)``, or ``(..., L)`` with earlier tokens of the same
    sequences, and a ``mask`` of the shape of ``hidden`` or of ``token_ids``; padding is not counted
    as a position, and never is a token's previous one. Its ``stats``: ``expert_counts`` (E,),
    choices per expert; ``tokens``; ``usage``, the share of experts that were chosen;
    ``unevenness``, KL(load || uniform) in nats. It has no losses.

    Args:
        d_model: width of the residual stream.
        num_experts: number of experts E.
        d_expert: hidden width of one expert; default that of the dense block, so that a token
            costs what the dense block costs, in all its experts (rounded up to a multiple of
            num_hashes).
        num_hashes: number of hash functions R, which divides d_expert; more than 1 is MultiHash.
        top_k: whole experts per token K; several have learned weights. A random table gives a token
            different ones; in others one may stand twice, and then answers twice.
        key: what is hashed: the ``token`` itself, the ``previous`` one, the ``bigram`` of both,
            the ``position`` (modulo E), or the ``future`` token, which is the paper's oracle: a
            bound, not a language model.
        hash_function: ``random``; ``balanced`` by token frequencies; ``clustered`` by similarity
            of embeddings; ``dispersed`` against it.
        vocab_size: number of token ids that the table has room for.
        seed: where the table's random numbers begin; layers of equal seed have equal tables.
        activation: relu, gelu, gelu_tanh, silu, relu2 (squared ReLU), quick_gelu, tanh or
            leaky_relu (0.01 below zero).
        gated: gated linear units instead of MLPs.
        bias: whether the experts' projections have biases.
        allow_future: train with ``key="future"`` although it reads the token to be predicted.
        weights: ``one``, or ``learned``, scores of the chosen experts over their sum.
        score: of learned weights: sqrt_softplus, sigmoid or softmax.
        scale: factor on learned weights.
        compat: ``parlai`` is the block of the authors' code: ``LN(h_t + FFN_{hash(x_t)}(h_t))``,
            with one layer norm for all experts, of ReLU and one hash (theirs have biases).
    """

    needs_token_ids: ClassVar[bool] = True
    table: Tensor
    _is_built: bool

    def __init__(
        self,
        d_model: int,
        *,
        num_experts: int = 16,
        d_expert: int | None = None,
        num_hashes: int = 1,
        top_k: int = 1,
        key: Literal["token", "previous", "bigram", "position", "future"] = "token",
        hash_function: Literal["random", "balanced", "clustered", "dispersed"] = "random",
        vocab_size: int = 32000,
        seed: int = 0,
        activation: Activation = "relu",
        gated: bool = False,
        bias: bool = False,
        allow_future: bool = False,
        weights: Literal["one", "learned"] = "one",
        score: Score = "sqrt_softplus",
        scale: float = 1.0,
        compat: Literal["parlai"] | None = None,
    ) -> None:
        super().__init__(d_model)
        self.num_experts = check_int("num_experts", num_experts)
        self.num_hashes = check_int("num_hashes", num_hashes)
        self.top_k = check_int("top_k", top_k, maximum=num_experts)
        if d_expert is None:
            parts = num_hashes * top_k
            d_expert = -(-default_width(d_model, gated) // parts) * num_hashes
        self.d_expert = check_int("d_expert", d_expert)
        if d_expert % num_hashes:
            raise InputError(
                f"num_hashes: {num_hashes} does not divide d_expert={d_expert}; give a divisor"
            )
        self.key = check_choice("key", key, KEYS)
        self.hash_function = check_choice("hash_function", hash_function, HASH_FUNCTIONS)
        if key == "position" and num_hashes > 1:
            raise InputError("num_hashes: positions have one hash, modulo E; set it to 1")
        if key in ("position", "bigram") and hash_function != "random":
            raise InputError(
                f"hash_function: '{hash_function}' is a hash of single tokens; "
                f"with key '{key}' set it to random"
            )
        self.vocab_size = check_int("vocab_size", vocab_size)
        self.seed = check_int("seed", seed, minimum=0)
        self.activation = check_choice("activation", activation, ACTIVATIONS)
        self.gated = gated
        self.bias = bias
        self.allow_future = allow_future
        self.weights = check_choice("weights", weights, ("one", "learned"))
        self.score = check_choice("score", score, SCORES)
        self.scale = check_number("scale", scale)
        check_learned(weights, top_k, num_hashes, key, score, scale)
        self.compat = compat if compat is None else check_choice("compat", compat, ["parlai"])
        if compat and (activation != "relu" or gated or num_hashes > 1 or top_k > 1):
            raise InputError(
                "compat: the experts in parlai are MLPs of relu with one hash; set activation to "
                "relu, gated to false, num_hashes and top_k to 1, or compat to null"
            )

        # Segment r of expert e is expert e R + r of this store.
        self.experts = MLPExperts(
            d_model,
            d_expert // num_hashes,
            num_experts * num_hashes,
            activation=activation,
            gated=gated,
            bias=bias,
        )
        self.norm = nn.LayerNorm(d_model) if compat else None
        self.gate = HashGate(d_model, num_experts, score, scale) if weights == "learned" else None
        # One row per choice, two for bigrams; the last column is for where there is no token.
        rows = 0 if key == "position" else num_hashes * top_k * (2 if key == "bigram" else 1)
        self.register_buffer("table", torch.empty(rows, vocab_size + 1, dtype=torch.int64))
        self.reset_parameters()

    @property
    def causal(self) -> bool:
        """False for the oracle, which looks at the next token."""
        return self.key != "future"

    @property
    def needs_earlier_tokens(self) -> bool:
        """Whether the hash of a token depends on those before it."""
        return self.key in ("previous", "bigram", "position")

    @property
    def missing_input(self) -> Literal["frequencies", "embeddings"] | None:
        """What :meth:`build_table` waits for; None once there is a table."""
        # Loaders that replace tensors one by one do not tell the layer: look, but only once.
        if not self._is_built:
            self._is_built = bool((self.table >= 0).all())
        if self._is_built:
            return None
        return "frequencies" if self.hash_function == "balanced" else "embeddings"

    def reset_parameters(self, num_layers: int = 1) -> None:
        """Initialise the experts as dense blocks; draw a random table, forget any other."""
        self.experts.reset_parameters(num_layers)
        nn.init.normal_(self.experts.down_proj, std=output_std(self.d_expert, num_layers))
        if self.norm is not None:
            self.norm.reset_parameters()
        if self.gate is not None:
            self.gate.reset_parameters()
        if self.table.is_meta:
            pass  # its size may be a damaged file's, and nothing would keep what is drawn
        elif self.hash_function == "random":
            self.table.copy_(self._draw(*self.table.shape))
        else:
            self.table.fill_(-1)
        self._is_built = self.hash_function == "random"

    def check_table(self) -> None:
        """Check a table that was read from a file.

        Raises:
            InputError: it names experts that do not exist.
        """
        if self.table.is_meta or not self.table.numel():
            return
        low, high = (int(bound) for bound in self.table.aminmax())
        if low < -1 or high >= self.num_experts:
            raise InputError(
                f"table: it names the experts {low} to {high}, and there are {self.num_experts}; "
                "the weights are damaged"
            )

    def _generator(self) -> torch.Generator:
        return torch.Generator("cpu").manual_seed(self.seed)

    def _draw(self, rows: int, columns: int) -> Tensor:
        draw = hashing.different_experts if self.top_k > 1 else hashing.random_experts
        return draw(rows, columns, self.num_experts, self._generator())

    def build_table(
        self,
        frequencies: Tensor | None = None,
        embeddings: Tensor | None = None,
        num_clusters: int | None = None,
    ) -> None:
        """Compute the table of this layer's ``hash_function``; the same input gives the same one.

        Args:
            frequencies: ``(V,)``, how often each token occurs; for ``balanced``.
            embeddings: ``(V, any)``, a trained model's; for ``clustered`` and ``dispersed``.
            num_clusters: for ``dispersed``; default num_experts.

        Raises:
            InputError: the input that the hash function needs is missing or of a wrong shape.
        """
        kind, generator = self.hash_function, self._generator()
        source = frequencies if kind == "balanced" else embeddings
        if kind == "random":
            raise InputError("hash_function: a random table is there already; nothing to build")
        if source is None or len(source) != self.vocab_size:
            name = "frequencies" if kind == "balanced" else "embeddings"
            given = "missing" if source is None else f"there are {len(source)}"
            raise InputError(
                f"{name}: {given}; a {kind} table wants one per token, {self.vocab_size}"
            )
        sizes = (self.num_hashes * self.top_k, self.num_experts)
        self.set_table(hashing.built_tables(kind, source, *sizes, generator, num_clusters))

    def set_table(self, table: Tensor) -> None:
        """Install a table of one's own, on any device.

        Args:
            table: expert of each token, ``(V,)``, or ``(C, V)`` for each choice (for bigrams
                ``(2 R, V)``). Where there is no token, the expert is a random one.

        Raises:
            InputError: wrong shape, or an expert that does not exist.
        """
        table = table[None] if table.ndim == 1 else table
        wanted = (self.table.shape[0], self.vocab_size)
        if table.shape != wanted or table.is_floating_point():
            raise InputError(f"table: give integers of shape {wanted}, not {tuple(table.shape)}")
        if ((table < 0) | (table >= self.num_experts)).any():
            raise InputError(
                f"table: it holds {int(table.min())} to {int(table.max())}, and experts are "
                f"numbered 0 to {self.num_experts - 1}; give numbers of experts"
            )
        self.table[:, :-1] = table
        self.table[:, -1:] = self._draw(len(table), 1)
        self._is_built = True

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._is_built = not self.table.is_meta and bool((self.table >= 0).all())

    def _check_table(self) -> None:
        if self.missing_input:
            raise InputError(
                f"hash_function: the {self.hash_function} table is not built; "
                "call build_table, or load a checkpoint that has one"
            )

    def _compute(
        self, hidden: Tensor, context: TokenContext, brute_force: bool
    ) -> FeedForwardOutput:
        """Run each token's expert; by brute force, all experts on all tokens."""
        tokens = flatten_tokens(self, hidden, None)[0]
        routing = self.route(hidden, context.token_ids, context.mask)
        experts = self.experts.reference if brute_force else self.experts
        bound = () if brute_force else (routing.max_assignments,)
        output = experts(tokens, routing.indices, routing.weights, *bound)
        if self.norm is not None:
            normed = self.norm(tokens + output).to(output.dtype)
            output = normed.masked_fill(routing.weights[:, :1] == 0, 0.0)  # padding
        return FeedForwardOutput(output.reshape(hidden.shape), {}, routing.stats)

    def route(
        self, hidden: Tensor, token_ids: Tensor | None = None, mask: Tensor | None = None
    ) -> Routing:
        """Return the routing: segment r of expert e is number e R + r.

        Args:
            hidden: ``(..., d_model)``; without learned weights only its shape is read.
            token_ids: ``(...)`` int64, of all tokens so far if ``needs_earlier_tokens``.
            mask: ``(...)`` bool, true at real tokens; padding is routed to -1.

        Raises:
            InputError: token ids are missing or outside the vocabulary, or the key is ``future``
                in training without ``allow_future``.
        """
        if self.key == "future" and self.training and not self.allow_future:
            raise InputError(
                "key: 'future' reads the token that is to be predicted; for the paper's bound "
                "set allow_future: true"
            )
        hash_TC, mask_T = self._hash(hidden, token_ids, mask)
        segment_R = torch.arange(self.num_hashes, device=hash_TC.device)
        indices_TC = hash_TC * self.num_hashes + segment_R
        if self.gate is not None:
            weights_TC = self.gate(hidden.reshape(-1, self.d_model), hash_TC)
        else:
            dtype = torch.promote_types(hidden.dtype, torch.float32)
            weights_TC = torch.ones(indices_TC.shape, dtype=dtype, device=hidden.device)
        if mask_T is not None:
            padding_T1 = ~mask_T.unsqueeze(-1)
            hash_TC = hash_TC.masked_fill(padding_T1, -1)
            indices_TC = indices_TC.masked_fill(padding_T1, -1)
            weights_TC = weights_TC.masked_fill(padding_T1, 0.0)
        chosen = (hash_TC, self._mass(weights_TC), self.num_experts, mask_T)
        stats = statistics(self, slot_stats, *chosen, self.num_experts)
        return Routing(indices_TC, weights_TC, {}, stats, indices_TC.numel())

    def _mass(self, weights_TC: Tensor) -> Tensor | None:
        """Return the weights if they are not all one."""
        return None if self.gate is None else weights_TC

    def _hash(
        self, hidden: Tensor, token_ids: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return each token's experts ``(T, C)``, and the mask of these tokens ``(T,)``."""
        self._check_table()
        return hashing.addressed(hidden, token_ids, mask, self.vocab_size, self._chosen)

    def _chosen(self, token_ids: Tensor, mask: Tensor | None, length: int) -> Tensor:
        hash_LC = hashing.chosen(self.key, self.table, self.num_experts, token_ids, mask)
        own_SC = hash_LC[..., hash_LC.shape[-2] - length :, :]
        return own_SC.reshape(-1, hash_LC.shape[-1])

    def _slot_load(self, hidden: Tensor, context: TokenContext) -> SlotLoad:
        """Sum up how often each expert is chosen, by any of the hash functions."""
        routing = self.route(hidden, context.token_ids, context.mask)
        experts_TC = routing.indices.div(self.num_hashes, rounding_mode="floor")
        return slot_load(experts_TC, self._mass(routing.weights), self.num_experts)

    def cost(self) -> Cost:
        """K experts of 4 d f FLOPs, 6 d f if gated, of E; learned weights take 2 d E more."""
        expert = self.num_hashes * self.experts.parameters_per_expert()
        gate = 0 if self.gate is None else self.gate.weight.numel()
        around = gate + (0 if self.norm is None else 2 * self.d_model)
        active = self.top_k * expert + around
        return Cost(
            total_parameters=self.num_experts * expert + around,
            active_parameters=active,
            flops_per_token=self.top_k * self.num_hashes * self.experts.flops_per_assignment()
            + 2 * gate,
            bytes_per_token=active * self.experts.down_proj.element_size(),
        )


_ROLLER = Paper("Roller et al.", 2021, "Hash Layers For Large Sparse Models", "2106.04426")

register(
    Method("hash", HashLayer, _ROLLER),
    Method("hash_bigram", HashLayer, _ROLLER, {"key": "bigram"}),
    Method("multi_hash", HashLayer, _ROLLER, {"num_hashes": 4}),
    Method(
        "deepseek_v4_hash",
        HashLayer,
        Paper(
            "DeepSeek-AI",
            2026,
            "DeepSeek-V4: Towards Highly Efficient Million-Token Context Intelligence",
            "2606.19348",
        ),
        {
            "num_experts": 64,
            "top_k": 6,
            "weights": "learned",
            "scale": 1.5,
            "activation": "silu",
            "gated": True,
        },
    ),
)
