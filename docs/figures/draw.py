"""The figures of the layers' pages: ``python docs/figures/draw.py`` writes them all as SVG.

Blue are the parts that a token uses, grey the others. All flows from left to right.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
from canvas import BLUE, GREY, LINE, PALE, Canvas, Point
from matplotlib.backends.backend_svg import FigureCanvasSVG

from moezoo_models.checkpoints.atomic import atomic_write


def experts(canvas: Canvas, names: Sequence[str], chosen: Sequence[int], x: float = 62) -> None:
    """Draw a column of experts, each with its way in from the left and to the sum."""
    middle = canvas.axes.get_ylim()[1] / 2
    for n, name in enumerate(names):
        y = middle + 7.5 * ((len(names) - 1) / 2 - n)
        on = n in chosen
        canvas.box(x, y, name, w=16, on=on)
        if on:
            canvas.arrow((x + 8, y), (85, middle + (y - middle) * 0.06))


def mixture(chooser: str, below: str, scores: Sequence[float], chosen: Sequence[int]) -> Canvas:
    """Draw experts and the choice among them."""
    canvas = Canvas()
    canvas.ends(20)
    names = [f"expert {n + 1}" for n in range(len(scores))]
    experts(canvas, names, chosen)
    canvas.box(24, 20, chooser, w=18, h=8)
    canvas.arrow((8, 20), (15, 20))
    canvas.bars(24, 27, scores, chosen)
    canvas.text(24, 11.5, below, 7)
    for n in chosen:
        y = 20 + 7.5 * ((len(scores) - 1) / 2 - n)
        canvas.arrow((33, 20), (54, y))
    return canvas


def sparse_moe() -> Canvas:
    """Draw a router with a softmax over its experts."""
    return mixture(
        "router", "softmax, best top_k;\nbalanced by a loss or a bias", (2, 6, 1.5, 8, 3), (1, 3)
    )


def sigma_moe() -> Canvas:
    """Draw scores that do not compete."""
    return mixture(
        "σ(x W₃)", "a sigmoid each:\nscores do not compete", (7, 8, 2, 7.5, 1), (0, 1, 3)
    )


def hash_layer() -> Canvas:
    """Draw a table that maps token ids to experts."""
    canvas = mixture(
        "table[id]", "a fixed table of the\nvocabulary, no router", (0, 0, 8, 0, 0), (2,)
    )
    canvas.text(5, 13.5, "token id", 7)
    return canvas


def carved_moe() -> Canvas:
    """Draw a dense block's neurons cut into groups."""
    canvas = Canvas(44)
    canvas.text(12, 41, "a dense block's neurons", 7.5)
    for n in range(24):
        canvas.axes.add_patch(
            matplotlib.patches.Rectangle(
                (9, 2 + 1.5 * n), 6, 1.1, fc=BLUE if n % 7 in (0, 3) else LINE, lw=0
            )
        )
    canvas.arrow((17, 20), (27, 20), label="cut")
    names = ["shared", "routed 1", "routed 2", "routed 3", "routed 4"]
    for n, name in enumerate(names):
        y = 35 - 7.5 * n
        on = n in (0, 2)
        canvas.box(40, y, name, w=18, on=on)
        if on:
            canvas.arrow((49, y), (85, 20 + (y - 20) * 0.06))
    canvas.text(70, 40, "often active: for every token", 7)
    canvas.text(70, 3, "rarely: routed by representative neurons", 7)
    canvas.axes.add_patch(matplotlib.patches.Circle((87, 20), 2.2, fc="white", ec=BLUE, lw=1))
    canvas.text(87, 20, "+", 9)
    canvas.arrow((89.2, 20), (93, 20))
    canvas.text(95.5, 20, "y", 9)
    return canvas


