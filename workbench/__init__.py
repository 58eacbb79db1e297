"""Loquetier Workbench: scheduling experiments on LLM runtimes that fine-tune some LoRA adapters while they serve others.

The public names. Those that need torch are imported when they are first used, so a policy study starts in a second.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# Now, not when first used: each function shares its name with its module, which would take the name once anything imports it.
from workbench.replay import ReplayError, replay
from workbench.search import Capacity, search
from workbench.serve import serve
from workbench.sweep import Sweep, sweep

_NAMES = {
    "traces": "workbench.traces:",
    "policies": "workbench.policies:",
    "routers": "workbench.routers:",
    "metrics": "workbench.metrics:",
    "lengths": "workbench.lengths:",
    "attribution": "workbench.attribution:",
    "plots": "workbench.plots:",
    "widgets": "workbench.widgets:",
    "Trace": "workbench.trace:Trace",
    "uniform": "workbench.popularity:uniform",
    "zipf": "workbench.popularity:zipf",
    "geometric": "workbench.popularity:geometric",
    "s_lora_power": "workbench.popularity:s_lora_power",
    "round_robin": "workbench.popularity:round_robin",
    "per_phase": "workbench.popularity:per_phase",
    "clients": "workbench.popularity:clients",
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
    "AdapterSpec": "workbench.tiers:AdapterSpec",
    "tiers": "workbench.tiers:",
    "check_policy": "workbench.check:check_policy",
    "Replay": "workbench.replay_result:Replay",
    "load_replay": "workbench.replay_result:load_replay",
    "import_replay": "workbench.imports:import_replay",
    "replay_server": "workbench.server_replay:replay_server",
    "ServerReplay": "workbench.server_result:ServerReplay",
    "Server": "workbench.serve:Server",
    "Recorded": "workbench.recorded:Recorded",
    "LatencyModel": "workbench.latency:LatencyModel",
    "Fleet": "workbench.fleet:Fleet",
    "StaticSplit": "workbench.routers:StaticSplit",
    "UpperBound": "workbench.bound:UpperBound",
    "upper_bound": "workbench.bound:upper_bound",
    "replay_errors": "workbench.prediction:replay_errors",
    "compare": "workbench.experiment:compare",
    "Difference": "workbench.statistics:Difference",
    "Comparison": "workbench.experiment:Comparison",
    "Engine": "workbench.runtime.engine:Engine",
    "OutOfMemory": "workbench.runtime.engine:OutOfMemory",
    "PeftBaseline": "workbench.runtime.peft_baseline:PeftBaseline",
    "VirtualModule": "workbench.runtime.virtual:VirtualModule",
}

if TYPE_CHECKING:
    from workbench import attribution, lengths, metrics, plots, policies, routers, tiers, traces, widgets
    from workbench.bound import UpperBound, upper_bound
    from workbench.check import check_policy
    from workbench.config import SLO, EngineConfig, FinetuneJob, RandomTokens
    from workbench.core import Batch, Request, Sampling, Segment, StepResult
    from workbench.experiment import Comparison, compare
    from workbench.fleet import Fleet
    from workbench.imports import import_replay
    from workbench.latency import LatencyModel
    from workbench.policy import Evict, Plan, PlanError, Router, View
    from workbench.popularity import clients, geometric, per_phase, round_robin, s_lora_power, uniform, zipf
    from workbench.prediction import replay_errors
    from workbench.recorded import Recorded
    from workbench.replay_result import Replay, load_replay
    from workbench.routers import StaticSplit
    from workbench.runtime.engine import Engine, OutOfMemory
    from workbench.runtime.peft_baseline import PeftBaseline
    from workbench.runtime.virtual import VirtualModule
    from workbench.serve import Server
    from workbench.server_replay import replay_server
    from workbench.server_result import ServerReplay
    from workbench.statistics import Difference
    from workbench.tiers import AdapterSpec
    from workbench.trace import Trace


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
