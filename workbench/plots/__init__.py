"""One function per figure: a frame in, matplotlib Axes out.

Units stand on the axes, times in milliseconds or seconds as named. A policy keeps its colour, hatch, marker and line style in every
figure; lightness differs too, so that a grey print can be read. `caption` says n, seeds, executor and device.
"""

from workbench.plots.causes import CAUSE_STYLES, attribution
from workbench.plots.fits import costs, predicted_vs_measured, roofline, trace_fit
from workbench.plots.policies import attainment, by_load, capacity, differences, overview, throughput, tradeoff
from workbench.plots.replicas import by_replica
from workbench.plots.style import COLOURS, NotebookFigure, Style, styles
from workbench.plots.times import distribution, loss, request_timeline, step_timeline, timeline

__all__ = [
    "CAUSE_STYLES",
    "COLOURS",
    "NotebookFigure",
    "Style",
    "attainment",
    "attribution",
    "by_load",
    "by_replica",
    "capacity",
    "costs",
    "differences",
    "distribution",
    "loss",
    "overview",
    "predicted_vs_measured",
    "request_timeline",
    "roofline",
    "step_timeline",
    "styles",
    "throughput",
    "timeline",
    "trace_fit",
    "tradeoff",
]
