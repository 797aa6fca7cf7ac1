"""Old import path, kept for one release with a DeprecationWarning: now ``slimkernels.trainer.objective``.

The ``training_args.bin`` of earlier checkpoints names this module.
"""

from slimkernels._moved import moved

__getattr__ = moved(
    __name__,
    dict.fromkeys(
        ("METHODS", "SlimConfig", "SlimObjective", "check_training_arguments"), "slimkernels.trainer.objective"
    ),
)
