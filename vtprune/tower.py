"""The old import path of `vtprune.hf.tower` and the files beside it."""

from .hf.tower import TowerStages
from .hf.tower_plan import blocks_of_stage as places
from .hf.tower_run import TowerImage, TowerRun, right_padded

__all__ = ["TowerImage", "TowerRun", "TowerStages", "places", "right_padded"]
