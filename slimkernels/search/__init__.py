"""Tree search over reasoning steps: ``PathFinder``, its engines, checks, scorers and presets.

``pathfinder.py`` is the algorithm, ``tree.py`` its data, ``engine.py`` the interface to a language model, ``engines/``
the implementations of it, ``trace.py`` the file from which a killed search resumes.
"""

import importlib
from typing import TYPE_CHECKING

from slimkernels.durable import DamagedLineError, FileInUseError, ForeignFileError
from slimkernels.search.checks import Check, CheckedBranch, CheckedStep, ContradictionCheck, RepetitionCheck
from slimkernels.search.config import PathFinderConfig
from slimkernels.search.engine import Engine, Step, StepRequest
from slimkernels.search.outcome import Result
from slimkernels.search.pathfinder import PathFinder
from slimkernels.search.plan import Plan
from slimkernels.search.presets import DEFAULT_CHAINS, best_of_n, greedy, self_consistency
from slimkernels.search.pruning import PruningScore, StepScorer
from slimkernels.search.question import Question, QuestionError
from slimkernels.search.selection import (
    Candidate,
    TrigramConsensus,
    consensus,
    log_probability,
    majority_vote,
    majority_vote_by,
    select,
    step_score,
)
from slimkernels.search.step_scores import StepScoreError
from slimkernels.search.trace import TraceDamagedError, TraceMismatchError, read_trace
from slimkernels.search.tree import Status, Tree

if TYPE_CHECKING:
    from slimkernels.search.engines.server import ServerEngine
    from slimkernels.search.engines.transformers import TransformersEngine
    from slimkernels.search.judges import NLIModel, SentenceEncoder, Verifier
    from slimkernels.search.reward_models import ProcessRewardModel, StepVerifier
    from slimkernels.search.served_judges import ServedStepVerifier
    from slimkernels.search.transformers_generate import custom_generate

# Loaded on first use, because they import transformers or an HTTP client.
_LAZY = {
    "NLIModel": "slimkernels.search.judges",
    "ProcessRewardModel": "slimkernels.search.reward_models",
    "SentenceEncoder": "slimkernels.search.judges",
    "ServedStepVerifier": "slimkernels.search.served_judges",
    "ServerEngine": "slimkernels.search.engines.server",
    "StepVerifier": "slimkernels.search.reward_models",
    "TransformersEngine": "slimkernels.search.engines.transformers",
    "Verifier": "slimkernels.search.judges",
    "custom_generate": "slimkernels.search.transformers_generate",
}

__all__ = [
    "DEFAULT_CHAINS",
    "Candidate",
    "Check",
    "CheckedBranch",
    "CheckedStep",
    "ContradictionCheck",
    "DamagedLineError",
    "Engine",
    "FileInUseError",
    "ForeignFileError",
    "NLIModel",
    "PathFinder",
    "PathFinderConfig",
    "Plan",
    "ProcessRewardModel",
    "PruningScore",
    "Question",
    "QuestionError",
    "RepetitionCheck",
    "Result",
    "SentenceEncoder",
    "ServedStepVerifier",
    "ServerEngine",
    "Status",
    "Step",
    "StepRequest",
    "StepScoreError",
    "StepScorer",
    "StepVerifier",
    "TraceDamagedError",
    "TraceMismatchError",
    "TransformersEngine",
    "Tree",
    "TrigramConsensus",
    "Verifier",
    "best_of_n",
    "consensus",
    "custom_generate",
    "greedy",
    "log_probability",
    "majority_vote",
    "majority_vote_by",
    "read_trace",
    "select",
    "self_consistency",
    "step_score",
]


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module 'slimkernels.search' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
