"""`moezoo snnk`: dense blocks replaced by random features of their inputs, and what that costs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor

from moezoo.command.messages import size
from moezoo.command.tables import print_table
from moezoo.convert import Block, prune_block
from moezoo.convert.features import equal_neurons
from moezoo.errors import InputError, check_choice, check_int
from moezoo_models.checkpoints.dense import dense_config
from moezoo_models.conversion.calibration import Calibration
from moezoo_models.conversion.carve import calibrate
from moezoo_models.conversion.carving import loaded_perplexity, read_block
from moezoo_models.conversion.checkpoint import NewCheckpoint
from moezoo_models.conversion.featuring import Featuring, LayerErrors
from moezoo_models.conversion.propagate import Propagation, Variant
from moezoo_models.conversion.selecting import first_of_windows
from moezoo_models.conversion.source import Source, open_source
from moezoo_models.conversion.stage import Answer
from moezoo_models.conversion.targets import Output
from moezoo_models.conversion.writer import check_target
from moezoo_models.devices import free_memory, pick_device
from moezoo_models.progress import progress_bar

_TENSORS = {
    "up_proj.weight": "up",
    "up_proj.bias": "bias_in",
    "down_proj.weight": "down",
    "down_proj.bias": "bias_out",
}


@dataclass(frozen=True)
class Featured:
    """What was replaced, and what that costs.

    Attributes:
        method: ``snnk``.
        options: what was asked for.
        calibration: the text.
        work: multiplications of a new block over those of a dense one.
        layers: of each layer, errors of its output by the number of features.
        perplexity: on held-out text: ``dense``; ``features``, in fp32; ``pruned``, dense blocks in
            the same layers of as much work; ``loaded``, of the checkpoint as it was written.
    """

    method: str
    options: dict[str, Any]
    calibration: dict[str, Any]
    work: float
    layers: dict[str, LayerErrors]
    perplexity: dict[str, float]


def snnk(
    source: str | Path,
    target: str | Path,
    features: int | None = None,
    layers: str | int | list[int] = "all",
    calibration: str | list[str] = "stdlib",
    calibration_tokens: int = 8192,
    held_out_tokens: int = 4096,
    window: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    max_shard_size: str = "5GB",
    check: Literal["loaded", "none"] = "loaded",
    force: bool = False,
) -> Featured:
    """Replace dense blocks of a Hugging Face checkpoint by random features of their inputs.

    A block becomes a matrix behind r ReLU features, which are drawn and not trained (SNNK,
    arXiv:2310.13225), fitted to the block's outputs by least squares, layer by layer through the
    layers already changed. Errors on held-out tokens are printed for several r, beside those of
    features that estimate the block without bias, whose error falls as r^-1/2, and perplexity
    beside that of the dense model and of blocks that are pruned to as much work.

    Args:
        source: directory of a dense model, or a GGUF file.
        target: directory to make, in this library's format.
        features: r; default: as many as take half of the block's work.
        layers: which blocks to replace: all, every 2, a number or a list as [3, 7].
        calibration: text files, folders or globs, or "stdlib", the Python standard library's own
            source. Text like that which the model will see serves best.
        calibration_tokens: tokens that are fitted to; several for each feature are needed.
        held_out_tokens: tokens beside them, from other passages, for perplexities.
        window: tokens that the model sees at once; default: what it was trained on, or
            if its config.json does not say, what it is made for; at most 2048.
        seed: of the features, and of the choice of passages.
        device: where to compute: cpu, cuda, ..., or auto for an accelerator if there is one.
        max_shard_size: start another file when one exceeds this.
        check: load the result and measure its perplexity, or not.
        force: replace a checkpoint that target holds.

    Returns:
        What is printed, and the errors of each layer.

    Raises:
        InputError: the source cannot be converted, there is too little text, or the target cannot
            hold the result.
    """
    check_choice("check", check, ("loaded", "none"))
    check_int("seed", seed, minimum=0)
    if features is not None:
        check_int("features", features, minimum=2)
    check_target(Path(target), force)
    with open_source(source) as dense:
        chosen = dense.select(layers)
        count = _half(dense) if features is None else features
        _check_memory(dense, calibration_tokens, count)
        text = calibrate(dense, calibration, calibration_tokens, held_out_tokens, window, seed)
        if text.fitted.numel() < 2 * count:
            raise InputError(
                f"features: {count:,} cannot be fitted to {text.fitted.numel():,} tokens; lower "
                "features, or raise calibration_tokens"
            )
        run = _Run(dense, text, count, chosen, seed, pick_device(device))
        return run.write(Path(target), max_shard_size, check == "loaded", force)


def _half(source: Source) -> int:
    """Return how many features take half of a block's work."""
    return max(source.width * (3 if source.ffn["gated"] else 2) // 4, 2)


def _check_memory(source: Source, tokens: int, features: int) -> None:
    """Refuse what memory has no room for: inputs and outputs, features and neurons, a Gram."""
    wide = max(features, source.width)
    needed = 4 * tokens * (6 * source.config.hidden_size + 2 * wide) + 28 * wide**2
    if needed > (free := free_memory()):
        raise InputError(
            f"calibration_tokens: {tokens:,} with {features:,} features need about {size(needed)} "
            f"of memory, and {size(free)} are free; lower one of them"
        )


class _Run:
    """One call of :func:`snnk`; arguments as there."""

    def __init__(
        self,
        source: Source,
        calibration: Calibration,
        features: int,
        layers: tuple[int, ...],
        seed: int,
        device: torch.device,
    ) -> None:
        self._source, self._calibration, self._device = source, calibration, device
        self._layers, self._length = layers, calibration.fitted.shape[1]
        self._featuring = Featuring(features, self._length, source.dtype, seed)
        self._options = {"features": features, "layers": list(layers), "seed": seed}
        self._scratch = Path()

    def write(self, target: Path, max_shard_size: str, loads: bool, force: bool) -> Featured:
        """Fit, write the checkpoint atomically, and print what it is."""
        new = NewCheckpoint("snnk", [self._source], target, self._outputs(), max_shard_size, force)
        decides = [self._options, self._calibration.describe()]
        with new.opened(decides, self._propagation().bytes):
            self._scratch = new.scratch
            with progress_bar() as bar:
                task = bar.add_task("fitting", total=self._source.num_layers)
                nats = self._propagation().run(partial(bar.advance, task))
            change = (
                f"`moezoo snnk` replaced the dense blocks of {len(self._layers)} of "
                f"{self._source.num_layers} layers by {self._featuring.features} random features."
            )
            new.write(self._config(), change)
            perplexity = {name: math.exp(each.mean()) for name, each in nats.items()}
            if loads:
                perplexity["loaded"] = loaded_perplexity(new.directory, self._calibration)
            made = Featured(
                "snnk",
                self._options,
                self._calibration.describe(),
                2 * self._featuring.features / (self._matrices * self._source.width),
                {
                    str(layer): self._featuring.errors(self._scratch, layer)
                    for layer in self._layers
                },
                perplexity,
            )
            new.report(made)
        _say(made, target)
        return made

    @property
    def _matrices(self) -> int:
        return 3 if self._source.ffn["gated"] else 2

    def _propagation(self) -> Propagation:
        variants = (
            Variant("dense", None),
            Variant("features", partial(self._featuring.convert, self._scratch)),
            Variant("pruned", self._pruned),
        )
        return Propagation(
            self._source, self._calibration, variants, self._layers, self._scratch, self._device
        )

    def _pruned(self, layer: int, x_TD: Tensor, block: Block) -> Answer:
        """Keep as many neurons as take the work of the features, and refit what follows them."""
        keep = equal_neurons(self._featuring.features, block.gate is not None)
        small = prune_block(
            x_TD,
            block.gate,
            block.up,
            block.down,
            min(keep, block.width),
            "static_ls",
            block.act,
            block.bias_in,
            block.bias_out,
            refit_ridge=None,
            apart=first_of_windows(len(x_TD), self._length).to(x_TD.device),
        )
        return small.run

    def _config(self) -> dict[str, Any]:
        """Add a rule for the new blocks, which are plain MLPs, to what the dense model is."""
        config = dense_config(self._source.raw)
        arguments = {
            "d_ff": self._featuring.features,
            "activation": "relu",
            "gated": False,
            "bias": True,
        }
        rule = {"layers": list(self._layers), "class_path": "moezoo.DenseFFN"}
        config.ffn = [*config.ffn, {**rule, "init_args": arguments}]
        config.check()
        config.architectures = ["MoezooForCausalLM"]
        return config.to_diff_dict()

    def _outputs(self) -> Iterator[Output]:
        """List the tensors: the dense model's own but for the blocks, and the new blocks'."""
        replaced = tuple(f"model.layers.{layer}.mlp." for layer in self._layers)
        for name, info in self._source.tensors.items():
            if not name.startswith(replaced):
                yield Output(name, info.shape, info.dtype, partial(self._source.pieces, name))
        d_model, features = self._source.config.hidden_size, self._featuring.features
        shapes = {
            "up_proj.weight": (features, d_model),
            "up_proj.bias": (features,),
            "down_proj.weight": (d_model, features),
            "down_proj.bias": (d_model,),
        }
        for layer in self._layers:
            for name, shape in shapes.items():
                yield Output(
                    f"model.layers.{layer}.mlp.{name}",
                    shape,
                    self._source.dtype,
                    partial(self._found, layer, _TENSORS[name]),
                )

    def _found(self, layer: int, name: str) -> Iterator[Tensor]:
        yield read_block(self._scratch, layer)[name].to(self._source.dtype)


def _say(made: Featured, target: Path) -> None:
    """Print errors by the number of features, and what the replacement costs."""
    layers = made.layers.values()
    rows: list[list[str]] = []
    start: float | None = None
    for count in (counts := list(next(iter(layers)).fitted)):
        fitted = median(layer.fitted[count] for layer in layers)
        found = [layer.universal[count] for layer in layers]
        known = [each for each in found if each is not None]
        unbiased = median(known) if len(known) == len(found) else None
        if count == counts[0]:
            start = unbiased
        line = None if start is None else start * (int(counts[0]) / int(count)) ** 0.5
        large = ("overflows" if each is None else f"{each:.3g}" for each in (unbiased, line))
        rows.append([count, f"{fitted:.3f}", *large])
    title = "Error of a block's output over the output, on tokens not fitted to, by features r"
    print_table(title, [">r", ">fitted", ">unbiased", ">as r^-1/2"], rows)
    print(f"a linear map, fitted likewise: {median(layer.linear for layer in layers):.3f}")
    if len(layers) > 1:
        print("medians over the layers")
    print(f"to {target}, {len(layers)} blocks at {made.work:.2f} of the work of a dense one")
    print(f"perplexity on {made.calibration['held_out_tokens']:,} held-out tokens")
    names = {
        "dense": "dense",
        "features": "features",
        "pruned": "pruned to the same work",
        "loaded": "features, as loaded",
    }
    for name, text in names.items():
        if name in made.perplexity:
            value = made.perplexity[name]
            print(f"  {text:<26}{value:>10.4g}  × {value / made.perplexity['dense']:.3f}")
