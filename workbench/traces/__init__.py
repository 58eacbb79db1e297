"""Request traces: the shipped ones by name, files in the formats that others publish, and synthesis.

`traces.load(name_or_path)`, `traces.names()`; `traces.poisson(...)` and its siblings; popularity rules for `assign_adapters`;
`traces.validate(path)`, `traces.fit(trace)`; fine-tune jobs by `traces.jobs_poisson(...)`.
"""

from workbench.traces.catalogue import describe, job_arrivals, job_runtimes, lengths, load, names
from workbench.traces.check import TraceReport, validate
from workbench.traces.fitting import LogNormal, TraceGenerator, fit
from workbench.traces.popularity import Popularity, clients, geometric, per_phase, round_robin, s_lora_power, uniform, zipf
from workbench.traces.synthesis import E6_PHASES, constant, gamma, jobs_at, jobs_poisson, piecewise, poisson, servegen, servegen_arrivals
from workbench.traces.trace import Trace

__all__ = [
    "E6_PHASES",
    "LogNormal",
    "Popularity",
    "Trace",
    "TraceGenerator",
    "TraceReport",
    "clients",
    "constant",
    "describe",
    "fit",
    "gamma",
    "geometric",
    "job_arrivals",
    "job_runtimes",
    "jobs_at",
    "jobs_poisson",
    "lengths",
    "load",
    "names",
    "per_phase",
    "piecewise",
    "poisson",
    "round_robin",
    "s_lora_power",
    "servegen",
    "servegen_arrivals",
    "uniform",
    "validate",
    "zipf",
]
