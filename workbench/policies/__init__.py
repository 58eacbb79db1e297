"""The shipped policies: about 30 lines each, with their source in the docstring and their parameters as fields.

`CATALOGUE` numbers them as `docs/policies.md` lists them.
"""

from workbench.policies.adapter_queues import AdapterCycling, Drain, FCFSSkip
from workbench.policies.alone import FinetuneOnly, InferenceOnly
from workbench.policies.chunked import ChunkedPrefill
from workbench.policies.clairvoyant import Clairvoyant
from workbench.policies.coserving import LatencyBudget, TemporalSharing, TokenCoserving
from workbench.policies.deadline import EDF, LeastSlack, SoftAdmission
from workbench.policies.eviction import LFU, LRU, CostAware
from workbench.policies.fair import FairCounters
from workbench.policies.fcfs import FCFS
from workbench.policies.loquetier import LoquetierScalable, LoquetierStatic
from workbench.policies.merging import CreditMerge
from workbench.policies.multilevel import MultiLevelQueue, WeightedEviction
from workbench.policies.peft_sequential import PeftSequential
from workbench.policies.rank_aware import RankAware
from workbench.policies.serve_first import ServeFirst
from workbench.policies.slo_slack import SLOSlack
from workbench.policies.slora import AffinityCluster, EarlyAbort, MemoryLookahead

CATALOGUE: dict[int, tuple[type, ...]] = {
    1: (MemoryLookahead,),
    2: (FCFSSkip,),
    3: (Drain,),
    4: (AdapterCycling,),
    5: (AffinityCluster,),
    6: (EarlyAbort,),
    7: (FairCounters,),
    8: (CreditMerge,),
    9: (MultiLevelQueue,),
    10: (RankAware,),
    11: (EDF, LeastSlack),
    12: (ChunkedPrefill, FCFS),
    13: (SoftAdmission,),
    14: (PeftSequential,),
    15: (LoquetierStatic,),
    16: (LoquetierScalable,),
    17: (TokenCoserving, ServeFirst),
    18: (TemporalSharing,),
    20: (LatencyBudget,),
    21: (SLOSlack,),
    22: (InferenceOnly, FinetuneOnly),
    23: (Clairvoyant,),
}
"""Number -> policies of one executor. 19, a static split of several replicas, is `workbench.fleet.routers.StaticSplit`."""

__all__ = [
    "CATALOGUE",
    "EDF",
    "FCFS",
    "LFU",
    "LRU",
    "AdapterCycling",
    "AffinityCluster",
    "ChunkedPrefill",
    "Clairvoyant",
    "CostAware",
    "CreditMerge",
    "Drain",
    "EarlyAbort",
    "FCFSSkip",
    "FairCounters",
    "FinetuneOnly",
    "InferenceOnly",
    "LatencyBudget",
    "LeastSlack",
    "LoquetierScalable",
    "LoquetierStatic",
    "MemoryLookahead",
    "MultiLevelQueue",
    "PeftSequential",
    "RankAware",
    "SLOSlack",
    "ServeFirst",
    "SoftAdmission",
    "TemporalSharing",
    "TokenCoserving",
    "WeightedEviction",
]
