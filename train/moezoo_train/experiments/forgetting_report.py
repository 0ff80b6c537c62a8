"""The table, the verdict and the picture of ``moezoo compare forgetting``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moezoo_train.experiments.common.palette import BLUE, GREEN, INDIGO, OCHRE, PINK, RED, SKY
from moezoo_train.experiments.common.report import write_report
from moezoo_train.experiments.common.statistics import Mean, mean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BEFORE = "before"
MEASURES = ("new_facts", "new_taught", "old_facts", "text_loss")
COLUMNS = (
    "method",
    ">learning rate",
    ">new facts",
    ">as taught",
    ">old facts",
    ">forgotten",
    ">text loss",
)
_COLORS = (RED, BLUE, GREEN, OCHRE, PINK, SKY, INDIGO)
_MARKERS = "osD^vPX"
_LEARNED = 1 / 3
"""Of what the best method recalls; less is too little to compare what is forgotten for it."""


@dataclass(frozen=True)
class TeachingResult:
    """The share of facts that one run learned and forgot.

    Attributes:
        method: way of teaching; ``before`` is the model that nothing was taught yet.
        rate: learning rate.
        seed: of the new facts.
        text_loss: nats per token of text held out before the first training.
        old_facts: share of the old facts recalled.
        new_facts: share of the new facts recalled in wordings that they were not taught in.
        new_taught: the same in those that they were.
        seconds: that teaching took.
    """

    method: str
    rate: float
    seed: int
    text_loss: float
    old_facts: float
    new_facts: float
    new_taught: float
    seconds: float = 0.0


@dataclass(frozen=True)
class Setting:
    """A method at a learning rate, over seeds.

    Attributes:
        method: as in :class:`TeachingResult`, as are the others.
        rate: as there.
        text_loss: as there.
        old_facts: as there.
        new_facts: as there.
        new_taught: as there.
    """

    method: str
    rate: float
    text_loss: Mean
    old_facts: Mean
    new_facts: Mean
    new_taught: Mean


def settings(outcomes: Sequence[TeachingResult]) -> list[Setting]:
    """Average over seeds, in the order in which methods and rates first come."""
    groups: dict[tuple[str, float], list[TeachingResult]] = {}
    for each in outcomes:
        groups.setdefault((each.method, each.rate), []).append(each)
    found = []
    for (method, rate), members in groups.items():
        means: dict[str, Any] = {
            measure: mean([getattr(each, measure) for each in members]) for measure in MEASURES
        }
        found.append(Setting(method, rate, **means))
    return found


def forgotten(setting: Setting, before: Setting) -> float:
    """Return the share of the old facts known before that is not recalled any more."""
    known = before.old_facts.value
    return 1 - setting.old_facts.value / known if known else 0.0


def verdict(found: Sequence[Setting]) -> str:
    """Return what each method forgot at the learning rate that teaches most, and at equal learning.

    Equal learning is as many new facts as every method recalls at some rate, but for those that
    learn less than a third of what the best does; what is kept there is interpolated between the
    two rates around it.
    """
    before = next(each for each in found if each.method == BEFORE)
    methods = list(dict.fromkeys(each.method for each in found if each.method != BEFORE))
    tried = {m: [each for each in found if each.method == m] for m in methods}
    best = {m: max(tried[m], key=lambda each: each.new_facts.value) for m in methods}
    learned = {m: each.new_facts.value for m, each in best.items()}
    enough = [m for m in methods if learned[m] >= _LEARNED * max(learned.values())]
    level = min(learned[m] for m in enough)
    lines = ["At the learning rate that teaches most:"]
    for method, setting in best.items():
        loss = setting.text_loss.value - before.text_loss.value
        lines.append(
            f"- {method} ({setting.rate:g}): {setting.new_facts.value:.0%} of the new facts, "
            f"{forgotten(setting, before):.0%} of the old ones forgotten, text loss {loss:+.3f}"
        )
    lines += ["", f"Where each recalls {level:.0%} of the new facts, between learning rates:"]
    for method in enough:
        old, loss = at_level([before, *tried[method]], level)
        share = 1 - old / before.old_facts.value if before.old_facts.value else 0.0
        change = loss - before.text_loss.value
        lines.append(f"- {method}: {share:.0%} of the old ones forgotten, text loss {change:+.3f}")
    for method in methods:
        if method not in enough:
            lines.append(f"- {method}: no more than {learned[method]:.0%} at any rate")
    return "\n".join(lines)


def at_level(chain: Sequence[Setting], level: float) -> tuple[float, float]:
    """Interpolate old facts recalled and text loss where a chain of rates first reaches a level.

    Args:
        chain: settings, the first of which has learned no more than the level.
        level: share of the new facts recalled, reached by one of them.
    """
    for low, high in pairwise(chain):
        rise = high.new_facts.value - low.new_facts.value
        if high.new_facts.value >= level:
            weight = (level - low.new_facts.value) / rise if rise else 1.0
            break
    old, loss = (
        (1 - weight) * getattr(low, measure).value + weight * getattr(high, measure).value
        for measure in ("old_facts", "text_loss")
    )
    return old, loss


def report(
    folder: Path, outcomes: Sequence[TeachingResult], taught: Sequence[int], asked: Sequence[int]
) -> None:
    """Print table and verdict, and write table.md, results.json and forgetting.png.

    Args:
        folder: where.
        outcomes: of all runs, the model before among them.
        taught: wordings in which new facts were taught.
        asked: wordings in which facts were asked for.
    """
    found = settings(outcomes)
    before = next(each for each in found if each.method == BEFORE)
    rows = [_row(each, before) for each in found]
    write_report(
        folder,
        "New facts learned and old ones kept",
        COLUMNS,
        rows,
        {
            "wordings": {"taught": list(taught), "asked": list(asked)},
            "results": [asdict(each) for each in outcomes],
        },
        summary=verdict(found),
        pictures={"forgetting": draw(found)},
    )


def _row(setting: Setting, before: Setting) -> list[str]:
    own = setting is before
    return [
        setting.method,
        "" if own else f"{setting.rate:g}",
        _percent(setting.new_facts),
        _percent(setting.new_taught),
        _percent(setting.old_facts),
        "" if own else f"{100 * forgotten(setting, before):.0f} %",
        str(setting.text_loss),
    ]


def _percent(share: Mean) -> str:
    error = "" if share.error is None else f" ± {100 * share.error:.1f}"
    return f"{100 * share.value:.1f}{error} %"


def draw(found: Sequence[Setting]) -> Figure:
    """Draw what is kept over what is learned, a line per method through its learning rates."""
    from matplotlib.figure import Figure

    before = next(each for each in found if each.method == BEFORE)
    methods = list(dict.fromkeys(each.method for each in found if each.method != BEFORE))
    figure = Figure(figsize=(9, 4.2), dpi=160, layout="constrained")
    panels = {
        "old_facts": ("old facts recalled (%)", 100.0),
        "text_loss": ("loss on old text (nats per token)", 1.0),
    }
    for axes, (measure, (label, factor)) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        level = factor * getattr(before, measure).value
        axes.axhline(level, color="#888888", linewidth=0.9, linestyle=(0, (4, 3)))
        for number, method in enumerate(methods):
            chain = [each for each in found if each.method == method]
            _draw_chain(axes, [before, *chain], measure, factor, number, method)
        axes.plot(100 * before.new_facts.value, level, "*", color="#222222", markersize=11)
        axes.set_xlabel("new facts recalled, in wordings not taught (%)")
        axes.set_ylabel(label)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[1].invert_yaxis()
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside upper center",
        ncols=min(len(methods), 3),
        frameon=False,
        fontsize=9,
    )
    figure.supxlabel(
        "★ before teaching; a line joins a method's learning rates, the smallest first; up and "
        "right is better",
        fontsize=8,
        color="#555555",
    )
    return figure


def _draw_chain(
    axes: Any, chain: Sequence[Setting], measure: str, factor: float, number: int, method: str
) -> None:
    color = _COLORS[number % len(_COLORS)]
    kept = [getattr(each, measure) for each in chain]
    learned = [each.new_facts for each in chain]
    axes.errorbar(
        [100 * each.value for each in learned],
        [factor * each.value for each in kept],
        xerr=[100 * (each.error or 0.0) for each in learned],
        yerr=[factor * (each.error or 0.0) for each in kept],
        color=color,
        marker=_MARKERS[number % len(_MARKERS)],
        markersize=5,
        linewidth=1.3,
        elinewidth=0.8,
        capsize=2,
        label=method,
        markevery=slice(1, None),
    )
