"""``moezoo demo``: from nothing to a language model in minutes, on a CPU."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from rich.console import Console

from moezoo.command.recipes import folder
from moezoo.errors import InputError
from moezoo_train.run.cli import run
from moezoo_train.run.precision import precision_here

RECIPE = folder() / "demo.yaml"


def demo(
    source: str = "stdlib",
    output: str = "runs/demo",
    recipe: str | None = None,
    max_steps: int | None = None,
    precision: str = "auto",
) -> None:
    """Train a small sparse mixture of experts on real text and let it write.

    Trains a tokenizer, prepares the tokens, trains the model, prints a table and a sample, and
    leaves checkpoint, model directory, loss curve and report in the output directory. The same
    machine repeats the same numbers.

    Args:
        source: text to learn: "stdlib" (the Python standard library's own source code), a .txt,
            .jsonl or .parquet file, a folder or glob of those, or "hf:NAME[:CONFIG]".
        output: directory of the run; an earlier demo there is replaced.
        recipe: configuration of the run; default: the recipe demo that comes with moezoo.
        max_steps: train for that many optimizer steps instead of the recipe's.
        precision: 32-true, bf16-mixed, or auto: bf16-mixed on a GPU that has bf16, else 32-true.

    Raises:
        InputError: the recipe, the source or an option is invalid.
    """
    console = Console()
    started = time.perf_counter()
    path = Path(recipe) if recipe is not None else RECIPE
    if not path.is_file():
        raise InputError(f"recipe: there is no {path}; give one that is there")
    precision = precision_here(precision)
    console.print(
        f"A sparse mixture of experts learns from {_name(source)}, in {precision} on {_machine()}.",
        highlight=False,
        soft_wrap=True,
    )
    options = {"output": output, "data.source": source, "trainer.precision": precision}
    options["trainer.accelerator"] = "cuda" if torch.cuda.is_available() else "cpu"
    if source != "stdlib":
        options |= {"data.data_dir": f"{output}/data", "sample_prompt": ""}
    if max_steps is not None:
        options["trainer.max_steps"] = str(max_steps)
    run(["fit", "--config", str(path), *(f"--{name}={value}" for name, value in options.items())])
    console.print(
        f"{time.perf_counter() - started:.0f} s in all. {output}/ holds loss.png, report.json, "
        f"sample.txt, model/ and checkpoints/.\n"
        f'Go on with: moezoo generate --checkpoint {output}/model --prompt "def "',
        highlight=False,
        soft_wrap=True,
    )


def _name(source: str) -> str:
    return "the Python standard library's source" if source == "stdlib" else source


def _machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"{threads} CPU thread{'s' if threads > 1 else ''}"
