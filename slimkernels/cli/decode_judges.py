"""Judges of the steps and the answers of ``slimkernels decode``: checks, a scorer of steps, and the selector."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from slimkernels.cli.options import Parser, refuse

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from slimkernels.search import Scorer, StepScorer

_SELECTORS = ("consensus", "majority-vote", "log-probability", "step-score", "verifier")
_CHECK_OPTIONS = ("repetition_threshold", "no_repetition_check", "nli", "contradiction_threshold")


def add_judge_arguments(parser: Parser) -> None:
    """Adds the options that say which models and rules judge steps and answers."""
    add = parser.add_argument_group("checks and scores of steps, and selection of the answer").add_argument
    add(
        "--repetition-threshold",
        type=float,
        metavar="F",
        help="similarity from which a step repeats an earlier one (default: 0.98)",
    )
    add("--no-repetition-check", action="store_true", help="accept steps that repeat earlier ones")
    add("--nli", metavar="MODEL", help="entailment model, which turns the contradiction check on")
    add(
        "--contradiction-threshold",
        type=float,
        metavar="F",
        help="probability from which two steps contradict each other (default: 0.5)",
    )
    add(
        "--score-steps",
        metavar="MODEL",
        help="model that scores steps for pruning: a process-reward model for token classification, a language model "
        "that is asked yes or no, or a server as http://HOST:PORT/v1#MODEL (default: log-probabilities alone)",
    )
    add(
        "--selector",
        choices=_SELECTORS,
        help="rule that chooses the answer (default: consensus; majority-vote with self-consistency, log-probability "
        "with best-of-n)",
    )
    add("--verifier", metavar="MODEL", help="model that judges with --selector verifier (default: the model itself)")


def check_judge_options(args: argparse.Namespace) -> None:
    """Refuses options of judges that contradict each other or the decoder.

    Raises:
        ValueError: Some do; the message names one of them.
    """
    if args.decoder != "pathfinder":
        refuse(args, (*_CHECK_OPTIONS, "score_weight"), f"with --decoder {args.decoder}")
        if args.selector != "step-score":
            refuse(args, ["score_steps"], f"with --decoder {args.decoder}, which does not prune")
    if args.decoder == "greedy":
        refuse(args, ["selector"], "with --decoder greedy")
    if args.selector != "verifier":
        refuse(args, ["verifier"], "without --selector verifier")
    if args.no_repetition_check:
        refuse(args, ["repetition_threshold"], "with --no-repetition-check")
    if args.score_steps is None:
        refuse(args, ["score_weight", "score_reduction"], "without --score-steps MODEL")
        if args.selector == "step-score":
            raise ValueError("--selector step-score needs --score-steps MODEL, which scores the steps")
    if args.contradiction_threshold is not None and args.nli is None:
        raise ValueError("--contradiction-threshold needs --nli MODEL, which turns the check on")
    for name in ("repetition_threshold", "contradiction_threshold"):
        value = getattr(args, name)
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"--{name.replace('_', '-')} must be in [0, 1], got {value}")
    _check_score_steps(args.score_steps)


def _check_score_steps(name: str | None) -> None:
    from slimkernels.evaluate.served import is_server

    if name is not None and is_server(name) and not name.partition("#")[2]:
        raise ValueError(
            f"--score-steps must name a model of the server, as {name.partition('#')[0]}#MODEL, got {name!r}"
        )


def make_checks(args: argparse.Namespace) -> list[Any]:
    """Returns the checks of new steps."""
    from slimkernels import search

    checks: list[Any] = []
    if not args.no_repetition_check:
        threshold = args.repetition_threshold
        checks.append(search.RepetitionCheck() if threshold is None else search.RepetitionCheck(threshold))
    if args.nli is not None:
        threshold = 0.5 if args.contradiction_threshold is None else args.contradiction_threshold
        checks.append(search.ContradictionCheck(search.NLIModel.from_pretrained(args.nli), threshold))
    return checks


def not_loaded(texts: Any, context: Any) -> list[float]:
    """Stands for the scorer of --score-steps while the other settings are checked."""
    raise NotImplementedError


def make_step_scorer(
    args: argparse.Namespace, model: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase | None
) -> StepScorer | None:
    """Returns the scorer of --score-steps, which may be the searching model itself; None without one."""
    from slimkernels import search
    from slimkernels.evaluate.served import is_server

    name = args.score_steps
    if name is None:
        return None
    if is_server(name):
        url, _, served = name.partition("#")
        return search.ServedStepVerifier(url, served, key_env=args.key_env)
    if name == args.model and model is not None and tokenizer is not None:
        return search.StepVerifier(model, tokenizer)
    if _classifies_tokens(name):
        scorer = search.ProcessRewardModel.from_pretrained(name)
        scorer.model.to(device_of(args))
        return scorer
    from slimkernels import teacher

    return search.StepVerifier(*teacher.load_teacher(name, device=device_of(args)))


def _classifies_tokens(name: str) -> bool:
    """Returns whether the configuration of a model says that it classifies tokens.

    Raises:
        ValueError: The model is a reward model of a class that transformers does not have.
    """
    from transformers import AutoConfig

    from slimkernels.teacher import EMBEDDED_TEACHERS

    if name in EMBEDDED_TEACHERS or name.endswith(".gguf"):
        return False
    architectures: Sequence[str] = AutoConfig.from_pretrained(name).architectures or ()
    for architecture in architectures:
        if architecture.endswith("RewardModel"):
            raise ValueError(
                f"--score-steps {name} is a {architecture}, whose code comes with its weights and is not run by a "
                "command: load it with ProcessRewardModel.from_pretrained(..., load={'trust_remote_code': True})"
            )
    return any(architecture.endswith("ForTokenClassification") for architecture in architectures)


def make_selector(
    args: argparse.Namespace, model: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase | None
) -> Scorer | None:
    """Returns the scorer of --selector; None for the decoder's own."""
    from slimkernels import search

    if args.selector is None:
        return None
    if args.selector != "verifier":
        scorers: dict[str, Scorer] = {
            "consensus": search.consensus(),
            "majority-vote": search.majority_vote,
            "log-probability": search.log_probability,
            "step-score": search.step_score,
        }
        return scorers[args.selector]
    if args.verifier is None:
        return search.Verifier(*cast(Any, (model, tokenizer)))  # with a server, decode has refused this
    from slimkernels import teacher

    return search.Verifier(*teacher.load_teacher(args.verifier, device=device_of(args)))


def device_of(args: argparse.Namespace) -> torch.device | None:
    """Returns the device of --device.

    Raises:
        ValueError: It is none of torch's.
    """
    import torch

    try:
        return None if args.device is None else torch.device(args.device)
    except RuntimeError as error:
        raise ValueError(f"--device must be a device of torch such as cpu or cuda:0, got {args.device!r}") from error
