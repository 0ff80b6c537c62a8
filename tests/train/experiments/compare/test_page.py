"""The page in a real browser: it sorts, filters and draws without an error or a network."""

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from moezoo import InputError
from moezoo_train.experiments.common.statistics import Mean
from moezoo_train.experiments.compare.curves import Curve, Point
from moezoo_train.experiments.compare.execution import RunResult
from moezoo_train.experiments.compare.page import Finished, contents, read_comparison, render
from moezoo_train.experiments.compare.redraw import redraw
from moezoo_train.experiments.compare.results import Row

ROOT = Path(__file__).parents[4]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
WICKED = "peer</script><script>throw Error('taken for markup')</script>{{style}}&amp;"

# Runs in the page after its own scripts: what a reader would do, and what comes of it.
PROBE = """
<script>
const names = () => [...document.querySelectorAll("#table tbody tr")]
  .filter((line) => !line.hidden).map((line) => line.dataset.row);
const header = (name) => [...document.querySelectorAll("#table th button")]
  .find((button) => button.textContent.replace("\\u00a0", " ") === name);
const labels = (id) => [...document.querySelectorAll(`#${id} text[data-row], #${id} .rows .name`)]
  .map((text) => text.textContent);
const boxes = (id) => [...document.querySelectorAll(`#${id} text`)]
  .map((text) => text.getBoundingClientRect()).filter((box) => box.width);
const overlaps = (id) => boxes(id).flatMap((a, n) => boxes(id).slice(n + 1).filter((b) =>
  a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 4 && b.top < a.bottom - 4));
const found = { initial: names() };
header("tokens/s").click();
found.ascending = names();
header("tokens/s").click();
found.descending = names();
found.sorted = header("tokens/s").closest("th").getAttribute("aria-sort");
header("random routing").click();
found.missing = names();
header("random routing").click();
found.missingTurned = names();
header("method").click();
found.byName = names();
found.keyboard = [...document.querySelectorAll("#table th button")].every((b) => b.tabIndex === 0);
found.charts = ["loss", "compute", "parameters", "load"].map((id) =>
  document.querySelectorAll(`#${id} svg`).length);
found.labels = Object.fromEntries(["loss", "compute", "parameters", "load"].map((id) =>
  [id, labels(id).length]));
found.overlapping = ["loss", "compute", "parameters", "load"].flatMap((id) => overlaps(id).length);
found.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
const dashed = () => [...document.querySelectorAll("#compute .ablation")]
  .filter((group) => group.style.display !== "none").length;
document.getElementById("ablations").checked = true;
document.getElementById("ablations").dispatchEvent(new Event("change", { bubbles: true }));
found.dashed = dashed();
const mark = document.querySelector("#parameters g[data-row]");
mark.dispatchEvent(new PointerEvent("pointermove", { clientX: 90, clientY: 90 }));
found.tooltip = document.getElementById("tooltip").hidden ? "" :
  document.getElementById("tooltip").textContent;
found.focus = document.querySelectorAll(".focus").length;
mark.dispatchEvent(new PointerEvent("pointerleave"));
found.left = document.getElementById("tooltip").hidden;
document.querySelector(".chip").click();
found.filtered = names();
found.filteredLabels = labels("loss").length;
document.getElementById("none").click();
found.empty = names();
document.getElementById("all").click();
found.theme = document.documentElement.dataset.theme;
document.getElementById("theme").click();
found.otherTheme = document.documentElement.dataset.theme;
found.styled = getComputedStyle(document.querySelector(".card")).borderRadius;
found.claims = [...document.querySelectorAll("#claims tbody tr")].map((line) =>
  [...line.cells].map((cell) => cell.textContent));
found.config = document.querySelector("#again details code").textContent;
found.errors = errors;
const note = document.createElement("pre");
note.id = "probe";
note.textContent = JSON.stringify(found);
document.body.append(note);
</script>
"""
WATCH = """<script>const errors = [];
addEventListener("error", (event) => errors.push(String(event.message)));
addEventListener("securitypolicyviolation", (event) => errors.push(event.violatedDirective));
</script>"""


