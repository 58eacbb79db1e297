"""One function per figure: a frame in, matplotlib Axes out.

Units stand on the axes, times in milliseconds or seconds as named. A policy keeps its colour, hatch, marker and line style in every
figure; lightness differs too, so that a grey print can be read. `caption` says n, seeds, executor and device.
"""

from workbench.plots.causes import CAUSE_STYLES, attribution
from workbench.plots.fits import predicted_vs_measured, roofline, trace_fit
from workbench.plots.policies import attainment, by_load, overview, throughput
from workbench.plots.style import COLOURS, NotebookFigure, Style, styles
from workbench.plots.times import distribution, loss, step_timeline, timeline

__all__ = [
    "CAUSE_STYLES",
    "COLOURS",
    "NotebookFigure",
    "Style",
    "attainment",
    "attribution",
    "by_load",
    "distribution",
    "loss",
    "overview",
    "predicted_vs_measured",
    "roofline",
    "step_timeline",
    "styles",
    "throughput",
    "timeline",
    "trace_fit",
]
