"""What moves in a notebook: the policy explorer. Needs ipywidgets and matplotlib; nothing outside this folder does."""

from workbench.widgets.explorer import Explorer, explorer
from workbench.widgets.share import LimitedTraining

__all__ = ["Explorer", "LimitedTraining", "explorer"]
