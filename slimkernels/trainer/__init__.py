"""Trainers: ``SlimTrainer`` learns from stores, and ``SlimLossMixin`` adds its loss to any ``transformers.Trainer``."""

from slimkernels.models.batch import SlimCollator
from slimkernels.models.make_student import drop_layers, make_student
from slimkernels.trainer.checkpoint import last_complete_checkpoint
from slimkernels.trainer.mixin import SlimLossMixin
from slimkernels.trainer.objective import METHODS, SlimConfig, SlimObjective
from slimkernels.trainer.run import train, trainer_of
from slimkernels.trainer.slim_trainer import SlimTrainer
from slimkernels.trainer.teacher_server import TeacherServer
from slimkernels.trainer.unscored_documents import UnscoredDocuments

__all__ = [
    "METHODS",
    "SlimCollator",
    "SlimConfig",
    "SlimLossMixin",
    "SlimObjective",
    "SlimTrainer",
    "TeacherServer",
    "UnscoredDocuments",
    "drop_layers",
    "last_complete_checkpoint",
    "make_student",
    "train",
    "trainer_of",
]
