"""The shipped policies: about 30 lines each, with their source in the docstring and their parameters as fields."""

from workbench.policies.fcfs import FCFS
from workbench.policies.loquetier import LoquetierScalable, LoquetierStatic
from workbench.policies.peft_sequential import PeftSequential
from workbench.policies.serve_first import ServeFirst

__all__ = ["FCFS", "LoquetierScalable", "LoquetierStatic", "PeftSequential", "ServeFirst"]
