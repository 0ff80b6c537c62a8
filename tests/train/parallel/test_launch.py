"""The files in train/launch: what they start, and that it runs."""

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from moezoo_train.measure.loggers import read_metrics
from moezoo_train.run.cli import run

ROOT = Path(__file__).parents[3]
LAUNCH = ROOT / "train" / "launch"
FSDP2 = "{trainer: {strategy: fsdp2}}"
SOURCES = os.pathsep.join(str(ROOT / part) for part in (".", "kernels", "models", "train"))

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\)"),
]


def stand_in(folder: Path, name: str) -> None:
    """Make a program that prints its arguments, one per line."""
    path = folder / name
    path.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    path.chmod(0o755)


def launch(script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(LAUNCH / script), *arguments],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_torchrun_trains_in_two_processes(tmp_path):
    (tmp_path / "corpus").mkdir()
    for number in range(10):
        text = " ".join(str((number * n * 7919) % 97) for n in range(80))
        (tmp_path / "corpus" / f"{number}.txt").write_text(text)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    options = {
        "output": tmp_path / "run",
        "loggers": "[csv]",
        "sample_tokens": 0,
        "trainer.accelerator": "cpu",
        "trainer.max_steps": 2,
        "trainer.val_check_interval": 2,
        "trainer.log_every_n_steps": 1,
        "data.source": tmp_path / "corpus",
        "data.data_dir": tmp_path / "data",
        "data.vocab_size": 300,
        "data.sequence_length": 16,
        "data.batch_size": 2,
        "data.val_fraction": 0.2,
        "model.d_model": 16,
        "model.num_layers": 1,
        "model.num_heads": 2,
        "model.schedule.warmup_steps": 1,
    }
    process = launch(
        "torchrun.sh",
        *(f"--{key}={value}" for key, value in options.items()),
        GPUS="2",
        PORT=port,
        PYTHON=sys.executable,
        PYTHONPATH=SOURCES,
        OMP_NUM_THREADS="1",
    )
    assert process.returncode == 0, process.stderr[-3000:]
    rows = read_metrics(tmp_path / "run" / "metrics.csv")
    assert [row["tokens"] for row in rows if "train/loss" in row] == ["64", "128"]
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["trainer"]["strategy"] == "fsdp2"
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_torchrun_passes_on_where_it_runs(tmp_path):
    stand_in(tmp_path, "python")
    places = {"NODES": "2", "RANK": "1", "MASTER": "first", "GPUS": "8"}
    process = launch(
        "torchrun.sh", "--config", "a b.yaml", **places, PYTHON=str(tmp_path / "python")
    )
    given = process.stdout.splitlines()
    assert given[:6] == ["-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", "1"]
    assert given[6:10] == ["--nproc_per_node", "8", "--master_addr", "first"]
    start = given.index("moezoo")
    assert given[start + 1 : start + 4] == ["fit", "--config", FSDP2]
    assert given[-6:-2] == ["--trainer.num_nodes", "2", "--trainer.devices", "8"]
    assert given[-2:] == ["--config", "a b.yaml"]


def test_torchrun_without_gpus_says_what_to_set(tmp_path):
    (tmp_path / "bash").symlink_to(shutil.which("bash"))
    process = launch("torchrun.sh", PATH=str(tmp_path), GPUS="")
    assert process.returncode == 2
    assert process.stderr.splitlines() == [
        "torchrun.sh: there is no nvidia-smi to count GPUs; set GPUS to the number of processes"
    ]


def test_slurm_starts_a_process_per_gpu_and_resumes(tmp_path):
    text = (LAUNCH / "slurm.sbatch").read_text()
    header = text[: text.index("set -euo pipefail")]
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", header, re.M))
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert options["signal"].startswith("TERM@")  # to the tasks, not (B:) to the script
    assert re.findall(r"^#SBATCH", text[len(header) :], re.M) == []  # SLURM would not read them

    stand_in(tmp_path, "srun")
    places = {"SLURM_NNODES": options["nodes"], "SLURM_NTASKS_PER_NODE": options["ntasks-per-node"]}
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    process = launch("slurm.sbatch", "--config", "a b.yaml", PATH=path, **places)
    assert process.returncode == 0, process.stderr
    given = process.stdout.splitlines()
    assert given[:4] == ["moezoo", "fit", "--config", FSDP2]
    assert given[4:8] == ["--trainer.num_nodes", "2", "--trainer.devices", "8"]
    assert given[8:] == ["--ckpt_path", "last", "--config", "a b.yaml"]


def test_deepspeeds_file_is_a_configuration(capsys):
    files = [str(ROOT / "configs" / "moe.yaml"), str(LAUNCH / "deepspeed.yaml")]
    trainer = printed(capsys, *files)
    assert trainer["strategy"]["class_path"] == "moezoo_train.parallel.zero.ZeROStrategy"
    assert trainer["strategy"]["init_args"]["stage"] == 2


def test_a_strategy_that_is_given_wins_over_that_of_the_scripts(capsys, tmp_path):
    recipe, own = str(ROOT / "configs" / "moe.yaml"), tmp_path / "own.yaml"
    own.write_text("trainer: {strategy: ddp}\n")
    assert printed(capsys, FSDP2, recipe)["strategy"] == "fsdp2"
    assert printed(capsys, FSDP2, recipe, str(own))["strategy"] == "ddp"
    given = printed(capsys, FSDP2, recipe, str(LAUNCH / "deepspeed.yaml"))["strategy"]
    assert given["class_path"] == "moezoo_train.parallel.zero.ZeROStrategy"


def printed(capsys, *files: str) -> dict:
    """Return the trainer's options as `moezoo fit` understands them."""
    with pytest.raises(SystemExit) as ended:
        run(["fit", *(f"--config={file}" for file in files), "--print_config"])
    assert ended.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)["trainer"]
