from workbench.latency.model import LatencyModel

__all__ = ["LatencyModel"]