def row(name: str, layer: str, loss: float | None, **changes) -> Row:
    random = changes.pop("random", None)
    common = {
        "name": name,
        "layer": layer,
        "layers": (0, 1),
        "width": ("d_ff", 512),
        "causal": True,
        "loss": None if loss is None else Mean(loss, 0.02, 2),
        "bits_per_byte": None if loss is None else Mean(loss / 2, 0.01, 2),
        "random_loss": None if random is None else Mean(random, 0.03, 2),
        "gain": None if random is None or loss is None else Mean(random - loss, 0.01, 2),
        "total_parameters": 2_500_000,
        "active_parameters": 919_000,
        "flops_ratio": 1.0,
        "tokens_per_second": 1000.0,
        "evenness": None,
        "busiest": None,
        "usage": None,
        "unevenness": None,
        "peak_memory": 700_000_000,
        "failures": (),
    }
    return Row(**(common | changes))


ROWS = [
    row("mixtral", "SparseMoE", 3.8, random=4.1, tokens_per_second=900.0),
    row(WICKED, "PEER", 3.9, random=3.85, tokens_per_second=10_000.0),
    row("dense_mlp", "DenseFFN", 4.0, tokens_per_second=2000.0),
    row("expert_choice", "SparseMoE", 4.05, random=4.2, causal=False, tokens_per_second=1.5),
    row("hash", "HashLayer", None, tokens_per_second=None, failures=("hash, seed 0: loss nan",)),
]


def curve(name: str, end: float, random: bool = False) -> Curve:
    points = [
        Point(1000 * n, 3e6 * n, float(n), 7 - (7 - end) * n / 20, 0.02) for n in range(1, 21)
    ]
    return Curve(name, random, tuple(points))


@pytest.fixture
def comparison() -> Finished:
    results = [
        RunResult(
            f"{each.name}-{seed}",
            hash="",
            identity={"moezoo": "0.1.0"},
            val_loss=each.loss.value if each.loss else float("nan"),
            evenness=None if each.name == "dense_mlp" else 0.8 + seed / 10,
            failure=None if each.loss else "loss nan",
            environment={"device": "abacus", "torch": "9"},
        )
        for each in ROWS
        for seed in (0, 1)
    ]
    whole = {
        "title": "Methods at equal active FLOPs: runs/a <b>",
        "notes": ["2 blocks & more.", "Not causal: expert_choice."],
        "command": "moezoo compare --config runs/a/config.yaml",
        "experiment": {
            "baseline": "dense_mlp",
            "model": {"num_layers": 2},
            "claims": {"a": {"says": WICKED, "paper": "b", "order": ["mixtral", "dense_mlp"]}},
        },
    }
    curves = [curve("mixtral", 3.5), curve("mixtral", 3.9, True), curve("dense_mlp", 3.8)]
    return Finished(whole, ROWS, results, curves, config="methods: {<b>: {}}\n")


@pytest.fixture(scope="module")
def browser() -> str:
    for name in BROWSERS:
        if path := shutil.which(name):
            return path
    pytest.skip(f"needs a browser: {' or '.join(BROWSERS)}; see CONTRIBUTING.md")


def look(browser: str, folder: Path, page: str, width: int) -> tuple[dict, np.ndarray]:
    """Open a page in a frame of a width; give what the probe found, and the picture of it."""
    page = page.replace('<meta charset="utf-8">', f'<meta charset="utf-8">\n{WATCH}')
    page = html.escape(page.replace("</body>", f"{PROBE}</body>"))
    # Windows are not narrower than 500 pixels, frames are.
    frame = (
        f'<body style="margin:0"><iframe style="width:{width}px;height:3000px;border:0"'
        f' srcdoc="{page}"></iframe><script>const frame = document.querySelector("iframe");'
        'frame.addEventListener("load", () => document.body.append('
        'frame.contentDocument.getElementById("probe").cloneNode(true)));</script>'
    )
    (folder / "frame.html").write_text(frame, encoding="utf-8")
    options = [
        "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        "--virtual-time-budget=2000", f"--user-data-dir={folder / 'profile'}",
        f"--window-size={max(width, 500)},3000", f"--screenshot={folder / 'shot.png'}",
        "--dump-dom", (folder / "frame.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(
        [browser, *options], check=True, capture_output=True, encoding="utf-8", timeout=120
    )
    note = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.S)
    assert note, "the page's script did not get as far as the probe"
    return json.loads(html.unescape(note[1])), imread(folder / "shot.png")