def product_keys(canvas: Canvas, grid_x: float) -> None:
    """Draw a query cut in two, two sets of half-keys, and the grid of their pairs."""
    canvas.box(19, 20, "query", w=12)
    canvas.arrow((8, 20), (13, 20))
    for y, name in ((29, "half-keys 1"), (11, "half-keys 2")):
        canvas.box(37, y, name, w=15)
        canvas.arrow((25, 20), (29.5, y))
        canvas.bars(37, y + 3.6, (1, 3, 2, 4, 0.8, 1.5), (1, 3))
        canvas.arrow((44.5, y), (grid_x - 2, 20 + (y - 20) / 3))
    for row in range(6):
        for column in range(6):
            on = row in (1, 3) and column in (1, 3)
            canvas.axes.add_patch(
                matplotlib.patches.Rectangle(
                    (grid_x + 2.6 * column, 12.5 + 2.6 * row),
                    2,
                    2,
                    fc=BLUE if on and (row, column) != (1, 1) else GREY,
                    ec=LINE,
                    lw=0.5,
                )
            )


def product_key_table(rows: str, output: str) -> Canvas:
    """Draw rows in a grid of product keys, and the output of those that are found."""
    canvas = Canvas()
    canvas.ends(20)
    product_keys(canvas, 55)
    canvas.text(63, 32, rows, 7.5)
    canvas.text(63, 8, "top_k per head,\nh heads", 7)
    canvas.arrow((71.5, 20), (84.6, 20), label=output)
    return canvas


def peer() -> Canvas:
    """Draw experts of one neuron in a grid of product keys."""
    return product_key_table("n² experts of\none neuron", "g · act(u·x) v")


def product_key_memory() -> Canvas:
    """Draw values in a grid of product keys."""
    return product_key_table("n² values", "softmax · v")


def memory_plus() -> Canvas:
    """Draw a shared pool of values, gated and projected."""
    canvas = Canvas()
    canvas.box(5, 20, "x", w=6)
    product_keys(canvas, 52)
    canvas.text(60, 32, "n² values, one table\nfor several layers", 7.5)
    canvas.arrow((68.5, 20), (74.4, 20))
    canvas.axes.add_patch(matplotlib.patches.Circle((76.5, 20), 2.2, fc="white", ec=BLUE, lw=1))
    canvas.text(76.5, 20, "×", 9)
    canvas.box(76.5, 5.5, "silu(x W₁)", w=15)
    canvas.axes.plot([5, 5], [17, 5.5], color=BLUE, lw=1.2)
    canvas.arrow((5, 5.5), (69, 5.5))
    canvas.arrow((76.5, 8.5), (76.5, 17.8))
    canvas.arrow((78.7, 20), (82, 20))
    canvas.box(86, 20, "W₂", w=8)
    canvas.arrow((90, 20), (93.5, 20))
    canvas.text(96, 20, "y", 9)
    return canvas


