"""The table of registers and shared memory: every kernel is in it, and the figures are measured."""

import re
from pathlib import Path

import pytest

from moezoo_kernels import resources

pytest.importorskip("triton", reason="triton is not installed")
PACKAGE = Path(resources.__file__).parent


def _launched():
    """Find what the sources launch: `_kernel[grid](…)`."""
    return {
        (path.stem, name)
        for path in PACKAGE.glob("*/triton_*.py")
        for name in re.findall(r"(?m)^\s+_(\w+)\[.+\]\(", path.read_text(encoding="utf-8"))
    }


def _jitted(kernel):
    return kernel.fn if hasattr(kernel, "configs") else kernel


def test_every_kernel_that_is_launched_is_listed_with_all_arguments():
    listed = set()
    for launch in resources.launches():
        function = _jitted(launch.kernel)
        listed.add((function.__module__.rpartition(".")[2], function.__name__.lstrip("_")))
        tuned = {name for constants, _ in resources._choices(launch) for name in constants}
        known = launch.types.keys() | launch.constants.keys() | tuned
        assert set(function.arg_names) == known, function.__name__
    assert listed == _launched()


def test_the_table_has_every_kernel_with_all_it_is_tuned_over():
    readme = (PACKAGE.parent / "README.md").read_text(encoding="utf-8")
    figures = r"[\d, ()]+"
    rows = re.findall(rf"(?m)^\| `(\w+)` \| `(\w+)` \|.*\| {figures} \| {figures} \|$", readme)
    assert rows == [
        (launch.op, _jitted(launch.kernel).__name__.lstrip("_"))
        for launch in resources.launches()
        for _ in resources._choices(launch)
    ]


def test_a_kernel_is_measured_in_its_machine_code():
    launch = next(one for one in resources.launches() if one.op == "weighted_bag")
    constants = launch.constants | {"COLUMNS": 256, "AHEAD": 4}
    one = launch._replace(kernel=launch.kernel.fn, constants=constants, warps=1)
    (row,) = resources.measure(one, 80)
    assert row[:4] == ("weighted_bag", "bag", "", 1)
    assert 16 <= row.registers <= 255
    assert row.spilled == row.shared == 0
