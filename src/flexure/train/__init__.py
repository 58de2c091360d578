"""Training: the one loop, `fit`, its schedules, and where it saves its state."""

from flexure.train.checkpoint import Checkpoint
from flexure.train.fit import History, fit
from flexure.train.schedules import cosine, imagenette_schedule, lcnn_schedule, step_schedule

__all__ = [
    "Checkpoint",
    "History",
    "cosine",
    "fit",
    "imagenette_schedule",
    "lcnn_schedule",
    "step_schedule",
]
