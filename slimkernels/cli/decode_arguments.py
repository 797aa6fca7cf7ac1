"""The arguments of `slimkernels decode` and `slimkernels tree`, and their help."""

from __future__ import annotations

import argparse
from typing import Any

DECODERS = ("pathfinder", "self-consistency", "best-of-n", "greedy")
SELECTORS = ("consensus", "majority-vote", "log-probability", "verifier")
DEFAULT_TEMPLATE = (
    '{question}\n\nThink step by step, one step on each line. The last line is "Answer:" and the answer alone.'
)
DECODE_EXAMPLES = """\
examples:
  slimkernels decode --model smollm2-135m-instruct "Anna has 3 bags of 4 apples. How many apples are that?"
  echo "Why is the sky blue?" | slimkernels decode --model ./my-model -
  every question of a file, by two decoders that may generate the same number of tokens:
    slimkernels decode --model ./my-model --questions test.jsonl --token-budget 4096 --out tree.jsonl
    slimkernels decode --model ./my-model --questions test.jsonl --token-budget 4096 --out chains.jsonl \\
        --decoder self-consistency --chains 16
  what that takes at most, without generating:
    slimkernels decode --model ./my-model --questions test.jsonl --plan
  a search that may be killed, and is looked at afterwards:
    slimkernels decode --model ./my-model --questions test.jsonl --trace trace.jsonl
    slimkernels tree trace.jsonl -o tree.html
The same command goes on after it was stopped: --out skips the questions that are answered in it, --trace also goes on
inside of a tree. A question is asked by --template, in which {question}, or any {field} of its record, is replaced: as
a user's message where the tokenizer has a chat template, else as the text to continue. The default is
    {question}

    Think step by step, one step on each line. The last line is "Answer:" and the answer alone.
"""
TREE_EXAMPLES = """\
examples:
  slimkernels tree trace.jsonl -o tree.html
  slimkernels tree trace.jsonl --question 3 -o third.html
The page needs neither network nor server. It shows every node with its text, its score and why it ended.
"""