def tree(canvas: Canvas, path: Sequence[int], x: float = 20, step: float = 15) -> list[Point]:
    """Draw a binary tree of three levels of nodes; give where the last level is."""
    levels = [[20.0], [29.0, 11.0], [33.5, 24.5, 15.5, 6.5]]
    for depth, heights in enumerate(levels):
        for n, y in enumerate(heights):
            on = path[depth] == n
            if depth:
                parent = levels[depth - 1][n // 2]
                canvas.arrow(
                    (x + step * (depth - 1) + 2.4, parent), (x + step * depth - 2.4, y), on
                )
            canvas.axes.add_patch(
                matplotlib.patches.Circle(
                    (x + step * depth, y), 2.2, fc=PALE if on else GREY, ec=BLUE if on else LINE
                )
            )
    return [(x + 2 * step, y) for y in levels[-1]]


def fast_feed_forward() -> Canvas:
    """Draw a tree that leads to one leaf."""
    canvas = Canvas()
    canvas.ends(20)
    canvas.arrow((8, 20), (17.6, 20))
    last = tree(canvas, (0, 1, 2))
    for n, (x, y) in enumerate(last):
        for side in (0, 1):
            height = y + 2.2 - 4.4 * side
            on = (n, side) == (2, 0)
            canvas.arrow((x + 2.4, y), (62, height), on)
            canvas.box(68, height, f"leaf {2 * n + side + 1}", w=12, h=3.6, on=on)
    canvas.arrow((74, last[2][1] + 2.2), (85, 19.6))
    canvas.text(20, 26, "w · x + b ≥ 0 ?", 7)
    canvas.text(27, 4, "training: all leaves, by probability\ninference: one", 7)
    return canvas


def ultra_fast_fff() -> Canvas:
    """Draw a tree whose nodes are neurons, of which those on a path are used."""
    canvas = Canvas()
    canvas.ends(20)
    canvas.arrow((8, 20), (17.6, 20))
    last = tree(canvas, (0, 1, 2))
    for point in ((20, 20), (35, 11), last[2]):
        canvas.arrow((point[0] + 2.2, point[1] + 1), (84.8, 20), label="")
    canvas.text(70, 30, "each node is a neuron;\nthose on the path count:\nΣ act(w·x + b) v", 7.5)
    canvas.text(20, 26, "sign of w · x + b", 7)
    return canvas


def top_k_ffn() -> Canvas:
    """Draw activations of which the strongest count."""
    canvas = Canvas()
    canvas.box(5, 20, "x", w=6)
    canvas.box(24, 20, "x W₁", w=14, h=8)
    canvas.arrow((8, 20), (17, 20))
    canvas.arrow((31, 20), (39, 20))
    heights = (2, 9, 3, 1, 11, 4, 2, 5, 10, 1, 3, 2, 4, 1)
    canvas.bars(52, 15, heights, (1, 4, 8))
    canvas.axes.plot([40, 64], [22, 22], color=BLUE, lw=0.9, ls=(0, (4, 3)))
    canvas.text(52, 30, "the strongest activations count:\nexact top-k, or a threshold from\n"
                "their mean and deviation", 7)  # fmt: skip
    canvas.arrow((66, 20), (71, 20))
    canvas.box(77, 20, "W₂", w=11, h=8)
    canvas.arrow((82.5, 20), (93, 20))
    canvas.text(95.5, 20, "y", 9)
    return canvas


def selective_ffn() -> Canvas:
    """Draw inputs, gates and hidden values of which the large ones are read."""
    canvas = Canvas()
    for x, heights, kept, below in (
        (9, (6, 1, 2, 8, 1, 5), (0, 3, 5), "inputs"),
        (43, (1, 7, 2, 1, 9, 1, 4, 2), (1, 4, 6), "activated gates"),
        (74, (1, 8, 1, 1, 2, 1, 6, 1), (1, 6), "hidden values"),
    ):
        canvas.bars(x, 15, heights, kept)
        half = len(heights) * 0.9 + 1
        canvas.axes.plot([x - half, x + half], [18.4, 18.4], color=BLUE, lw=0.9, ls=(0, (4, 3)))
        canvas.text(x, 11.5, below, 7)
    canvas.box(26, 20, "columns\nof W_gate", w=13, h=9)
    canvas.box(59, 20, "rows\nof W_up", w=12, h=9)
    canvas.box(88.5, 20, "columns\nof W_down", w=12, h=9)
    for start, end in ((16, 19.3), (32.7, 34.8), (51.5, 52.8), (65.2, 66), (82, 82.4)):
        canvas.arrow((start, 20), (end, 20))
    canvas.arrow((94.7, 20), (96.8, 20))
    canvas.text(98.4, 20, "y", 9)
    canvas.text(50, 34, "what stays below a threshold is taken for zero,\n"
                "and what would multiply it is not read", 7.5)  # fmt: skip
    return canvas


def persistent_memory() -> Canvas:
    """Draw attention over the context and learned vectors."""
    canvas = Canvas()
    canvas.ends(20)
    canvas.arrow((8, 20), (14, 20))
    canvas.box(21, 20, "queries", w=14)
    for n in range(5):
        canvas.box(42 + 4.4 * n, 29, "", w=3.6, h=6, on=n in (1, 4))
        canvas.box(42 + 4.4 * n, 11, "", w=3.6, h=6, on=n in (0, 3))
    canvas.text(51, 35.5, "keys and values of the context", 7.5)
    canvas.text(51, 4.5, "N learned keys and values, for every token", 7.5)
    canvas.arrow((28, 20), (39.5, 28))
    canvas.arrow((28, 20), (39.5, 12))
    canvas.text(71, 20, "one softmax\nover both", 7)
    canvas.arrow((62.5, 28), (85, 21))
    canvas.arrow((62.5, 12), (85, 19))
    return canvas


def finedeep() -> Canvas:
    """Draw two sub-layers of experts, each weighed by its own answer."""
    canvas = Canvas()
    for x, end in ((17, 57.3), (62, 96.6)):
        canvas.box(x, 20, "norm", w=9)
        for n, label in enumerate((30.2, 22.2, 9.8)):
            canvas.box(x + 15, 31 - 11 * n, f"E{n + 1}", w=9)
            canvas.arrow((x + 4.7, 20), (x + 10.3, 31 - 11 * n))
            canvas.arrow((x + 19.7, 31 - 11 * n), (x + 27.6, 21.6 - 1.6 * n))
            canvas.text(x + 24.6, label, f"r{n + 1}", 7)
        canvas.text(x + 29.4, 20, "+", 11)
        canvas.arrow((x + 31.2, 20), (end, 20))
        canvas.axes.plot([x - 10, x - 10, x + 28.8], [20, 3.6, 3.6], color=BLUE, lw=1.2)
        canvas.arrow((x + 28.8, 3.6), (x + 28.8, 18.2))
    canvas.arrow((2, 20), (12.3, 20), label="x")
    canvas.text(98.4, 20, "h", 9)
    canvas.text(50, 37.5, "r = σ(w · E): every expert answers, and its answer weighs itself", 7.5)
    return canvas


def token_tables() -> Canvas:
    """Draw rows that the ids of the last tokens name, and what the hidden state makes of them."""
    canvas = Canvas()
    for n, name in enumerate(("x[t-1]", "x[t]")):
        canvas.box(9, 27 - 11 * n, name, w=10)
        canvas.arrow((14, 27 - 11 * n), (22, 22 - 2 * n))
    canvas.box(29, 21, "id, or hash\nof n-grams", w=14, h=9)
    for row in range(9):
        canvas.axes.add_patch(
            matplotlib.patches.Rectangle(
                (46, 6 + 3.1 * row), 12, 2.4, fc=BLUE if row in (2, 6) else GREY, ec=LINE, lw=0.5
            )
        )
    canvas.arrow((36, 22), (45.5, 25.6))
    canvas.arrow((36, 20), (45.5, 13.4))
    canvas.text(52, 36.5, "a table of rows", 7.5)
    canvas.arrow((58.5, 25.6), (70, 22))
    canvas.arrow((58.5, 13.4), (70, 20))
    canvas.box(77, 21, "gate, factor\nor weights", w=14, h=9)
    canvas.box(77, 5, "h[t]", w=9)
    canvas.arrow((77, 8), (77, 16.3))
    canvas.arrow((84, 21), (93, 21))
    canvas.text(95.5, 21, "y", 9)
    return canvas


def memories() -> Canvas:
    """Draw a block whose residual stream memories are added to, before attention and behind it."""
    canvas = Canvas()
    canvas.arrow((2, 8), (97, 8), label="h")
    for x, name in (
        (24, "rows of ids"),
        (45, "attention"),
        (64, "feed-forward"),
        (85, "rows of ids"),
    ):
        canvas.box(x, 24, name, w=15, h=8)
        canvas.arrow((x - 4, 8), (x - 4, 19.5))
        canvas.arrow((x + 4, 19.5), (x + 4, 8.5))
        if name == "rows of ids":
            canvas.arrow((x, 35), (x, 28.5), label="ids")
    return canvas


FIGURES: tuple[Callable[[], Canvas], ...] = (
    sparse_moe, sigma_moe, hash_layer, carved_moe, peer, product_key_memory, memory_plus, memories,
    fast_feed_forward, ultra_fast_fff, top_k_ffn, selective_ffn, finedeep, token_tables,
    persistent_memory,
)  # fmt: skip


def write(folder: Path, kind: str = "svg") -> list[Path]:
    """Draw every figure into a folder, each named like its function."""
    written = []
    for figure in FIGURES:
        canvas = figure()
        written.append(folder / f"{figure.__name__}.{kind}")
        buffer = io.BytesIO()
        # Without a date and random names in it, equal figures are equal files.
        options = {"metadata": {"Date": None}} if kind == "svg" else {"dpi": 150}
        with matplotlib.rc_context({"svg.hashsalt": "moezoo"}):
            FigureCanvasSVG(canvas.figure)
            canvas.figure.savefig(buffer, format=kind, facecolor="white", **options)
        with atomic_write(written[-1]) as file:
            file.write(buffer.getvalue())
    return written


if __name__ == "__main__":
    for path in write(Path(__file__).parent, *sys.argv[1:]):
        print(path)
