"""The configuration of a decoder: what ``config.json`` holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, field, fields
from typing import Any, ClassVar

from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from moezoo.errors import InputError, check_choice, check_int, nearest
from moezoo.feed_forward import registered, select_layers
from moezoo.router_input import FFN_INPUT, RouterInput
from moezoo_models.files.fields import check_fields, check_heads
from moezoo_models.model.attention_experts import options_of
from moezoo_models.model.block_rules import check_ffn_rules, check_memory_rules
from moezoo_models.model.latent_options import check_latent
from moezoo_models.model.norm import NORMS

LAYER_TYPES = ("full_attention", "sliding_attention")
PLACEMENTS = ("pre", "post", "both")
PARALLEL = ("none", "one_norm", "two_norms")
POSITIONS = ("rotary", "learned")

_BASE_CLASS_KEYS = (
    "attn_implementation",
    "auto_map",
    "experts_implementation",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "per_layer_config",
    "quantization_config",
    "rope_scaling",
    "rope_theta",
    "torch_dtype",
)
"""Arguments of the base class beside the fields, in ``config.json`` or as an argument."""


class MoezooConfig(PreTrainedConfig):
    """Configuration of :class:`MoezooForCausalLM`: that of a Llama, and what other families add.

    Attributes:
        vocab_size: number of token ids.
        hidden_size: width of the residual stream (``d_model``).
        num_hidden_layers: number of blocks.
        num_attention_heads: number of query heads.
        num_key_value_heads: number of key and value heads; default: one per query head.
        head_dim: width of a head; default ``hidden_size / num_attention_heads``.
        max_position_embeddings: longest sequence the model is meant for, in tokens.
        trained_length: longest sequence it was trained on, in tokens, if that is known; what it is
            measured at by default.
        rope_parameters: rotary embedding, as in transformers: ``{"rope_type": "default",
            "rope_theta": 10000.0}`` and the scaled kinds, also with a ``partial_rotary_factor``;
            or one such mapping per layer type (Gemma 3).
        positions: ``rotary`` embeddings, or ``learned`` ones that are added to those of the tokens
            (GPT-2), ``max_position_embeddings`` of them.
        nope_layers: numbers of layers whose attention has no rotary positions (SmolLM3).
        norm: ``rms``; ``rms_wide``, rounded after the weight is applied (OLMo 2); ``rms_offset``,
            with a factor of one plus the weight (Gemma); or ``layer``, LayerNorm.
        norm_placement: ``pre``, before attention and the feed-forward block; ``post``, at their
            outputs (OLMo 2); or ``both`` (Gemma 2).
        parallel: ``none``: the feed-forward block reads what attention has added to;
            ``one_norm``: beside attention, what enters the block, through the same norm (GPT-J,
            Cohere); ``two_norms``: through a norm of its own (GPT-NeoX).
        rms_norm_eps: added to mean squares in norms, or to the variance.
        attention_bias: biases in the query, key and value projections (Qwen2).
        attention_output_bias: a bias in the attention's output projection.
        attention_dropout: dropout of attention weights in training.
        attention_multiplier: factor on the scores of attention; default ``head_dim ** -0.5``.
        attention_experts: options of AttentionExperts: in blocks with a SparseMoE, its experts
            answer what attention mixes (UMoE); None: attention has values and a projection.
        attn_logit_softcapping: c of ``c tanh(score / c)`` (Gemma 2); None for none.
        qk_norm: normalise queries and keys (Qwen3).
        qk_norm_over: per ``head``, or over all heads of a ``projection`` (OLMo 2).
        latent_attention: options of multi-head latent attention (DeepSeek-V2), as of
            :class:`~moezoo_models.model.latent_options.LatentAttentionOptions`; None for
            grouped-query attention. ``head_dim`` is then its ``qk_rope_head_dim``, and
            ``attention_bias`` that of the projections to the latents.
        sliding_window: positions that ``sliding_attention`` layers see, themselves included.
        layer_types: ``full_attention`` or ``sliding_attention`` for each layer; default: all
            sliding if there is a sliding_window (Mistral), else all full.
        tie_word_embeddings: use the input embedding as the output projection.
        embedding_multiplier: factor on the tokens' embeddings, rounded to their dtype.
        residual_multiplier: factor on what attention and the feed-forward block add (Granite).
        logits_scaling: what logits are divided by (Granite).
        final_logit_softcapping: c of ``c tanh(logit / c)``, after that; None for none.
        initializer_range: standard deviation of fresh embeddings.
        use_cache: whether generation keeps a key-value cache.
        ffn: rules that choose each layer's feed-forward block, later ones winning:
            ``{"layers": "all" | "every 2" | 3 | [3, 7], "class_path": "moezoo.SparseMoE",
            "init_args": {...}}``. The width comes from the model. PersistentMemoryAttention joins
            the block's attention instead. A rule may also say what the block's router reads,
            ``"router_input": "pre_attention"`` or ``"post_attention"``, see
            :data:`moezoo.router_input.RouterInput`; without it, what the experts read. Default:
            DenseFFN everywhere.
        memory: rules that add layers to blocks beside their feed-forward blocks, of the same form
            without ``router_input``; those of several rules are all added, in their order. They
            read the residual stream and are added to it, before attention or behind the
            feed-forward block, as :attr:`moezoo.FeedForward.added` says. The vocabulary comes from
            the model too. Default: none.
        allow_non_causal: accept layers in which a token sees later tokens, such as expert choice.
        pad_token_id: id of padding, if any.
        bos_token_id: id that begins a text, if any.
        eos_token_id: id (or ids) that end a text, if any.

    Raises:
        InputError: a field is unknown or out of range, or fields contradict each other.
    """

    model_type = "moezoo"
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "past_key_values",
        "lm_loss",
        "aux_losses",
        "ffn_stats",
        "memory_stats",
        "aux_loss",
    ]

    vocab_size: int = 32000
    hidden_size: int = 512
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    trained_length: int | None = None
    rope_parameters: dict[str, Any] = field(default_factory=dict)
    positions: str = "rotary"
    nope_layers: list[int] = field(default_factory=list)
    norm: str = "rms"
    norm_placement: str = "pre"
    parallel: str = "none"
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    attention_output_bias: bool = False
    attention_dropout: float = 0.0
    attention_multiplier: float | None = None
    attention_experts: dict[str, Any] | None = None
    attn_logit_softcapping: float | None = None
    qk_norm: bool = False
    qk_norm_over: str = "head"
    latent_attention: dict[str, Any] | None = None
    sliding_window: int | None = None
    layer_types: list[str] = field(default_factory=list)
    tie_word_embeddings: bool = False
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
    final_logit_softcapping: float | None = None
    initializer_range: float = 0.02
    use_cache: bool = True
    ffn: list[dict[str, Any]] = field(default_factory=list)
    memory: list[dict[str, Any]] = field(default_factory=list)
    allow_non_causal: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Refuse unknown keys, fill in what follows from other fields, and check."""
        for key in kwargs:
            if key not in _BASE_CLASS_KEYS and not key.startswith("_"):
                raise InputError(f"{key}: no such field{nearest(key, self._fields())}")
        if kwargs.get("per_layer_config"):
            raise InputError("per_layer_config: layers differ by rules in ffn; leave it out")
        # Before the base class uses them: it makes a label for each number below num_labels.
        check_fields(kwargs)
        self._check_fields()
        if not self.layer_types:
            kind = "full_attention" if self.sliding_window is None else "sliding_attention"
            self.layer_types = [kind] * self.num_hidden_layers
        if self.ffn is None or self.ffn == []:
            self.ffn = [{"layers": "all", "class_path": "moezoo.DenseFFN"}]
        super().__post_init__(**kwargs)
        self.check()

    @classmethod
    def _fields(cls) -> list[str]:
        return [spec.name for spec in fields(cls)]

    def check(self) -> None:
        """Check every field and their relations.

        Raises:
            InputError: with the field and the fix.
        """
        self._check_fields()
        check_trained_length(self.trained_length, self.max_position_embeddings)
        self._check_layer_types()
        self._check_special_tokens()
        for where, parameters in self._ropes():
            kind = parameters.get("rope_type")
            check_choice(f"{where}: rope_type", kind, ["default", *ROPE_INIT_FUNCTIONS])
        try:
            self.validate_rope()
        except (KeyError, ValueError, TypeError) as error:
            raise InputError(f"rope_parameters: {error}".replace("\n", " ")) from error
        self.ffn = check_ffn_rules(self.ffn, self.num_hidden_layers, self.hidden_size)
        self.memory = check_memory_rules(self.memory, self.num_hidden_layers, self.hidden_size)
        self._check_parallel()
        self._check_attention_experts()

    def _check_fields(self) -> None:
        check_fields({name: getattr(self, name) for name in self._fields()})
        self._check_variants()
        if self.latent_attention is not None:
            self._check_latent()
        check_heads(self)
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads

    def _check_variants(self) -> None:
        check_choice("positions", self.positions, POSITIONS)
        check_choice("norm", self.norm, NORMS)
        check_choice("norm_placement", self.norm_placement, PLACEMENTS)
        check_choice("parallel", self.parallel, PARALLEL)
        check_choice("qk_norm_over", self.qk_norm_over, ("head", "projection"))
        for layer in self.nope_layers:
            check_int("nope_layers", layer, minimum=0, maximum=self.num_hidden_layers - 1)

    def _check_latent(self) -> None:
        """Check latent attention, and that no field contradicts it; a head's width follows."""
        options = check_latent(self.latent_attention)
        self.latent_attention, turned = asdict(options), options.qk_rope_head_dim
        rope = self.rope_parameters or {}
        contradictions = {
            "positions": self.positions != "rotary",
            "qk_norm": self.qk_norm,
            "sliding_window": self.sliding_window is not None,
            "head_dim": self.head_dim not in (None, turned),
            "num_key_value_heads": self.num_key_value_heads not in (None, self.num_attention_heads),
            "rope_parameters": rope.get("partial_rotary_factor", 1.0) != 1.0
            or any(kind in rope for kind in LAYER_TYPES),
        }
        for name, contradicts in contradictions.items():
            if contradicts:
                raise InputError(
                    f"{name}: latent attention has no such option (latent_attention); leave it out"
                )
        self.head_dim = turned

    def _check_attention_experts(self) -> None:
        if self.attention_experts is None:
            return
        self.attention_experts = asdict(options_of(self.attention_experts))
        if not any(self.shares_experts(layer) for layer in range(self.num_hidden_layers)):
            raise InputError(
                "attention_experts: no layer has experts to share; choose moezoo.SparseMoE in ffn, "
                "or null"
            )

    def _check_parallel(self) -> None:
        if self.parallel == "none":
            return
        if self.norm_placement != "pre":
            raise InputError(
                f"parallel: {self.parallel} has norms before attention and feed-forward block, not "
                f"norm_placement {self.norm_placement}; choose pre, or parallel none"
            )
        for number, rule in enumerate(self.ffn):
            if rule.get("router_input") == "post_attention":
                raise InputError(
                    f"ffn[{number}]: router_input: post_attention comes after attention, which "
                    f"runs beside the router with parallel {self.parallel}; choose pre_attention"
                )

    def _ropes(self) -> list[tuple[str, dict[str, Any]]]:
        """List the rotary parameters there are, each with what to call it."""
        given = self.rope_parameters or {}
        if not any(kind in given for kind in LAYER_TYPES):
            return [("rope_parameters", given)]
        found = []
        for kind in dict.fromkeys(self.layer_types):
            if not isinstance(given.get(kind), Mapping):
                raise InputError(f"rope_parameters: nothing for {kind} layers; add {kind}")
            found.append((f"rope_parameters: {kind}", given[kind]))
        return found

    def _check_layer_types(self) -> None:
        kinds = self.layer_types
        if len(kinds) != self.num_hidden_layers:
            raise InputError(
                f"layer_types: {len(kinds)} entries for num_hidden_layers {self.num_hidden_layers};"
                " give one per layer"
            )
        for kind in kinds:
            check_choice("layer_types", kind, LAYER_TYPES)
        if self.sliding_window is not None:
            check_int("sliding_window", self.sliding_window)
        elif "sliding_attention" in kinds:
            raise InputError("layer_types: sliding_attention needs a window; set sliding_window")

    def _check_special_tokens(self) -> None:
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            for token in value if isinstance(value, list) else [value]:
                if token is not None:
                    check_int(name, token, minimum=0, maximum=self.vocab_size - 1)

    def router_input(self, layer: int) -> RouterInput:
        """Return what the router of a layer's feed-forward block reads."""
        found: RouterInput = self.feed_forward(layer)[1].get("router_input", FFN_INPUT)
        return found

    def shares_experts(self, layer: int) -> bool:
        """Return whether a layer's experts answer its attention, too."""
        kind = registered(self.feed_forward(layer)[1]["class_path"])
        return self.attention_experts is not None and kind.__name__ == "SparseMoE"

    def feed_forward(self, layer: int) -> tuple[int, dict[str, Any]]:
        """Return the rule that governs a layer: its number in ``ffn``, and the rule."""
        depth = self.num_hidden_layers
        governing = [layer in select_layers(rule["layers"], depth) for rule in self.ffn]
        last = max(number for number, governs in enumerate(governing) if governs)
        return last, self.ffn[last]


def check_trained_length(value: Any, longest: int) -> int | None:
    """Return the length a model was trained on, or None where that is not known.

    Raises:
        InputError: it is no whole number, or more than ``longest``, which the model is meant for.
    """
    return None if value is None else check_int("trained_length", value, maximum=longest)
