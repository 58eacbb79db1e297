"""Loquetier Workbench: scheduling experiments on LLM runtimes that fine-tune some LoRA adapters while they serve others.

The public names. Those that need torch are imported when they are first used, so a policy study starts in a second.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# Now, not when first used: each function shares its name with its module, which would take the name once anything imports it.
from workbench.replay import ReplayError, replay
from workbench.serve import serve

_NAMES = {
    "traces": "workbench.traces:",
    "policies": "workbench.policies:",
    "routers": "workbench.fleet.routers:",
    "metrics": "workbench.results.metrics:",
    "lengths": "workbench.lengths:",
    "attribution": "workbench.results.attribution:",
    "plots": "workbench.plots:",
    "widgets": "workbench.widgets:",
    "Trace": "workbench.traces:Trace",
    "uniform": "workbench.traces.popularity:uniform",
    "zipf": "workbench.traces.popularity:zipf",
    "geometric": "workbench.traces.popularity:geometric",
    "s_lora_power": "workbench.traces.popularity:s_lora_power",
    "round_robin": "workbench.traces.popularity:round_robin",
    "per_phase": "workbench.traces.popularity:per_phase",
    "clients": "workbench.traces.popularity:clients",
    "Request": "workbench.core:Request",
    "Sampling": "workbench.core:Sampling",
    "Batch": "workbench.core:Batch",
    "Segment": "workbench.core:Segment",
    "StepResult": "workbench.core:StepResult",
    "SLO": "workbench.config:SLO",
    "EngineConfig": "workbench.config:EngineConfig",
    "FinetuneJob": "workbench.config:FinetuneJob",
    "RandomTokens": "workbench.config:RandomTokens",
    "View": "workbench.policy:View",
    "Plan": "workbench.policy:Plan",
    "PlanError": "workbench.policy:PlanError",
    "Router": "workbench.policy:Router",
    "Evict": "workbench.policy:Evict",
    "AdapterSpec": "workbench.loop.tiers:AdapterSpec",
    "tiers": "workbench.loop.tiers:",
    "check_policy": "workbench.check:check_policy",
    "Replay": "workbench.results.replay:Replay",
    "load_replay": "workbench.results.replay:load_replay",
    "import_replay": "workbench.results.imports:import_replay",
    "replay_server": "workbench.server.replay:replay_server",
    "ServerReplay": "workbench.server.result:ServerReplay",
    "Server": "workbench.serve:Server",
    "Recorded": "workbench.recorded:Recorded",
    "LatencyModel": "workbench.latency:LatencyModel",
    "Stalls": "workbench.latency:Stalls",
    "Fleet": "workbench.fleet:Fleet",
    "StaticSplit": "workbench.fleet.routers:StaticSplit",
    "UpperBound": "workbench.results.bound:UpperBound",
    "upper_bound": "workbench.results.bound:upper_bound",
    "replay_errors": "workbench.latency.whole_replays:replay_errors",
    "sweep": "workbench.experiments.sweep:sweep",
    "Sweep": "workbench.experiments.sweep:Sweep",
    "search": "workbench.experiments.search:search",
    "Capacity": "workbench.experiments.search:Capacity",
    "compare": "workbench.experiments.compare:compare",
    "Difference": "workbench.experiments.statistics:Difference",
    "Comparison": "workbench.experiments.compare:Comparison",
    "Engine": "workbench.runtime.engine:Engine",
    "OutOfMemory": "workbench.runtime.engine:OutOfMemory",
    "PeftBaseline": "workbench.runtime.peft_baseline:PeftBaseline",
    "VirtualModule": "workbench.runtime.virtual:VirtualModule",
}

if TYPE_CHECKING:
    from workbench import lengths, plots, policies, traces, widgets
    from workbench.check import check_policy
    from workbench.config import SLO, EngineConfig, FinetuneJob, RandomTokens
    from workbench.core import Batch, Request, Sampling, Segment, StepResult
    from workbench.experiments.compare import Comparison, compare
    from workbench.experiments.search import Capacity, search
    from workbench.experiments.statistics import Difference
    from workbench.experiments.sweep import Sweep, sweep
    from workbench.fleet import Fleet, routers
    from workbench.fleet.routers import StaticSplit
    from workbench.latency import LatencyModel, Stalls
    from workbench.latency.whole_replays import replay_errors
    from workbench.loop import tiers
    from workbench.loop.tiers import AdapterSpec
    from workbench.policy import Evict, Plan, PlanError, Router, View
    from workbench.recorded import Recorded
    from workbench.results import attribution, metrics
    from workbench.results.bound import UpperBound, upper_bound
    from workbench.results.imports import import_replay
    from workbench.results.replay import Replay, load_replay
    from workbench.runtime.engine import Engine, OutOfMemory
    from workbench.runtime.peft_baseline import PeftBaseline
    from workbench.runtime.virtual import VirtualModule
    from workbench.serve import Server
    from workbench.server.replay import replay_server
    from workbench.server.result import ServerReplay
    from workbench.traces.popularity import clients, geometric, per_phase, round_robin, s_lora_power, uniform, zipf
    from workbench.traces.trace import Trace


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        from workbench.config import did_you_mean

        raise AttributeError(f"workbench has no {name!r}. {did_you_mean(name, list(_NAMES))}")
    module, _, attribute = _NAMES[name].partition(":")
    found = import_module(module)
    value = getattr(found, attribute) if attribute else found
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_NAMES])