def _numbers(text: str) -> int | tuple[int, ...]:
    try:
        numbers = tuple(map(int, text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, or several as in 8,4,1, got {text!r}") from None
    return numbers[0] if len(numbers) == 1 else numbers


# Options of `decode` that are fields of PathFinderConfig.
DECODE_FIELDS: dict[str, tuple[str, dict[str, Any], str]] = {
    "branching_factor": (
        "--branching-factor",
        {"type": _numbers, "metavar": "N[,N...]"},
        "children of a leaf; several numbers: at depth 0, 1, ..., the last holds on (default: 8)",
    ),
    "beam": ("--beam", {"type": int, "metavar": "N"}, "leaves that go on at every depth (default: 8)"),
    "buffer_size": ("--buffer-size", {"type": int, "metavar": "N"}, "hypotheses kept (default: 128)"),
    "max_depth": ("--max-depth", {"type": int, "metavar": "N"}, "steps of a branch at most (default: 12)"),
    "max_step_tokens": ("--max-step-tokens", {"type": int, "metavar": "N"}, "tokens of a step at most (default: 64)"),
    "max_tokens": (
        "--token-budget",
        {"type": int, "metavar": "N"},
        "tokens generated for a question at most, all branches and attempts together (default: no limit)",
    ),
    "time_limit_s": (
        "--time-limit",
        {"type": float, "metavar": "SECONDS"},
        "for each batch of questions (default: no limit)",
    ),
    "step_delimiter": (
        "--step-delimiter",
        {"type": lambda text: text.replace("\\n", "\n").replace("\\t", "\t"), "metavar": "TEXT"},
        r"ends a step; \n and \t are read as such (default: \n)",
    ),
    "end_markers": (
        "--end-marker",
        {"action": "append", "metavar": "TEXT"},
        "a branch is finished with the step that has it; may be repeated",
    ),
    "answer_kind": (
        "--answer-kind",
        {"choices": ("any", "number", "yes_no", "letter")},
        'what ends a branch when it is announced, as by "The answer is 18" or "Answer: 18" (default: any)',
    ),
    "answer_pattern": (
        "--answer-pattern",
        {"metavar": "REGEX"},
        "in its place: a branch is finished with the step it is found in; its first group is the answer "
        "(default: --answer-kind)",
    ),
    "temperature": ("--temperature", {"type": float, "metavar": "T"}, "at depth 0; 0: the likeliest (default: 0.8)"),
    "annealing": ("--annealing", {"type": float, "metavar": "F"}, "factor of it for every depth (default: 0.9)"),
    "top_k": ("--top-k", {"type": int, "metavar": "K"}, "draw among the K likeliest; 0: all (default: 0)"),
    "top_p": ("--top-p", {"type": float, "metavar": "P"}, "and among the fewest of this probability (default: 0.95)"),
    "length_penalty": (
        "--length-penalty",
        {"type": float, "metavar": "F"},
        "of the score, sum of log-probabilities / (number of tokens)^F (default: 1.0)",
    ),
    "max_attempts": ("--max-attempts", {"type": int, "metavar": "N"}, "of a step that fails its checks (default: 2)"),
    "seed": ("--seed", {"type": int, "metavar": "N"}, "of the draws (default: 0)"),
    "batch_questions": (
        "--batch-questions",
        {"type": int, "metavar": "N"},
        "searched at the same time; changes speed and memory, not results (default: 8)",
    ),
}


def add_decode(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `decode`."""
    add = parser.add_argument
    add("question", nargs="?", metavar="QUESTION", help="a text; -: all of the standard input is one question")
    add("--model", required=True, metavar="MODEL", help="folder, .gguf file, smollm2-135m-instruct, or a hub's name")
    add("--server", metavar="URL", help="OpenAI-compatible, as http://localhost:8000/v1; MODEL is its name there")
    add("--tokenizer", metavar="MODEL", help="whose chat template a server is asked in (default: none)")
    add("--gguf-file", metavar="NAME", help="the .gguf file inside the model's folder or repository")
    add("--revision", metavar="REV", help="of a model from the hub")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="(default: %(default)s)")
    add("--device", metavar="DEVICE", help="like cuda (default: the CPU)")
    add("--decoder", choices=DECODERS, default=DECODERS[0], help="(default: %(default)s)")
    add("--chains", type=int, metavar="N", help="of self-consistency and best-of-n (default: 8)")
    add("--plan", action="store_true", help="print the most tokens and bytes that it takes, and stop")
    add(
        "--out", metavar="FILE", help=".jsonl that gets every prediction, with all candidates; continued if it is there"
    )
    add("--trace", metavar="FILE", help=".jsonl that gets the trees as they grow; continued if it is there")
    questions = parser.add_argument_group("questions")
    add = questions.add_argument
    add("--questions", metavar="FILE", help=".jsonl, a record for each question; -: standard input")
    add("--question-field", default="question", metavar="NAME", help="of a record (default: %(default)s)")
    add("--reference-field", metavar="NAME", help="of a record, copied to --out as its reference")
    add("--limit", type=int, metavar="N", help="only the first N questions")
    template = questions.add_mutually_exclusive_group()
    template.add_argument("--template", default=DEFAULT_TEMPLATE, metavar="TEXT", help="how to ask; see below")
    template.add_argument("--template-file", metavar="FILE", help="the same, from a file")
    add("--no-chat", action="store_true", help="ask without the tokenizer's chat template")
    checks = parser.add_argument_group("checks and selection")
    add = checks.add_argument
    add("--repetition-threshold", type=float, metavar="F", help="of a step's likeness to earlier ones (default: 0.98)")
    add("--no-repetition-check", action="store_true", help="take steps that repeat earlier ones")
    add("--nli", metavar="MODEL", help="an NLI model, which turns the contradiction check on")
    add("--contradiction-threshold", type=float, metavar="F", help="of its probability (default: 0.5)")
    add(
        "--selector",
        choices=SELECTORS,
        help="of the answer (default: consensus; majority-vote with self-consistency, log-probability with best-of-n)",
    )
    add("--verifier", metavar="MODEL", help="of --selector verifier (default: the model itself)")
    search = parser.add_argument_group("search")
    for field, (flag, options, text) in DECODE_FIELDS.items():
        search.add_argument(flag, dest=field, help=text, **options)


def add_tree(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `tree`."""
    parser.add_argument("trace", metavar="TRACE", help="a file of decode --trace; it may still be growing")
    parser.add_argument("-o", "--out", metavar="FILE", help="the page (default: TRACE with the ending .html)")
    parser.add_argument("--question", type=int, metavar="N", help="only this one, counted from 1 (default: all)")
