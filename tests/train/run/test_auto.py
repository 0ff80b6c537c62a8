"""``--ckpt_path auto``: go on where something is to go on from, begin where nothing is."""

from types import SimpleNamespace

import pytest

from moezoo import InputError
from moezoo_train.run import callbacks
from moezoo_train.run.callbacks import SameCheckpoint
from moezoo_train.run.run_directory import find_checkpoint


@pytest.fixture
def output(tmp_path):
    """Return a function that fills the directory of a run with empty files."""

    def fill(*names):
        for name in names:
            path = tmp_path / "run" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return tmp_path / "run"

    return fill


LAST, BEST = "checkpoints/last.ckpt", "checkpoints/best.ckpt"


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ((), None),
        (("config.yaml", "metrics.csv"), None),  # killed before its first checkpoint
        ((LAST, BEST, "model/config.json", "report.json"), LAST),
        ((LAST,), LAST),
        ((BEST, "metrics.csv"), BEST),
    ],
)
def test_it_finds_what_there_is(names, found, output):
    directory = output(*names)
    path = find_checkpoint(directory, "auto", "fit", overwrite=False)
    assert path == (found and str(directory / found))


@pytest.mark.parametrize(
    ("names", "command", "overwrite", "message"),
    [
        (
            ("model/config.json",),
            "fit",
            False,
            r"holds model/ and no checkpoint .*initialize_from",
        ),
        (
            ("report.json",),
            "fit",
            False,
            r"holds report.json and no checkpoint .*another --output",
        ),
        (("checkpoints/step3.ckpt",), "fit", False, r"give --ckpt_path .*step3.ckpt"),
        ((LAST,), "fit", True, "overwrite: ckpt_path auto never overwrites"),
        ((), "fit", True, "overwrite: ckpt_path auto never overwrites"),
        ((LAST,), "validate", False, "auto is for moezoo fit; give validate last, best or a path"),
    ],
)
def test_it_never_overwrites(names, command, overwrite, message, output):
    with pytest.raises(InputError, match=message) as error:
        find_checkpoint(output(*names), "auto", command, overwrite)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("paths", [["a", "a"], [None, None]])
def test_processes_that_found_the_same_go_on(paths, monkeypatch):
    monkeypatch.setattr(callbacks, "gather_from_ranks", lambda own: paths)
    SameCheckpoint(paths[1]).setup(SimpleNamespace(), SimpleNamespace(), "fit")


@pytest.mark.parametrize("paths", [["a", None], [None, "a"], ["a", "b"]])
def test_processes_that_did_not_are_all_refused(paths, monkeypatch):
    monkeypatch.setattr(callbacks, "gather_from_ranks", lambda own: paths)
    for own in paths:
        with pytest.raises(
            InputError, match=r"ckpt_path: process 0 begins from .*, process 1 from"
        ):
            SameCheckpoint(own).setup(SimpleNamespace(), SimpleNamespace(), "fit")
