"""How every figure looks: one style per policy, units and captions, figures that show themselves once."""

import io
from collections.abc import Sequence
from dataclasses import MISSING, fields, is_dataclass
from textwrap import fill
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from workbench import policies

# Okabe and Ito's colours, ordered so that neighbours differ in lightness.
COLOURS = ("#0072B2", "#E69F00", "#000000", "#56B4E9", "#D55E00", "#009E73", "#CC79A7", "#999999", "#F0E442")
HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo", "--", "**")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (7, 2)), (0, (2, 2)))
SLO_COLOUR = "#B00000"


class Style(NamedTuple):
    """How one policy is drawn."""

    colour: str
    hatch: str
    marker: str
    line: Any


class NotebookFigure(Figure):
    """A figure that shows itself once, as a PNG, where it is a cell's value; pyplot, which would show it again, knows nothing of it."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=100, bbox_inches="tight")
        return buffer.getvalue()


def styles(labels: Sequence[str]) -> dict[str, Style]:
    """A style per policy, by its place in the comparison."""
    size = len(COLOURS)
    return {v: Style(COLOURS[i % size], HATCHES[i % size], MARKERS[i % size], LINES[i % size]) for i, v in enumerate(labels)}


def new_axes(width: float = 6.0, height: float = 4.0) -> Axes:
    return NotebookFigure(figsize=(width, height), layout="constrained").subplots()


def log_ticks(*axes: Axis) -> None:
    """Ticks at 1, 2 and 5 of logarithmic axes, as plain numbers: the default's labels run into one another within a decade or two."""
    for axis in axes:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")


def brief(label: str, width: int) -> str:
    """A label for a legend, in lines of `width` letters: that of a shipped policy without the parameters that have their defaults."""
    name, _, rest = label.partition("(")
    made = getattr(policies, name, None)
    if is_dataclass(made) and rest.endswith(")") and "(" not in rest:
        usual = {f"{f.name}={f.default!r}" for f in fields(made) if f.default is not MISSING}
        given = [part for part in rest[:-1].split(", ") if part not in usual]
        label = f"{name}({', '.join(given)})" if given else name
    return fill(label, width)


def finish(ax: Axes, caption: str, legend: bool) -> Axes:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="#E5E5E5", linewidth=0.6)
    ax.set_axisbelow(True)
    if legend and ax.get_legend_handles_labels()[1]:
        # a label longer than the figure would squeeze the axes to nothing
        handles, labels = ax.get_legend_handles_labels()
        width = max(30, int(ax.figure.bbox.width / ax.figure.dpi * 10))
        ax.legend(handles, [brief(label, width) for label in labels], loc="lower left", bbox_to_anchor=(0, 1), frameon=False, fontsize=8)
    if caption:
        text = fill(caption, max(40, int(ax.figure.bbox.width / ax.figure.dpi * 17)))
        ax.annotate(text, (0, 0), (0, -40), "axes fraction", "offset points", va="top", fontsize=7, color="#444444", annotation_clip=False)
    return ax
