"""The options of the search, which the commands that decode share: one name and one default for each."""

from __future__ import annotations

import argparse

from slimkernels.cli.options import FieldOptions, positive_int

# Prompt of a question that has no form of its own.
DEFAULT_TEMPLATE = (
    '{question}\n\nThink step by step, one step on each line. The last line is "Answer:" and the answer alone.'
)
# Field of a question's record that holds its answer.
DEFAULT_REFERENCE_FIELD = "answer"
PROMPT_STYLES = ("auto", "chat", "plain")
ANSWER_KINDS = ("any", "number", "yes_no", "letter")


def _numbers(text: str) -> int | tuple[int, ...]:
    try:
        numbers = tuple(map(int, text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, or several as in 8,4,1, got {text!r}") from None
    return numbers[0] if len(numbers) == 1 else numbers


# Options that are fields of PathFinderConfig.
SEARCH_FIELDS: FieldOptions = {
    "branching_factor": (
        "--branching-factor",
        {"type": _numbers, "metavar": "N[,N...]"},
        "children per open leaf; several numbers apply to depth 0, 1, ..., the last to all deeper ones (default: 3)",
    ),
    "branching_temperature": (
        "--branching-temperature",
        {"type": float, "metavar": "F"},
        "difference of scores that changes a leaf's share of the children of a depth by a factor of e (default: equal "
        "shares)",
    ),
    "beam": ("--beam", {"type": int, "metavar": "N"}, "open leaves kept at every depth (default: 3)"),
    "buffer_size": ("--buffer-size", {"type": int, "metavar": "N"}, "hypotheses kept at every depth (default: 128)"),
    "max_depth": ("--max-depth", {"type": int, "metavar": "N"}, "maximum number of steps in a branch (default: 12)"),
    "max_step_tokens": (
        "--max-step-tokens",
        {"type": int, "metavar": "N"},
        "maximum number of tokens in a step (default: 64)",
    ),
    "max_tokens": (
        "--max-tokens",
        {"type": int, "metavar": "N"},
        "maximum number of tokens generated per question, over all branches and attempts (default: no limit)",
    ),
    "stop_when_agreed": (
        "--stop-when-agreed",
        {"type": positive_int, "metavar": "N"},
        "stop a question's search where N finished branches give one answer, or no other answer can win any more "
        "(default: no early stop)",
    ),
    "time_limit_s": (
        "--time-limit",
        {"type": float, "metavar": "SECONDS"},
        "time limit for each batch of questions (default: no limit)",
    ),
    "step_delimiter": (
        "--step-delimiter",
        {"type": lambda text: text.replace("\\n", "\n").replace("\\t", "\t"), "metavar": "TEXT"},
        r"text that ends a step; \n and \t stand for a line break and a tab (default: \n)",
    ),
    "end_markers": (
        "--end-marker",
        {"action": "append", "metavar": "TEXT"},
        "text that finishes a branch; may be repeated",
    ),
    "answer_kind": (
        "--answer-kind",
        {"choices": ANSWER_KINDS},
        'kind of the answer that finishes a branch, as "The answer is 18" or "Answer: 18" do (default: any)',
    ),
    "answer_pattern": (
        "--answer-pattern",
        {"metavar": "REGEX"},
        "regular expression that finishes the branch it matches in; its first group is the answer "
        "(default: the rule of --answer-kind)",
    ),
    "temperature": (
        "--temperature",
        {"type": float, "metavar": "T"},
        "sampling temperature at depth 0; 0 takes the most probable token (default: 0.8)",
    ),
    "annealing": (
        "--annealing",
        {"type": float, "metavar": "F"},
        "factor of the temperature from one depth to the next (default: 0.9)",
    ),
    "top_k": (
        "--top-k",
        {"type": int, "metavar": "K"},
        "sample from the K most probable tokens; 0 is no limit (default: 0)",
    ),
    "top_p": (
        "--top-p",
        {"type": float, "metavar": "P"},
        "sample from the fewest tokens whose probabilities add up to P (default: 0.95)",
    ),
    "length_penalty": (
        "--length-penalty",
        {"type": float, "metavar": "F"},
        "exponent in the score, sum of log-probabilities / (number of tokens)^F (default: 1.0)",
    ),
    "score_weight": (
        "--score-weight",
        {"type": float, "metavar": "F"},
        "share of the scores of --score-steps in pruning, beside that of the log-probabilities; 1 is all (default: "
        "1.0)",
    ),
    "score_reduction": (
        "--score-reduction",
        {"choices": ("last", "min", "mean", "product")},
        "combination of the scores of a branch's steps into one (default: last)",
    ),
    "merge_siblings": (
        "--merge-siblings",
        {"type": float, "metavar": "F"},
        "similarity from which children of one leaf are merged, and their votes added; 1 merges equal steps alone "
        "(default: no merging)",
    ),
    "max_attempts": (
        "--max-attempts",
        {"type": int, "metavar": "N"},
        "maximum number of generations of a step that fails its checks (default: 2)",
    ),
    "seed": ("--seed", {"type": int, "metavar": "N"}, "random seed for sampling (default: 0)"),
    "batch_questions": (
        "--batch-questions",
        {"type": int, "metavar": "N"},
        "questions searched at the same time; affects speed and memory, not results (default: 8)",
    ),
}


def add_chains_option(group: argparse._ActionsContainer, decoders: str) -> None:
    """Adds the number of chains that ``decoders`` draw."""
    text = f"answers drawn by {decoders} (default: 5)"
    group.add_argument("--chains", type=positive_int, metavar="N", help=text)
