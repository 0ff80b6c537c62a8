"""Every `moezoo` command of README and docs/ runs, as it stands but for the size."""

import importlib.util
import os
import runpy
import shlex
import shutil
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist
import yaml

from moezoo.__main__ import COMMANDS, main

from .test_documentation import PAGES, ROOT, blocks, joined, joined_name

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\)"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:It is recommended to use .*sync_dist"),
]
MODEL = "--model.d_model 16 --model.num_layers 4 --model.num_heads 2 --model.num_kv_heads 2"
DATA = "--data.sequence_length 16 --data.batch_size 2"
STEPS = "--trainer.max_steps 2 --trainer.val_check_interval 2 --model.schedule.warmup_steps 1"
TEXT = "--data.source path/to/texts --data.vocab_size 300"
COMPARED = (
    "--max_steps 2 --schedule.warmup_steps 1 --text.source path/to/texts --text.vocab_size 300 "
    "--text.sequence_length 16 --text.batch_size 2 --text.val_fraction 0.2 --seeds [0] "
    "--precision 32-true --tolerance 0.9 --model.d_model 32 --model.num_heads 2 "
    "--ablation false --only [dense_mlp]"
)
SMALL = {
    "demo": "--recipe demo.yaml --max_steps 2 --source path/to/texts",
    "prepare": "--vocab_size 300",
    "bench": "--quick --runs 1",
    "generate": "--max_new_tokens 4",
    "compare": COMPARED,
    "compare carving": (
        "--max_steps 2 --seeds [1] --sizes [S2A6E16] --calibration path/to/texts "
        "--calibration_tokens 512 --schedule.warmup_steps 1 --text.sequence_length 16"
    ),
    "compare facts": (
        "--max_steps 2 --seeds [0] --facts [16] --schedule.warmup_steps 1 --sequence_length 16 "
        "--vocab_size 300"
    ),
    "compare hardening": (
        "--max_steps 2 --seeds [0] --schedule.warmup_steps 1 --text.source path/to/texts "
        "--text.vocab_size 300 --text.sequence_length 16 --text.batch_size 2 "
        "--text.val_fraction 0.2 --text.data_dir runs/claims/trees"
    ),
    "compare upcycling": "--max_steps 6 --schedule.warmup_steps 1 --text.sequence_length 16",
    "compare forgetting": (
        "--seeds [0] --max_steps 1 --background_batches 2 --batch_size 2 --sequence_length 16 "
        "--model.d_model 16 --model.num_heads 2 --base.max_steps 2 --base.schedule.warmup_steps 0 "
        "--base.memory '{num_keys: 8, top_k: 2}' --methods '{sparse: {rows: 5, rates: [1]}}' "
        "--text.source path/to/texts --text.vocab_size 320 --text.val_fraction 0.2 "
        "--text.sequence_length 16 --text.batch_size 2 --facts.old 4 --facts.old_repeats 1 "
        "--facts.new 4"
    ),
    "inspect background": "--batches 2 --sequence_length 16 --batch_size 2",
    "sparsify": (
        "--calibration_tokens 512 --held_out_tokens 256 --sensitivity_tokens 256 --window 16"
    ),
    "inspect frontier": (
        "--calibration path/to/texts --calibration_tokens 512 --held_out_tokens 256 --window 16 "
        "--experts 4"
    ),
    "carve": "--calibration_tokens 512 --held_out_tokens 256 --window 16",
    "drop-layers": "--calibration_tokens 512 --held_out_tokens 256 --window 16",
    "fuse-layers": "--calibration_tokens 512 --held_out_tokens 256 --window 16",
    "snnk": "--calibration_tokens 512 --held_out_tokens 256 --window 16 --layers [1]",
    "inspect carving": (
        "--seeds 1 --calibration path/to/texts --calibration_tokens 512 --held_out_tokens 256"
    ),
}
"""What makes a command small; later options win."""
WITHOUT_GGUF = importlib.util.find_spec("gguf") is None
ELSEWHERE = {
    "path/to/instruct": "wants a chat template: test_chat_run.py has one",
    "--chat": "likewise",
    "--recover": "trains: test_recover.py and test_shortened.py do so in small",
    "--tasks": "wants lm-eval, and the first of the two a network: test_harness.py has tasks",
    "--data.stream": "wants more than a few short texts: test_streamed_run.py streams",
    "path/to/model.gguf": "is read with a package that may be missing: test_gguf.py has such files",
}


