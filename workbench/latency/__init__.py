from workbench.latency.model import LatencyModel
from workbench.latency.stalls import Stalls

__all__ = ["LatencyModel", "Stalls"]
