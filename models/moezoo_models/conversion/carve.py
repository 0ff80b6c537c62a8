"""`moezoo carve`: a dense checkpoint's own neurons as shared and routed experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, cast

from moezoo.command.messages import size
from moezoo.convert import CarveOptions
from moezoo.convert.carve.options import RouterKind, SharedBy, Split
from moezoo.errors import InputError, check_choice, check_int
from moezoo_models.checkpoints.directory import read_tokenizer
from moezoo_models.conversion.calibration import Calibration, read_calibration
from moezoo_models.conversion.carved_recovery import CarvedRecovery
from moezoo_models.conversion.carving import Carving
from moezoo_models.conversion.convert import Conversion, convert
from moezoo_models.conversion.distillation import RecoveryOptions
from moezoo_models.conversion.recovery import check_recovery
from moezoo_models.conversion.source import Source, open_source
from moezoo_models.conversion.targets import TARGETS, Mixture, Target
from moezoo_models.devices import free_memory, pick_device
from moezoo_models.model.config import check_trained_length

_FORMATS = ("glm4_moe", "moezoo")
"""Formats in which every chosen expert can count fully."""
_BUDGETS = ("auto", "equal", "measured")
_LONGEST_WINDOW = 2048
_MOST_PARTS = 128


@dataclasses.dataclass(frozen=True)
class CMoEOptions:
    """Options of CMoE (arXiv:2502.04416), in which its paper and its authors' code differ.

    Attributes:
        profile: activations that cmoe looks at: cosine, of normalised inputs and weights as in the
            authors' code, or raw.
        distance: of cmoe's clusters: l1 as in the code, l2 as in the paper.
        representative: the neuron that cmoe routes by: centroid (published) or most_active.
        signed: leave the sign of cmoe's scores, as in the paper; the code takes absolute values.
    """

    profile: Literal["cosine", "raw"] = "cosine"
    distance: Literal["l1", "l2"] = "l1"
    representative: Literal["centroid", "most_active"] = "centroid"
    signed: bool = False


def carve(
    source: str | Path,
    target: str | Path,
    shared: int | None = None,
    active: int | None = None,
    experts: int | None = None,
    calibration: str | list[str] = "stdlib",
    calibration_tokens: int = 32768,
    held_out_tokens: int = 8192,
    window: int | None = None,
    split: str = "contribution",
    shared_by: Literal["split", "contribution", "elimination", "cmoe"] | None = None,
    router: str | None = None,
    router_ridge: float | None = None,
    refit: bool = True,
    refit_ridge: float | None = None,
    follow: bool = True,
    bias: bool | None = None,
    budgets: Literal["auto", "equal", "measured"] = "auto",
    accept_loss: bool = False,
    recover: int = 0,
    recovery: RecoveryOptions = RecoveryOptions(),  # noqa: B008 - frozen
    control: bool = False,
    sparsified: bool = True,
    output_scale: float = 1.0,
    top_activations: int | None = None,
    cmoe: CMoEOptions = CMoEOptions(),
    to: str | None = None,
    layers: str | int | list[int] = "all",
    seed: int = 0,
    device: str = "cpu",
    max_shard_size: str = "5GB",
    check: Literal["auto", "logits", "layers"] = "auto",
    force: bool = False,
) -> Conversion:
    """Cut a dense Hugging Face checkpoint's blocks into shared and routed experts.

    Each block's neurons are dealt out to equal parts: some run on every token, a router picks some
    of the others. Neurons are assigned on calibration text, layer by layer through the layers
    already carved, in the memory of about one layer. Perplexity on held-out text is printed
    beside that of the dense model and of plain pruning to as many neurons. Nothing is trained but
    with ``recover``: then the carved blocks learn the dense model's predictions.

    Args:
        source: directory of a dense model of one of the families that the documentation lists.
        target: directory to make.
        shared: parts that run on every token; default: five eighths.
        active: further parts that a token is routed to; default: three quarters less shared.
        experts: parts in all; they divide the block's neurons. Default: up to 128, of 16 neurons
            or more and multiples of 8, or of what divides the block's.
        calibration: text files, folders or globs, or "stdlib", the Python standard library's own
            source. Text like that which the model will see serves best.
        calibration_tokens: tokens that everything is fitted to.
        held_out_tokens: tokens beside them, from other passages, for perplexities.
        window: tokens that the model sees at once; default: what it was trained on, or
            if its config.json does not say, what it is made for; at most 2048.
        split: which neurons go together: contribution (ours), cmoe (arXiv:2502.04416), random,
            contiguous, weight_kmeans, coactivation (arXiv:2110.01786).
        shared_by: which neurons are shared: elimination, those that the others make up for least
            (arXiv:2302.04089), the default with contribution and a refit; the split's own (random
            and contiguous have none), contribution's or cmoe's.
        router: ridge, a linear map fitted to the size of experts' contributions (ours);
            ridge_shared, the same with shared neurons' activations as further inputs (the default
            in moezoo, which alone holds it); gate_mean (arXiv:2602.15521); prior_approximate
            (arXiv:2408.11855); cmoe, one neuron per expert (arXiv:2502.04416), only in moezoo.
        router_ridge: regularisation of ridge routers; default: per layer, on held-out tokens.
        refit: fit the output projection anew to the dense block's output, by least squares.
        refit_ridge: regularisation of the refit; default as router_ridge's.
        follow: refit to what makes up for earlier layers' errors too.
        bias: let the refit add an output bias, which only moezoo holds.
        budgets: equal, as many active parts in every layer; or measured, more where leaving some
            out costs more, active on average, which only moezoo holds; auto: measured there.
        accept_loss: carve though a token keeps no more than half of the neurons.
        recover: tokens of further calibration text on which the carved blocks are trained to
            predict what the dense model predicts, once the checkpoint is there; it is replaced
            when that is done. The same command goes on where it was interrupted.
        recovery: options of this training.
        control: recover a pruned model of as much work too, and print its figures.
        sparsified: print too what ``moezoo sparsify`` would cost at as much work; it takes about as
            long as calibrating it does.
        output_scale: factor on routed experts' outputs (LLaMA-MoE: routed over active).
        top_activations: neurons per token that count as active for cmoe (10) and coactivation.
        cmoe: options that only cmoe's split and router read.
        to: glm4_moe, which unmodified transformers loads, or moezoo; default: the first that can
            hold the model.
        layers: which blocks to carve: all, every 2, a number or a list.
        seed: of everything drawn.
        device: where to compute: cpu, cuda, ..., or auto for an accelerator if there is one.
        max_shard_size: start another file when one exceeds this.
        check: load the result and measure it, or only compare layer by layer; auto loads it if it
            fits into memory.
        force: replace a checkpoint that target holds.

    Returns:
        The two models, the drift, and the measurements.

    Raises:
        InputError: the source cannot be converted, the options contradict each other, there is
            too little text, or the target cannot hold the result.
    """
    with open_source(source, _families()) as dense:
        sizes = _sizes(dense.width, shared, active, experts)
        options = CarveOptions(
            *sizes,
            split=cast(Split, split),  # a Literal here would not fit the help's lines
            shared_by=_shared_by(shared_by, split, refit),
            router=_router(router, to, budgets, sizes[0]),
            refit=refit,
            bias=bias,
            output_scale=output_scale,
            top_activations=top_activations,
            **dataclasses.asdict(cmoe),
            router_ridge=router_ridge,
            refit_ridge=refit_ridge,
            seed=check_int("seed", seed, minimum=0),
        )
        options.check(dense.width)
        _check_share(options, accept_loss)
        _check_recovery(options, recover, recovery, control)
        _check_memory(dense, calibration_tokens)
        chosen = dense.select(layers)
        part = dense.width // options.experts
        mixture = Mixture(
            num_experts=options.routed,
            top_k=options.active,
            d_expert=part,
            d_shared=part * options.shared,
            weighting="unit",
            layers=chosen,
            d_model=dense.config.hidden_size,
            dtype=dense.dtype,
            neuron_router=options.router == "cmoe",
            reads_shared=options.router == "ridge_shared",
            signed=cmoe.signed,
            output_bias=bool(bias) or dense.ffn["bias"],
            **dense.block_options(),
        )
        to = to or _format(dense, mixture, check_choice("budgets", budgets, _BUDGETS))
        kind = TARGETS[check_choice("to", to, _FORMATS)]
        kind.check(dense, mixture)
        measured = _measured(budgets, kind)
        text = calibrate(
            dense, calibration, calibration_tokens, held_out_tokens, window, options.seed, recover
        )
        training = None
        if recover:
            training = CarvedRecovery(dense, Path(target), text, recovery, control)
        run = Carving(
            dense,
            text,
            options,
            mixture,
            kind.flat,
            measured,
            follow,
            pick_device(device),
            training.pruned if training is not None and control else None,
            sparsified,
        )
        described = dataclasses.asdict(options) | {
            "budgets": "measured" if measured else "equal",
            "follow": follow,
            "calibration": text.describe(),
            **({"control": True} if control else {}),
        }
        if training is not None:
            training.check(mixture.dtype, kept=int(control))
            if (carved := training.carved(kind.name, described, mixture)) is not None:
                return training.run(carved, pick_device(device), max_shard_size)
        made = convert(
            dense,
            Path(target),
            kind,
            mixture,
            run.plan,
            method="carve",
            options=described,
            exact=options.active == options.routed and output_scale == 1.0,
            max_shard_size=max_shard_size,
            check=check,
            force=force,
            scratch_bytes=run.scratch_bytes,
            prepare=run.prepare,
            settled=run.settled,
            extra=run.report,
        )
        if training is None:
            return made
        return training.run(made, pick_device(device), max_shard_size)


def calibrate(
    source: Source,
    texts: str | Sequence[str],
    tokens: int,
    held_out_tokens: int,
    window: int | None,
    seed: int,
    recovery_tokens: int = 0,
) -> Calibration:
    """Read calibration text with the model's own tokenizer.

    Raises:
        InputError: there is no tokenizer, or too little text.
    """
    tokenizer = read_tokenizer(source.directory)
    if tokenizer is None:
        raise InputError(
            f"tokenizer: {source.directory} holds none, and calibration reads text; copy "
            "tokenizer.json there"
        )
    config = source.config
    # Fewer tokens than inputs would let the router explain anything.
    check_int("calibration_tokens", tokens, minimum=config.hidden_size + 1)
    longest = config.max_position_embeddings
    trained = check_trained_length(source.raw.get("trained_length"), longest) or longest
    return read_calibration(
        [texts] if isinstance(texts, str) else texts,
        tokenizer,
        vocab_size=config.vocab_size,
        tokens=tokens,
        held_out_tokens=held_out_tokens,
        window=check_int(
            "window", min(trained, _LONGEST_WINDOW) if window is None else window, maximum=longest
        ),
        seed=seed,
        recovery_tokens=recovery_tokens,
    )


def _families() -> dict[str, None]:
    """Return the architectures that some format holds."""
    return dict.fromkeys(each for name in _FORMATS for each in TARGETS[name].families)


def _sizes(
    width: int, shared: int | None, active: int | None, experts: int | None
) -> tuple[int, int, int]:
    """Return shared, active and all parts: what is not given makes a quarter idle.

    Fine experts leave out what a token can do without more exactly than coarse ones; and the more
    is shared, the better a refit makes up for what is not.
    """
    if experts is None:
        experts = default_parts(width)
    if shared is None:
        shared = 5 * experts // 8
    if active is None:
        active = max(3 * experts // 4 - shared, 1)
    return shared, active, experts


def default_parts(width: int) -> int:
    """Return a number of parts that are multiples of 8 neurons, as kernels want; or of fewer."""
    for step in (8, 4, 2, 1):
        for parts in range(_MOST_PARTS, 7, -8):
            if width % (parts * step) == 0 and width // parts >= min(16, width // 8):
                return parts
    raise InputError(f"experts: no default divides the block's {width} neurons; give a divisor")


def own_sizes(width: int) -> tuple[int, int, int]:
    """Return the shared, active and all parts into which `moezoo carve` cuts a block by default."""
    return _sizes(width, None, None, None)


def own_options(shared: int, active: int, experts: int, seed: int = 0) -> CarveOptions:
    """Return the options of `moezoo carve --to moezoo` of these sizes, no other given."""
    return CarveOptions(
        shared,
        active,
        experts,
        shared_by=_shared_by(None, "contribution", True),
        router=_router(None, "moezoo", "auto", shared),
        router_ridge=None,
        refit_ridge=None,
        seed=seed,
    )


def _router(router: str | None, to: str | None, budgets: str, shared: int) -> RouterKind:
    """Return the router; by default the best that the format holds."""
    if router is None:
        ours = to == "moezoo" or (to is None and budgets == "measured")
        router = "ridge_shared" if ours and shared else "ridge"
    return cast(RouterKind, router)


def _shared_by(shared_by: str | None, split: str, refit: bool) -> SharedBy:
    """Return the rule; elimination supposes that what is left is refitted."""
    default = "elimination" if split == "contribution" and refit else "split"
    return cast(SharedBy, shared_by or default)


def _measured(budgets: str, kind: Target) -> bool:
    """Return whether layers get budgets of their own."""
    if budgets == "measured" and not kind.carved:
        raise InputError(
            f"budgets: {kind.name} has as many active experts in every layer; choose --to moezoo, "
            "or budgets equal"
        )
    return kind.carved and budgets != "equal"


def _check_share(options: CarveOptions, accepted: bool) -> None:
    """Refuse to leave out half or more: untrained, that doubles a real model's perplexity."""
    kept = options.shared + options.active
    if 2 * kept <= options.experts and not accepted:
        raise InputError(
            f"active: a token would use {kept} of {options.experts} parts; untrained, one half "
            "doubled the perplexity of a real model; raise active, or give --accept_loss"
        )