def commands_of(page: Path) -> list[list[str]]:
    """Return the words of a page's commands; lines for the shell, pip or make are left out."""
    lines = [line for block in blocks(page, "sh") for line in joined(block).splitlines()]
    words = [shlex.split(line, comments=True) for line in lines]
    return [line for line in words if line[:1] == ["moezoo"] or line[:2] == ["python", "-m"]]


WITH_COMMANDS = [page for page in PAGES if page.name != "CONTRIBUTING.md" and commands_of(page)]
BEFORE = {
    "claims.md": [
        "moezoo fit --config configs/dense_small.yaml --output runs/upcycling_dense "
        "--data.data_dir runs/upcycling_data"
    ],
    "compare.md": ["moezoo compare --config configs/experiments/compare/small.yaml"],
    "adopt.md": ["moezoo upcycle path/to/llama runs/mixtral --experts 8 --top_k 2"],
    "finetuning.md": ["moezoo upcycle path/to/llama runs/mixtral --experts 8 --top_k 2"],
}
"""What the page's readers have done by then."""


def run(words: list[str]) -> int:
    if words[0] == "python":
        sys.argv = words[2:]
        sys.modules.pop(words[2], None)  # runpy warns of a module that was imported before
        runpy.run_module(words[2], run_name="__main__")
        return 0
    name, *options = joined_name(words[1:])
    assert name in COMMANDS
    # A strategy leaves its process group, and what it told its ranks, to the end of the process.
    with mock.patch.dict(os.environ):
        try:
            return main([*name.split(), *options, *shlex.split(smaller(name, options))])
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


def smaller(name: str, options: list[str]) -> str:
    if name == "compare":
        recipes = [ROOT / option for option in options if option.startswith("configs/")]
        rows = [yaml.safe_load(path.read_text())["baseline"] for path in recipes]
        return COMPARED.replace("dense_mlp", rows[0]) if rows else COMPARED
    if name != "fit":
        guess = " --guess.rank 2" if "--guess.rank" in options else ""
        return SMALL.get(name, "") + guess
    size = [STEPS, DATA, "--trainer.devices 1 --overwrite true"]
    if "--model.initialize_from" not in options:
        size.append(MODEL)
    if "null" not in options:  # of data.source: what is prepared has a vocabulary already
        size.append(TEXT)
    return " ".join(size)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Path:
    """A folder as a reader has it after the demo, with texts and models of his own."""
    folder = tmp_path_factory.mktemp("reader")
    for name in ("configs", "README.md"):
        (folder / name).symlink_to(ROOT / name)
    texts = folder / "path" / "to" / "texts"
    texts.mkdir(parents=True)
    for number in range(20):
        lines = [f"def f{n}(a, b):\n    return a * {n * number} + b\n" for n in range(24)]
        (texts / f"{number}.txt").write_text("\n".join(lines))
    demo = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    demo["model"] |= {"d_model": 16, "num_layers": 2, "num_heads": 2}
    demo["model"]["schedule"]["warmup_steps"] = 1
    demo["data"] |= {
        "source": "path/to/texts", "vocab_size": 300, "sequence_length": 16, "val_fraction": 0.2,
    }  # fmt: skip
    demo["trainer"]["val_check_interval"] = 2
    (folder / "demo.yaml").write_text(yaml.safe_dump(demo))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for line in (
            "moezoo demo",
            "moezoo fit --config configs/dense.yaml",
            "moezoo export runs/dense/model path/to/llama",
        ):
            assert run(shlex.split(line)) == 0
    real = folder / "runs" / "real"  # what docs/real_models/inputs.py writes there, but small
    shutil.copytree(folder / "path" / "to" / "llama", real / "smollm2")
    shutil.copy(texts / "0.txt", real / "email.txt")
    every = "\n".join(file.read_text() for file in sorted(texts.iterdir()))
    (real / "reference.txt").write_text(every)
    prompts = [{"positive": [f"def f{n}(a, b):"]} for n in range(3)]
    (folder / "prompts.yaml").write_text(yaml.safe_dump({"experts": prompts}))
    for name in ("code", "prose"):
        shutil.copytree(folder / "path" / "to" / "llama", folder / "path" / "to" / name)
    return folder


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: page.name)
def test_commands_run(page, workshop, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "reader"
    shutil.copytree(workshop, folder, symlinks=True)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["moezoo"])
    ran = 0
    for words in [*map(shlex.split, BEFORE.get(page.name, [])), *commands_of(page)]:
        if any(option in words for option in ELSEWHERE):
            continue
        if WITHOUT_GGUF and any(word.endswith(".gguf") for word in words):
            continue
        code = run(words)
        captured = capsys.readouterr()
        assert code == 0, f"{shlex.join(words)}\n{captured.err[-2000:]}"
        ran += 1
    assert ran
