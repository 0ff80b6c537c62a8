"""`moezoo carve`: a dense checkpoint's own neurons as shared and routed experts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from moezoo.command.messages import size
from moezoo.convert import (
    Block,
    Carved,
    CarveOptions,
    LayerPlan,
    carve_block,
    prune_block,
)
from moezoo.convert.carve.options import Split
from moezoo.convert.carve.prune import PruneMethod
from moezoo.errors import InputError, check_choice, check_int
from moezoo_models.checkpoints.directory import read_tokenizer
from moezoo_models.conversion.calibration import Calibration, read_calibration
from moezoo_models.conversion.convert import Conversion, convert
from moezoo_models.conversion.drift import load_any
from moezoo_models.conversion.plans import Plans, writable
from moezoo_models.conversion.propagate import Propagation, Variant
from moezoo_models.conversion.source import Source, open_source
from moezoo_models.conversion.stage import Answer, next_token_nats
from moezoo_models.conversion.targets import TARGETS, Mixture
from moezoo_models.devices import free_memory, pick_device
from moezoo_models.model.config import check_trained_length
from moezoo_models.progress import progress_bar

_FORMATS = ("glm4_moe", "moezoo")
"""Formats in which every chosen expert can count fully."""
_LONGEST_WINDOW = 2048


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
    shared: int = 3,
    active: int = 3,
    experts: int = 8,
    calibration: str | list[str] = "stdlib",
    calibration_tokens: int = 32768,
    held_out_tokens: int = 8192,
    window: int | None = None,
    split: str = "contribution",
    shared_by: Literal["split", "contribution", "cmoe"] = "split",
    router: Literal["ridge", "gate_mean", "prior_approximate", "cmoe"] = "ridge",
    refit: bool = True,
    bias: bool | None = None,
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
    """Cut a dense Hugging Face checkpoint's blocks into shared and routed experts, untrained.

    Each block's neurons are dealt out to equal parts: some run on every token, a router picks some
    of the others. Neurons are assigned on calibration text, layer by layer through the layers
    already carved, in the memory of about one layer. Perplexity on held-out text is printed
    beside that of the dense model and of plain pruning to as many neurons.

    Args:
        source: directory of a dense model of one of the families that the documentation lists.
        target: directory to make.
        shared: parts that run on every token.
        active: further parts that a token is routed to.
        experts: parts in all; they divide the block's neurons.
        calibration: text files, folders or globs, or "stdlib", the Python standard library's own
            source. Text like that which the model will see serves best.
        calibration_tokens: tokens that everything is fitted to.
        held_out_tokens: tokens beside them, from other passages, for perplexities.
        window: tokens that the model sees at once; default: what it was trained on, or
            if its config.json does not say, what it is made for; at most 2048.
        split: which neurons go together: contribution (ours), cmoe (arXiv:2502.04416), random,
            contiguous, weight_kmeans, coactivation (arXiv:2110.01786).
        shared_by: whose rule picks the shared neurons: the split's own (random and contiguous have
            none), contribution's or cmoe's.
        router: ridge, a linear map fitted to the size of experts' contributions (ours); gate_mean
            (arXiv:2602.15521); prior_approximate (arXiv:2408.11855); cmoe, one neuron per expert
            (arXiv:2502.04416), which only moezoo holds.
        refit: fit the output projection anew to the dense block's output, by least squares.
        bias: let the refit add an output bias, which only moezoo holds.
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
    options = CarveOptions(
        shared,
        active,
        experts,
        split=cast(Split, split),  # a Literal here would not fit the help's lines
        shared_by=shared_by,
        router=router,
        refit=refit,
        bias=bias,
        output_scale=output_scale,
        top_activations=top_activations,
        **dataclasses.asdict(cmoe),
        seed=check_int("seed", seed, minimum=0),
    )
    families = dict.fromkeys(each for name in _FORMATS for each in TARGETS[name].families)
    with open_source(source, families) as dense:
        options.check(dense.width)
        _check_memory(dense, calibration_tokens)
        chosen = dense.select(layers)
        mixture = Mixture(
            num_experts=options.routed,
            top_k=active,
            d_expert=dense.width // experts,
            d_shared=dense.width // experts * shared,
            weighting="unit",
            layers=chosen,
            d_model=dense.config.hidden_size,
            dtype=dense.dtype,
            neuron_router=router == "cmoe",
            signed=cmoe.signed,
            output_bias=bool(bias) or dense.ffn["bias"],
            **dense.block_options(),
        )
        kind = TARGETS[check_choice("to", to or _format(dense, mixture), _FORMATS)]
        kind.check(dense, mixture)
        text = calibrate(
            dense, calibration, calibration_tokens, held_out_tokens, window, options.seed
        )
        run = Carving(dense, text, options, mixture, kind.flat, pick_device(device))
        return convert(
            dense,
            Path(target),
            kind,
            mixture,
            run.plan,
            method="carve",
            options=dataclasses.asdict(options) | {"calibration": text.describe()},
            exact=active == options.routed and output_scale == 1.0,
            max_shard_size=max_shard_size,
            check=check,
            force=force,
            scratch_bytes=run.scratch_bytes,
            prepare=run.prepare,
            extra=run.report,
        )


def calibrate(
    source: Source,
    texts: str | Sequence[str],
    tokens: int,
    held_out_tokens: int,
    window: int | None,
    seed: int,
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
    )


