"""The page, in a real browser too: it sorts and shows pictures without an error or a network."""

import base64
import html
import io
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread, imsave

from moezoo import InputError
from moezoo_train.experiments.common.statistics import Mean
from moezoo_train.experiments.compare.execution import RunResult
from moezoo_train.experiments.compare.page import Finished, read_comparison, render, versions
from moezoo_train.experiments.compare.redraw import redraw
from moezoo_train.experiments.compare.results import Row
from moezoo_train.experiments.compare.table import COLUMNS, cells_of

ROOT = Path(__file__).parents[4]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
WICKED = "peer</script><script>throw Error('taken for markup')</script>{{style}}&amp;"

# Runs in the page after its own script: what a reader would do, and what comes of it.
PROBE = """
<script>
const names = () => [...document.querySelectorAll("table.sortable tbody tr")]
  .map((line) => line.cells[0].textContent);
const header = (name) => [...document.querySelectorAll("table.sortable th button")]
  .find((button) => button.textContent === name);
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
found.keyboard = [...document.querySelectorAll("th button")].every((b) => b.tabIndex === 0);
found.pictures = [...document.images].map((image) => image.naturalWidth);
found.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
found.styled = getComputedStyle(document.querySelector(".card")).borderRadius;
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
    return Finished(whole, ROWS, results, [], config="methods: {<b>: {}}\n")


@pytest.fixture(scope="module")
def picture() -> bytes:
    """A picture of another shape than any other."""
    buffer = io.BytesIO()
    imsave(buffer, np.random.default_rng(0).random((60, 123, 3)))
    return buffer.getvalue()


@pytest.fixture(scope="module")
def browser() -> str:
    for name in BROWSERS:
        if path := shutil.which(name):
            return path
    pytest.skip(f"needs a browser: {' or '.join(BROWSERS)}; see CONTRIBUTING.md")


def look(browser: str, folder: Path, page: str, width: int) -> tuple[dict, np.ndarray]:
    """Open a page in a frame of a width; return what the probe found, and the picture of it."""
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
def test_it_sorts_and_shows_pictures_in_a_browser(browser, comparison, picture, tmp_path, width):
    page = render(comparison, {"loss": picture, "load": picture})
    found, shot = look(browser, tmp_path, page, width)
    assert found["errors"] == []
    other = "expert_choice (not causal)"
    assert found["initial"] == ["mixtral", WICKED, "dense_mlp", other, "hash"]
    assert found["ascending"] == [other, "mixtral", "dense_mlp", WICKED, "hash"]
    assert found["descending"] == [WICKED, "dense_mlp", "mixtral", other, "hash"]
    assert found["sorted"] == "descending"
    # Dashes are last, whichever way it is sorted, in the order in which they were.
    assert found["missing"] == [WICKED, "mixtral", other, "dense_mlp", "hash"]
    assert found["missingTurned"] == [other, "mixtral", WICKED, "dense_mlp", "hash"]
    assert found["byName"] == ["dense_mlp", other, "hash", "mixtral", WICKED]
    assert found["keyboard"]
    assert found["pictures"] == [123, 123]
    assert found["wide"] == 0  # the table scrolls, the page does not
    assert found["styled"] == "12px"
    assert shot.shape[:2] == (3000, max(width, 500))
    # A page that drew nothing has the few different lines of its background and frames.
    assert len(np.unique(shot[:, : width // 2].reshape(3000, -1), axis=0)) > 100


class Reader(HTMLParser):
    """What a browser would find in a page: its elements, and the text of its cells and titles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.cells: list[list[str]] = []
        self.keys: list[str | None] = []
        self.title = self.config = ""
        self._within = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        self._within = tag
        if tag == "tr":
            self.cells.append([])
        if tag == "td":
            self.cells[-1].append("")
            self.keys.append(dict(attrs).get("data-key"))

    def handle_endtag(self, tag):
        self._within = ""

    def handle_data(self, data):
        if self._within == "td":
            self.cells[-1][-1] += data
        elif self._within == "title":
            self.title += data
        elif self._within == "code":
            self.config = data  # the last one


def test_it_needs_no_other_file_and_takes_no_text_for_markup(comparison, picture):
    page = render(comparison, {"loss": picture})
    assert not re.search(r"https?://|@import|url\(|<link|src=(?!\"data:)", page)
    assert "Content-Security-Policy" in page
    found = Reader(page)
    assert found.elements.count("script") == 1
    assert found.elements.count("img") == 1
    assert "b" not in found.elements
    assert found.title == "Methods at equal active FLOPs · runs/a <b>"
    assert found.config == comparison.config
    assert "{{" not in page.replace(html.escape(WICKED), "")
    table = [line for line in found.cells if len(line) == len(COLUMNS)]
    assert [line[0] for line in table] == [
        "mixtral", WICKED, "dense_mlp", "expert_choice (not causal)", "hash"
    ]  # fmt: skip
    assert table[0] == cells_of(ROWS[0], 2)
    assert [line for line in found.cells if len(line) == 7] == [
        [WICKED, "b", "holds", "mixtral < dense_mlp", "loss", "+0.200", "+0.200 to +0.200"]
    ]
    assert len(page.replace(base64.b64encode(picture).decode(), "")) < 30_000


def test_cells_are_sorted_by_numbers_and_those_without_one_have_no_key(comparison):
    rows = [replace(ROWS[0], loss=Mean(float("nan"), None, 1)), ROWS[1]]
    keys = Reader(render(replace(comparison, rows=rows), {})).keys
    tokens, loss = list(COLUMNS).index(">tokens/s"), list(COLUMNS).index(">val loss")
    assert (keys[tokens], keys[loss]) == ("900.0", None)
    assert keys[len(COLUMNS) + tokens] == "10000.0"
    assert keys[len(COLUMNS) + loss] == "3.9"


def test_a_comparison_without_claims_or_pictures_has_no_room_for_them(comparison):
    whole = {**comparison.whole, "experiment": {"model": {"num_layers": 2}}, "command": None}
    page = render(replace(comparison, whole=whole, config=None), {})
    assert "<h2>Claims</h2>" not in page
    assert "<img" not in page
    assert "Made by" not in page
    assert "<h2>Claims</h2>" in render(comparison, {})


def test_versions_are_counted(comparison):
    results = [*comparison.results, replace(comparison.results[0], environment={"torch": "8"})]
    found = versions(results)
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
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert page.count("<img") == 3
    assert 'id="compute"' not in page
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