def _check_recovery(
    options: CarveOptions, tokens: int, recovery: RecoveryOptions, control: bool
) -> None:
    """Refuse options of a recovery that there is not, and one that would have nothing to do."""
    check_recovery(tokens, recovery)
    if not tokens:
        if control:
            raise InputError("control: nothing is recovered; give recover a number of tokens")
    elif options.active == options.routed:
        raise InputError("recover: all parts are active, and nothing is lost; leave it out")
    elif control and not options.refit:
        raise InputError("control: a pruned model is refitted; leave out refit false, or control")


def _check_memory(source: Source, tokens: int) -> None:
    """Refuse more calibration tokens than memory has room for: inputs, activations, a Gram."""
    width, d_model = source.width, source.config.hidden_size
    needed = 4 * tokens * (width + 6 * d_model) + 28 * width**2
    if needed > (free := free_memory()):
        raise InputError(
            f"calibration_tokens: {tokens:,} need about {size(needed)} of memory, and "
            f"{size(free)} are free; lower them"
        )


def _format(source: Source, mixture: Mixture, budgets: str) -> str:
    """Choose stock transformers if it can hold the model, its routers and its budgets."""
    stock = not (mixture.neuron_router or mixture.reads_shared or mixture.output_bias)
    stock = stock and budgets != "measured" and TARGETS["glm4_moe"].refuses(source) is None
    return "glm4_moe" if stock else "moezoo"