def _check_memory(source: Source, tokens: int) -> None:
    """Refuse more calibration tokens than memory has room for: inputs, activations, a Gram."""
    width, d_model = source.width, source.config.hidden_size
    needed = 4 * tokens * (width + 4 * d_model) + 12 * width**2
    if needed > (free := free_memory()):
        raise InputError(
            f"calibration_tokens: {tokens:,} need about {size(needed)} of memory, and "
            f"{size(free)} are free; lower them"
        )


def _format(source: Source, mixture: Mixture) -> str:
    """Choose stock transformers if it can hold the model and its routers."""
    stock = not (mixture.neuron_router or mixture.output_bias)
    return "glm4_moe" if stock and TARGETS["glm4_moe"].refuses(source) is None else "moezoo"


class Carving:
    """The calibration of one carve, and its figures.

    Args:
        source: the dense model.
        calibration: the text.
        options: what to carve.
        mixture: the shapes.
        flat: whether unit weights are written as sigmoids of small logits.
        device: where to compute.
    """

    def __init__(
        self,
        source: Source,
        calibration: Calibration,
        options: CarveOptions,
        mixture: Mixture,
        flat: bool,
        device: torch.device,
    ) -> None:
        self._source, self._calibration = source, calibration
        self._options, self._mixture = options, mixture
        self._flat, self._device = flat, device
        self._nats: dict[str, Tensor] = {}
        self._plans = Plans(Path())

    @property
    def scratch_bytes(self) -> int:
        """Room for hidden states and refitted projections until the checkpoint is complete."""
        refits = len(self._mixture.layers) if self._options.refit else 0
        per_refit = self._source.width * self._mixture.d_model * self._mixture.dtype.itemsize
        return self._propagation(Path()).bytes + refits * per_refit

    def prepare(self, directory: Path) -> None:
        """Plan all layers, going on from what an earlier run left in ``directory``."""
        self._plans = Plans(directory)
        with progress_bar() as bar:
            task = bar.add_task("carving", total=self._source.num_layers)
            run = self._propagation(directory)
            self._nats = run.run(lambda: bar.advance(task))

    def plan(self, layer: int) -> LayerPlan:
        """Return a layer's plan."""
        return self._plans.read(layer)

    def report(self, written: Path, loads: bool) -> dict[str, Any]:
        """Return the measurements.

        Args:
            written: the checkpoint, which this process has written.
            loads: whether it fits into memory.
        """
        perplexity = {name: math.exp(nats.mean()) for name, nats in self._nats.items()}
        if loads:
            model = load_any(written, sound=True)
            perplexity["loaded"] = math.exp(model_nats(model, self._calibration).mean())
        rival = "static_refit" if self._options.refit else "static"
        return {
            "calibration": self._calibration.describe(),
            "perplexity": perplexity,
            # With all parts active there is nothing to prune: both are the dense model.
            "beats": {rival: perplexity["carved"] < perplexity[rival]} if self._drops() else {},
            "plan": dataclasses.asdict(self._mixture) | {"dtype": str(self._mixture.dtype)},
            "layers": {str(layer): self._plans.figures(layer) for layer in self._mixture.layers},
        }

    def _drops(self) -> bool:
        """Return whether a token leaves out any of the dense model's neurons."""
        return self._kept() < self._source.width

    def _kept(self) -> int:
        return self._mixture.d_shared + self._options.active * self._mixture.d_expert

    def _propagation(self, directory: Path) -> Propagation:
        keep = self._kept()
        variants = (
            Variant("dense", None),
            Variant("static", partial(pruned, keep, "static")),
            Variant("static_refit", partial(pruned, keep, "static_ls")),
            Variant("carved", self._carved),
        )
        layers = self._mixture.layers
        return Propagation(
            self._source, self._calibration, variants, layers, directory, self._device
        )

    def _carved(self, layer: int, x: Tensor, block: Block) -> Answer:
        if layer not in self._plans:
            carved = carve_layer(layer, x, block, self._options)
            plan = writable(carved.plan, x, self._mixture.dtype, self._flat)
            self._plans.save(layer, plan, carved.figures)
        return answer_of(self._plans.read(layer, self._device), block)


def carve_layer(layer: int, x: Tensor, block: Block, options: CarveOptions) -> Carved:
    """Carve one block; every layer has draws of its own.

    Args:
        layer: its number.
        x: ``(T, D)``, its inputs on the calibration tokens.
        block: the dense block.
        options: what to carve.
    """
    own = dataclasses.replace(options, seed=options.seed * 1_000_003 + layer)
    biases = (block.bias_in, block.bias_out)
    return carve_block(x, block.gate, block.up, block.down, own, block.act, *biases)


def answer_of(plan: LayerPlan, block: Block) -> Answer:
    """Return the function that computes a plan's output in the place of a block's."""
    biases = (block.bias_in, block.bias_out)
    return lambda x: plan.run(x, block.gate, block.up, block.down, block.act, *biases)


def pruned(keep: int, method: PruneMethod, layer: int, x: Tensor, block: Block) -> Answer:
    """Keep some of a block's neurons for all tokens; arguments as of :func:`carve_layer`."""
    biases = (block.bias_in, block.bias_out)
    made = prune_block(x, block.gate, block.up, block.down, keep, method, block.act, *biases)
    return made.run


@torch.no_grad()
def model_nats(model: Any, calibration: Calibration) -> Tensor:
    """Measure a model of transformers or ours, in its dtype, on the held-out tokens.

    Returns:
        As :meth:`~moezoo_models.conversion.propagate.Propagation.run` gives for one variant.
    """
    tokens, skipped = calibration.held_out, calibration.skipped
    rows = (model(input_ids=row[None], use_cache=False).logits[0] for row in tokens)
    return torch.stack([next_token_nats(*each, skipped) for each in zip(rows, tokens, strict=True)])
