"""Old import path, kept for one release with a DeprecationWarning: now ``slimkernels.trainer.teachers``."""

from slimkernels._moved import moved

__getattr__ = moved(__name__, dict.fromkeys(("OnlineTeacher", "StoredTeacher"), "slimkernels.trainer.teachers"))
