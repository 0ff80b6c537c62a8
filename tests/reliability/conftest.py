"""A corpus, a process from which runs are forked, and where kills fell."""

import os
import random
import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Return a folder of small documents of words in random order."""
    folder = tmp_path_factory.mktemp("corpus")
    words = ("the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran", "with", "bread", "over")
    generator = random.Random(0)
    for number in range(30):
        text = " ".join(generator.choice(words) for _ in range(120))
        (folder / f"{number}.txt").write_text(f"{number} {text}\n")
    return folder


@pytest.fixture(scope="session")
def data(server, corpus, tmp_path_factory) -> Path:
    """Return prepared tokens."""
    folder = tmp_path_factory.mktemp("data")
    arguments = [f"--source={corpus}", f"--output={folder}", "--vocab_size=300"]
    ended = server.run("prepare", *arguments, "--val_fraction=0.1", folder=folder)
    assert ended.code == 0, ended.output
    return folder


@pytest.fixture(scope="session")
def fit(data):
    """Return a function that gives the arguments of a run of nine steps, in eighteen batches."""

    def arguments(output: Path, **options) -> list[str]:
        defaults = {
            "output": output,
            "checkpoint_every": 2,
            "loggers": "[csv]",
            "sample_tokens": 0,
            "trainer.max_steps": 9,
            "trainer.accelerator": "cpu",
            "trainer.accumulate_grad_batches": 2,
            "trainer.val_check_interval": 6,
            "trainer.limit_val_batches": 2,
            "trainer.log_every_n_steps": 3,
            "trainer.enable_progress_bar": "false",
            "data.source": "null",
            "data.data_dir": data,
            "data.sequence_length": 16,
            "data.batch_size": 2,
            "model.d_model": 16,
            "model.num_layers": 2,
            "model.num_heads": 2,
            "model.ffn": "moezoo.SparseMoE",
            "model.ffn.num_experts": 4,
            "model.ffn.router.jitter": 0.1,
            "model.optimizer.name": "muon",
            "model.schedule.warmup_steps": 2,
        }
        return ["fit", *(f"--{name}={value}" for name, value in (defaults | options).items())]

    return arguments


@pytest.fixture(scope="session")
def whole(server, fit, tmp_path_factory):
    """Return the folder of a run that nothing happened to, and how it ended."""
    folder = tmp_path_factory.mktemp("whole")
    ended = server.run(*fit(folder / "run"), folder=folder)
    assert ended.code == 0, ended.output
    return folder / "run", ended


def pytest_terminal_summary(terminalreporter) -> None:
    """Say at which moments the kills of a longer run fell, and what became of spoilt inputs."""
    if "MOEZOO_KILLS" not in os.environ and "MOEZOO_MUTATIONS" not in os.environ:
        return
    outcomes: list[tuple[str, dict[str, int]]] = []
    kills: dict[str, Counter[str]] = {}
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        for name, moment in report.user_properties:
            if name == "mutations":
                outcomes.append(moment)
            if name == "killed":
                test = report.nodeid.partition("::")[2].partition("[")[0]
                kills.setdefault(test, Counter())[moment] += 1
    for test, moments in kills.items():
        terminalreporter.write_line(f"{test}: {moments.total()} kills")
        for moment, count in moments.most_common():
            terminalreporter.write_line(f"  {count:3} {moment}")
    columns = ("clean", "harmless", "accepted", "traceback", "hang", "half-written", "unreadable")
    if outcomes:
        terminalreporter.write_line("".join(f"{name:>13}" for name in ("spoilt", *columns)))
    for artefact, counts in [*outcomes, ("all", total(outcomes))] if outcomes else []:
        figures = (f"{counts.get(column, 0):13}" for column in columns)
        terminalreporter.write_line(f"{artefact:>13}" + "".join(figures))


def total(outcomes) -> Counter[str]:
    return sum((Counter(counts) for _, counts in outcomes), Counter())
