"""``PathFinderConfig``: the settings of a search."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

from slimkernels import _checks
from slimkernels.search.answers import ANSWER_KINDS, AnswerKind, extract, finishes
from slimkernels.search.checks import Embed
from slimkernels.search.engine import StepEnd
from slimkernels.search.pruning import REDUCTIONS, PruningScore, Reduction, StepScorer


@dataclasses.dataclass(frozen=True)
class PathFinderConfig:
    r"""The settings of a search: how a tree of reasoning steps grows, and when it stops.

    Attributes:
        branching_factor: Children of every open leaf; or one number per depth, the last of which applies to all deeper
            ones.
        branching_temperature: Temperature at which the children of a depth are shared out among a question's leaves by
            their pruning scores (``share_children``): leaves with close scores get as many, one that leads gets more,
            all together as many as without it. None gives each leaf ``branching_factor`` children.
        beam: Open leaves to keep for each question after every depth, those with the best scores.
        buffer_size: Hypotheses to keep for each question after every depth, finished ones included, those with the best
            scores.
        max_depth: Largest number of steps of a branch.
        max_step_tokens: Largest number of tokens of a step; a step that reaches it ends there.
        max_tokens: Largest number of tokens generated for a question, those of cut and pruned children included. A step
            is started only if a whole one still fits. None: no limit.
        stop_when_agreed: Number of finished branches with one answer (of one value: 18 and $18.00 are) at which the
            search of a question stops, at the end of a depth; it also stops where no other answer can get as many
            votes any more. The result's ``notes`` say what the rest could still have changed, and its
            ``saved_tokens`` how many tokens that is at most. None: no early stop.
        time_limit_s: Time limit for each batch of questions in seconds, tested before every generation. None: no limit.
        step_delimiter: Text that ends a step, once the step has anything but white space.
        end_markers: Texts that end a step and finish its branch.
        answer_kind: Kind of the answers, "any", "number", "yes_no" or "letter": a branch finishes with the line that
            announces such an answer ("The answer is 18", "Answer: 18", "#### 18", "\\boxed{18}"), by the rule by
            which ``slimkernels.evaluate.extract`` reads the result's ``answer``. None finishes no branch.
        answer_pattern: Regular expression in place of ``answer_kind``: it finishes a branch with the step in which it
            matches. The last match, or its first group if there is one, becomes the result's ``answer``.
        temperature: T_0; at depth d tokens are drawn at T_0 * annealing^d. 0 takes the likeliest token.
        annealing: gamma, above 0; 1 keeps the temperature constant.
        top_k: Number of likeliest tokens to draw from; 0 for all.
        top_p: Probability of the smallest set of likeliest tokens to draw from, after ``top_k``.
        length_penalty: lambda in the score, sum of log-probabilities / (number of tokens)^lambda.
        score_steps: Function that scores new steps for pruning, called once for all branches of all questions at a
            depth, with the texts of each branch's steps and the questions' contexts, such as a ``ProcessRewardModel``,
            a ``StepVerifier`` or a ``ServedStepVerifier``. None prunes by log-probability.
        score_weight: Share of the step scores in the pruning score, in [0, 1], ``PruningScore``: 1 prunes by them
            alone.
        score_reduction: Combination of the scores of a branch's steps into one: "last" | "min" | "mean" | "product".
        merge_siblings: Similarity in [0, 1] from which children of one leaf are merged into the first of them, which
            then has all their weight in votes and selection, and gets children once: 1 merges steps of equal words,
            less also those whose embeddings are as similar and that have the same numbers. None merges none.
        merge_embed: Function from n texts to embeddings (n, d), such as a ``SentenceEncoder``, for a ``merge_siblings``
            below 1. None uses the engine's embeddings.
        max_attempts: Number of times to generate a child that fails its checks before it is cut.
        seed: Seed of all noise.
        batch_questions: Questions to search at the same time. Changes speed and memory, not results.
        step_end: Function that replaces ``step_delimiter``: called with the step's text after every token; True ends
            the step.

    Raises:
        ValueError: A value is outside its range.
    """

    branching_factor: int | Sequence[int] = 3
    branching_temperature: float | None = None
    beam: int = 3
    buffer_size: int = 128
    max_depth: int = 12
    max_step_tokens: int = 64
    max_tokens: int | None = None
    stop_when_agreed: int | None = None
    time_limit_s: float | None = None
    step_delimiter: str = "\n"
    end_markers: Sequence[str] = ()
    answer_kind: AnswerKind | None = "any"
    answer_pattern: str | None = None
    temperature: float = 0.8
    annealing: float = 0.9
    top_k: int = 0
    top_p: float = 0.95
    length_penalty: float = 1.0
    score_steps: StepScorer | None = None
    score_weight: float = 1.0
    score_reduction: Reduction = "last"
    merge_siblings: float | None = None
    merge_embed: Embed | None = None
    max_attempts: int = 2
    seed: int = 0
    batch_questions: int = 8
    step_end: StepEnd | None = None

    def __post_init__(self) -> None:
        if isinstance(self.branching_factor, int):
            factors: Sequence[Any] = (self.branching_factor,)
        else:
            factors = tuple(self.branching_factor)
        if not factors or not all(isinstance(factor, int) and factor >= 1 for factor in factors):
            raise ValueError(f"branching_factor must be at least 1 at every depth, got {self.branching_factor}")
        for name in ("beam", "buffer_size", "max_depth", "max_step_tokens", "max_attempts", "batch_questions"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        if not isinstance(self.max_tokens, int | None):
            raise ValueError(f"max_tokens must be an integer or None, got {self.max_tokens!r}")
        if self.max_tokens is not None and self.max_tokens < self.max_step_tokens:
            raise ValueError(
                f"max_tokens must be at least max_step_tokens = {self.max_step_tokens}, because only whole steps "
                f"are started, got {self.max_tokens}: lower max_step_tokens"
            )
        if self.stop_when_agreed is not None:
            if not isinstance(self.stop_when_agreed, int) or self.stop_when_agreed < 1:
                raise ValueError(
                    f"stop_when_agreed must be an integer of at least 1, or None, got {self.stop_when_agreed!r}"
                )
            if self.answer_kind is None and self.answer_pattern is None:
                raise ValueError(
                    "stop_when_agreed compares answers, so answer_kind or answer_pattern must say what an answer is, "
                    "got None for both"
                )
        if self.time_limit_s is not None and not self.time_limit_s > 0:
            raise ValueError(f"time_limit_s must be positive, got {self.time_limit_s}")
        if not self.step_delimiter:
            raise ValueError("step_delimiter must not be empty: give the text that ends a step, or step_end")
        if isinstance(self.end_markers, str) or not all(self.end_markers):
            raise ValueError(f"end_markers must be a sequence of texts that are not empty, got {self.end_markers!r}")
        _checks.as_temperature(self.temperature, or_zero=True)
        for name, low, high in (("top_p", 0, 1), ("length_penalty", 0, math.inf), ("score_weight", 0, 1)):
            value = getattr(self, name)
            if not (math.isfinite(value) and low <= value <= high):
                raise ValueError(f"{name} must be finite and in [{low}, {high}], got {value}")
        self._check_branching()
        self._check_step_scores()
        self._check_merging()
        if not (math.isfinite(self.annealing) and self.annealing > 0):
            raise ValueError(f"annealing must be finite and above 0, got {self.annealing}")
        if not isinstance(self.top_k, int) or self.top_k < 0:
            raise ValueError(f"top_k must be an integer of at least 0, got {self.top_k!r}")
        if self.answer_kind is not None and self.answer_kind not in ANSWER_KINDS:
            kinds = ", ".join(map(repr, ANSWER_KINDS))
            raise ValueError(f"answer_kind must be one of {kinds}, or None, got {self.answer_kind!r}")
        if self.answer_pattern is not None:
            try:
                re.compile(self.answer_pattern)
            except re.error as error:
                raise ValueError(f"answer_pattern must be a regular expression, got {self.answer_pattern!r}") from error

    def _check_branching(self) -> None:
        temperature = self.branching_temperature
        if temperature is None:
            return
        if not (isinstance(temperature, (int, float)) and math.isfinite(temperature) and temperature > 0):
            raise ValueError(f"branching_temperature must be finite and above 0, or None, got {temperature!r}")
        factors = [self.branching_at(depth) for depth in range(1, self.max_depth)]
        if self.beam == 1 or max(factors, default=1) == 1:
            raise ValueError(
                "branching_temperature has no meaning where no depth but the first has more than one child for each of "
                "several leaves: omit it, or give a beam, a max_depth and a branching_factor above 1"
            )

    def _check_step_scores(self) -> None:
        if self.score_steps is not None and not callable(self.score_steps):
            raise ValueError(
                "score_steps must be a function of the texts of branches and the contexts of their questions, or None, "
                f"got {self.score_steps!r}"
            )
        if self.score_reduction not in REDUCTIONS:
            raise ValueError(
                f"score_reduction must be one of {', '.join(map(repr, REDUCTIONS))}, got {self.score_reduction!r}"
            )
        for name, default in (("score_weight", 1.0), ("score_reduction", "last")):
            if self.score_steps is None and getattr(self, name) != default:
                raise ValueError(f"{name} has no meaning without score_steps, whose scores it is about: omit it")

    def _check_merging(self) -> None:
        similarity = self.merge_siblings
        if similarity is not None and not (isinstance(similarity, (int, float)) and 0 <= similarity <= 1):
            raise ValueError(f"merge_siblings must be in [0, 1], or None, got {similarity!r}")
        if self.merge_embed is not None and (similarity is None or similarity == 1):
            raise ValueError(
                "merge_embed has no meaning without a merge_siblings below 1, which compares embeddings: omit it"
            )

    @property
    def pruning_score(self) -> PruningScore:
        """Score of a branch by which leaves and hypotheses are kept."""
        weight = 0.0 if self.score_steps is None else self.score_weight
        return PruningScore(self.length_penalty, weight, self.score_reduction)

    def branching_at(self, depth: int) -> int:
        """Returns the number of children of a leaf at this depth; the root is at depth 0."""
        if isinstance(self.branching_factor, int):
            return self.branching_factor
        return self.branching_factor[min(depth, len(self.branching_factor) - 1)]

    def temperature_at(self, depth: int) -> float:
        """Returns T_0 * gamma^d, within the temperatures that the kernels can divide by; below them 0."""
        if self.temperature == 0:
            return 0.0
        log_temperature = math.log(self.temperature) + depth * math.log(self.annealing)
        if log_temperature < math.log(_checks.LOWEST_TEMPERATURE):
            return 0.0
        if log_temperature > math.log(_checks.HIGHEST_TEMPERATURE):
            return _checks.HIGHEST_TEMPERATURE
        return self.temperature * self.annealing**depth

    @property
    def stop(self) -> tuple[str, ...]:
        """Texts that may end a step."""
        return (*(() if self.step_end is not None else (self.step_delimiter,)), *self.end_markers)

    def is_step(self, text: str) -> bool:
        """Returns whether a step with this text is complete."""
        if any(marker in text for marker in self.end_markers):
            return True
        if self.step_end is not None:
            return self.step_end(text)
        return self.step_delimiter in text.lstrip()

    def is_final(self, text: str, before: str = "", choices: Sequence[str] = (), *, complete: bool = True) -> bool:
        """Returns whether a step finishes its branch.

        Args:
            text: Text of the step.
            before: Text of the branch before it, since an answer may be announced on one line and stand on the next.
            choices: Texts of the choices, if the answer is a letter.
            complete: Whether the step came to its end. The last line of one that a limit cut off announces nothing yet,
                as "The answer is 1" may become "The answer is 18".
        """
        if any(marker in text for marker in self.end_markers):
            return True
        if self.answer_pattern is not None:
            return re.search(self.answer_pattern, text) is not None
        if self.answer_kind is None:
            return False
        branch = before + text
        return finishes(branch if complete else branch[: branch.rfind("\n") + 1], self.answer_kind, choices)

    def answer(self, text: str, choices: Sequence[str] = ()) -> str | None:
        """Returns the answer of a branch; None without one.

        It is the last match of ``answer_pattern`` (None if its first group did not take part), or else the answer of
        ``answer_kind`` that ``extract`` finds, for which a letter may stand for one of the ``choices``.
        """
        if self.answer_pattern is None:
            return None if self.answer_kind is None else extract(text, self.answer_kind, choices).flexible
        found = None
        for found in re.finditer(self.answer_pattern, text):  # noqa: B007 -- the last match is used
            pass
        if found is None:
            return None
        text = found[1] if found.re.groups else found[0]
        return None if text is None else text.strip()
