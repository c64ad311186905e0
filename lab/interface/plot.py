"""The plot of a night: every experiment, the frontier of kept changes and their names."""

import io
import os
import warnings
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from lab.loop.history import Experiment, State

PAPER = ("#ffffff", "#161618")  # light and dark, as in the template
NAMES = 40  # most names of kept changes in the plot
GAP = 0.004  # between a label and anything else, as a share of the axes
COLOURS = (  # light and dark
    {"keep": "#1a7f37", "discard": "#8a8a8f", "crash": "#c0362c"},
    {"keep": "#3fb950", "discard": "#9a9aa0", "crash": "#f47067"},
)


def picture(state: State, name: str, dark: bool = False, narrow: bool = False) -> bytes:
    """PNG: val_bpb of every experiment with its standard error, and the kept frontier, labelled unless narrow."""
    os.environ.pop("MPLBACKEND", None)  # set by notebooks; matplotlib reads it on import
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    colours = COLOURS[dark]
    style = matplotlib.style.context("dark_background" if dark else "default", after_reset=True)  # ignores matplotlibrc
    with style, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a hypothesis in letters that the font lacks
        figure = Figure(figsize=(4.5, 4) if narrow else (11, 5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        figure.set_facecolor(PAPER[dark])
        axes.set_facecolor(PAPER[dark])
        measured = [e for e in state.settled if e.val_bpb is not None]
        kept = [e for e in measured if e.status == "keep"]
        for status in ("discard", "keep"):
            group = [e for e in measured if e.status == status]
            axes.errorbar(
                [e.id for e in group],
                [e.val_bpb for e in group],
                [e.error for e in group],
                fmt="o",
                markersize=6 if status == "keep" else 4,
                linewidth=0.8,
                alpha=1.0 if status == "keep" else 0.6,
                color=colours[status],
                label={"keep": "kept", "discard": "discarded"}[status],
            )
        if kept:
            low, high = _limits([e.val_bpb for e in measured], kept)
            last = max(e.id for e in state.settled)
            axes.step([*(e.id for e in kept), last], [*(e.val_bpb for e in kept), kept[-1].val_bpb], where="post",
                      color=colours["keep"], linewidth=1.5)  # fmt: skip
            if crashed := [e.id for e in state.settled if e.status == "crash"]:
                axes.plot(crashed, [high] * len(crashed), "x", color=colours["crash"], label="crashed", clip_on=False)
            axes.set_ylim(low, high)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.legend(frameon=False, loc="upper right")
        axes.set(xlabel="experiment", ylabel="val_bpb" if narrow else "val_bpb ± standard error")
        title = f"{name}: {len(state.tried_out)} experiments, {max(0, len(kept) - 1)} kept"
        axes.set_title(title, parse_math=False)
        axes.spines[["top", "right"]].set_visible(False)
        if not narrow:
            _label(axes, measured, kept)
        out = io.BytesIO()
        figure.savefig(out, dpi=160 if narrow else 110)
    return out.getvalue()


class Box(NamedTuple):
    """A rectangle in the plot, as shares of the axes."""

    left: float
    right: float
    low: float
    high: float

    def is_free(self, taken: np.ndarray) -> bool:
        """Whether it is at least GAP away from each of these boxes (N, 4)."""
        left, right, low, high = taken.T
        across = (self.left < right + GAP) & (left < self.right + GAP)
        return not (across & (self.low < high + GAP) & (low < self.high + GAP)).any()


def _limits(values: list[float], kept: list[Experiment]) -> tuple[float, float]:
    """Limits of the y axis: the frontier and the usual failures; a few extreme values may lie outside."""
    best, base, error = min(e.val_bpb for e in kept), kept[0].val_bpb, max(e.error for e in kept)
    usual = sorted(values)[int(0.9 * (len(values) - 1))]
    room = max(base - best, 4 * error, 1e-3)
    return best - 0.25 * room - error, max(base, min(usual, base + 2 * room)) + 0.35 * room + error


def _label(axes: Any, measured: list[Experiment], kept: list[Experiment]) -> None:
    """Label the kept changes, the largest gains first, to the left of and below their points, where a falling frontier
    leaves room. A label never covers a point, the frontier, another label or its line; without room it is left out."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()

    def place(experiment: Experiment) -> tuple[float, float]:
        """Its point, as shares of the axes."""
        return (experiment.id - left) / (right - left), (experiment.val_bpb - low) / (high - low)

    taken = [Box(x, x, y, y) for x, y in map(place, measured)]
    for (x, y), (later, lower) in pairwise(map(place, kept)):
        taken += [Box(x, later, y, y), Box(later, later, lower, y)]
    axes.figure.draw_without_rendering()  # sets the position of the axes
    style = {"fontsize": 8, "parse_math": False}  # a dollar sign in a hypothesis is literal
    for experiment in sorted(kept[1:], key=lambda e: e.delta or 0)[:NAMES]:
        name = short(experiment.title, 44)
        sample = axes.text(0, 0, name, **style)
        size = sample.get_window_extent()
        sample.remove()
        wide, tall = size.width / axes.bbox.width, size.height / axes.bbox.height
        x, y = place(experiment)
        start, obstacles = max(0.01, x - wide), np.array(taken)
        for foot in np.arange(y - 1.8 * tall, 0, -tall / 4):
            box, leader = Box(start, start + wide, foot, foot + tall), Box(x, x, foot + tall, y - tall / 2)
            if box.is_free(obstacles) and leader.is_free(obstacles):
                break
        else:
            continue
        taken += [box, leader]
        line = {"arrowstyle": "-", "linewidth": 0.5, "color": "grey", "shrinkA": 0, "relpos": ((x - start) / wide, 1)}
        point = (experiment.id, experiment.val_bpb)
        axes.annotate(name, point, (start, foot), textcoords="axes fraction", arrowprops=line, va="bottom", **style)


def short(text: str, limit: int) -> str:
    """`text`, cut to `limit` characters with an ellipsis if it is longer."""
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"


def count(number: int, noun: str) -> str:
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"
