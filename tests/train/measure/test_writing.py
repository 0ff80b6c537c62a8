"""Files of a report are whole or not there, and equal figures give equal files."""

import json
import math

import pytest
import torch
from matplotlib.figure import Figure

import moezoo
from moezoo_train.measure.environment import environment
from moezoo_train.measure.writing import save_figure, write_json


def test_a_number_that_is_not_finite_leaves_the_earlier_file(tmp_path):
    path = tmp_path / "deep" / "report.json"
    write_json(path, {"loss": 1.5})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"loss": math.nan}, allow_nan=False)
    assert json.loads(path.read_text()) == {"loss": 1.5}
    assert path.read_text().endswith("}\n")
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(("kind", "start"), [("svg", b"<?xml"), ("png", b"\x89PNG")])
def test_equal_figures_give_equal_files(kind, start, tmp_path):
    written = []
    for number in range(2):
        figure = Figure(figsize=(2, 1))
        figure.add_subplot().plot([0, 1], [1, 0])
        path = tmp_path / f"{number}.{kind}"
        save_figure(path, figure)
        written.append(path.read_bytes())
    assert written[0] == written[1]
    assert written[0].startswith(start)
    assert b"<dc:date>" not in written[0]


def test_the_environment_names_machine_and_versions():
    found = environment(torch.device("cpu"))
    assert set(found) == {"device", "threads", "moezoo", "torch", "python"}
    assert found["moezoo"] == moezoo.__version__
    assert found["threads"] == torch.get_num_threads()
    assert json.loads(json.dumps(found)) == found
