"""Old import path, kept for one release with a DeprecationWarning: the names are now in ``slimkernels.models``."""

from slimkernels._moved import moved

__getattr__ = moved(
    __name__,
    {
        "LanguageModelHead": "slimkernels.models.head",
        "LowRankAdapter": "slimkernels.models.head",
        "SlimCollator": "slimkernels.models.batch",
        "check_head": "slimkernels.models.head",
        "check_tokenizer": "slimkernels.models.fingerprints",
        "drop_layers": "slimkernels.models.make_student",
        "hidden_states": "slimkernels.models.hidden_states",
        "make_student": "slimkernels.models.make_student",
        "teacher_rows": "slimkernels.models.batch",
    },
)
