"""Trainers: ``SlimTrainer``, and ``SlimLossMixin`` for the trainer that you have."""

from slimkernels.models.batch import SlimCollator
from slimkernels.models.make_student import make_student
from slimkernels.trainer.checkpoint import last_complete_checkpoint
from slimkernels.trainer.mixin import SlimLossMixin
from slimkernels.trainer.objective import METHODS, SlimConfig, SlimObjective
from slimkernels.trainer.slim_trainer import SlimTrainer, train

__all__ = [
    "METHODS",
    "SlimCollator",
    "SlimConfig",
    "SlimLossMixin",
    "SlimObjective",
    "SlimTrainer",
    "last_complete_checkpoint",
    "make_student",
    "train",
]
