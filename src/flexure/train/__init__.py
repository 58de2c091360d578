"""Training: the one loop, `fit`, its schedules, and where it saves its state."""

from flexure.train.checkpoint import Checkpoint
from flexure.train.fit import History, fit
from flexure.train.sam import SAM
from flexure.train.schedules import cosine, imagenette_schedule, lcnn_schedule, step_schedule

__all__ = [
    "SAM",
    "Checkpoint",
    "History",
    "cosine",
    "fit",
    "imagenette_schedule",
    "lcnn_schedule",
    "step_schedule",
]