@pytest.mark.parametrize("width", [1280, 400])
def test_it_sorts_filters_and_draws_in_a_browser(browser, comparison, tmp_path, width):
    found, shot = look(browser, tmp_path, render(contents(comparison)), width)
    assert found["errors"] == []
    assert found["initial"] == ["mixtral", WICKED, "dense_mlp", "expert_choice", "hash"]
    assert found["ascending"] == ["expert_choice", "mixtral", "dense_mlp", WICKED, "hash"]
    assert found["descending"] == [WICKED, "dense_mlp", "mixtral", "expert_choice", "hash"]
    assert found["sorted"] == "descending"
    # Dashes are last, whichever way it is sorted, in the order in which they were.
    assert found["missing"] == [WICKED, "mixtral", "expert_choice", "dense_mlp", "hash"]
    assert found["missingTurned"] == ["expert_choice", "mixtral", WICKED, "dense_mlp", "hash"]
    assert found["byName"] == ["dense_mlp", "expert_choice", "hash", "mixtral", WICKED]
    assert found["keyboard"]
    assert found["charts"] == [1, 1, 1, 1]
    assert found["labels"]["loss"] == 4  # hash failed
    assert found["labels"]["compute"] == (2 if width > 600 else 0)
    assert found["overlapping"] == [0, 0, 0, 0]
    assert found["wide"] == 0  # the table scrolls, the page does not
    assert found["dashed"] == 1
    assert "4.100 ± 0.030" in found["tooltip"]
    assert found["focus"] >= 3
    assert found["left"]
    assert len(found["filtered"]) == 4
    assert found["filteredLabels"] == 3
    assert found["empty"] == []
    assert {found["theme"], found["otherTheme"]} == {"light", "dark"}
    assert found["styled"] == "12px"
    assert found["claims"] == [
        [WICKED, "b", "holds", "mixtral < dense_mlp", "loss", "+0.200", "+0.200 to +0.200"]
    ]
    assert found["config"] == comparison.config
    assert shot.shape[:2] == (3000, max(width, 500))
    # A page that drew nothing has the few different lines of its background and frames.
    assert len(np.unique(shot[:, : width // 2].reshape(3000, -1), axis=0)) > 600


def test_it_needs_no_other_file_and_takes_no_text_for_markup(comparison):
    page = render(contents(comparison))
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|@import|url\((?!#)|<link|src=", page)
    assert "Content-Security-Policy" in page
    assert page.count("<script") == page.count("</script>") == 2
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert json.loads(text)["rows"][1]["name"] == WICKED
    assert "<title>Methods at equal active FLOPs · runs/a &lt;b&gt;</title>" in page
    assert "{{" not in page.replace(text, "")
    assert len(page) < 200_000


def test_losses_that_are_no_numbers_are_left_out(comparison):
    rows = [replace(ROWS[0], loss=Mean(float("nan"), None, 1))]
    page = render(contents(replace(comparison, rows=rows)))
    assert "NaN" not in re.search(r'id="data">(.*?)</script>', page, re.S)[1]


def test_long_curves_are_thinned_by_averaging(comparison):
    points = tuple(Point(n, n, n, float(n % 2), None) for n in range(1, 801))
    (found,) = contents(replace(comparison, curves=[Curve("mixtral", False, points)]))["curves"]
    assert len(found["loss"]) == 160
    assert found["tokens"][-1] == 800
    assert found["loss"][0] == pytest.approx(3 / 5)
    assert found["error"][0] is None


def test_versions_are_counted(comparison):
    results = [*comparison.results, replace(comparison.results[0], environment={"torch": "8"})]
    found = contents(replace(comparison, results=results))["versions"]
    assert [(each["torch"], each["runs"]) for each in found] == [("9", 10), ("8", 1)]
    assert found[0]["moezoo"] == "0.1.0"


def test_it_is_drawn_again_from_what_an_earlier_version_wrote(tmp_path):
    whole = json.loads((ROOT / "docs" / "compare" / "results.json").read_text())
    whole["rows"] = whole["rows"][:4]
    for each in [*whole["rows"], *whole["runs"]]:
        each.pop("peak_memory", None)
    (tmp_path / "results.json").write_text(json.dumps(whole))
    files = redraw(tmp_path)
    assert {*files, "results.json"} == {path.name for path in tmp_path.iterdir()}
    assert "index.html" in files
    assert "compute.png" not in files  # there are no curves beside it
    found = read_comparison(tmp_path)
    assert len(found.rows) == 4
    assert found.rows[0].peak_memory is None


def test_without_a_comparison_there_is_nothing_to_draw(tmp_path):
    with pytest.raises(InputError, match="holds none that can be read"):
        redraw(tmp_path)
    (tmp_path / "results.json").write_text('{"rows": [{"name": "a"}], "runs": []}')
    with pytest.raises(InputError, match="holds none that can be read"):
        read_comparison(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
