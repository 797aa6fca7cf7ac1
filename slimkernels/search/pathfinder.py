"""``PathFinder``: tree search over reasoning steps. Methods are in call order, from ``solve`` down."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from slimkernels.search.checks import Check, RepetitionCheck
from slimkernels.search.config import PathFinderConfig
from slimkernels.search.engine import Engine, Prompt, Step, StepRequest
from slimkernels.search.merging import merge_new_siblings
from slimkernels.search.outcome import Result, select_result
from slimkernels.search.plan import Plan, plan
from slimkernels.search.question import (
    Child,
    Progress,
    Question,
    QuestionError,
    QuestionSearch,
    count_repeats,
)
from slimkernels.search.selection import Scorer, consensus, step_score
from slimkernels.search.step_scores import score_new_steps
from slimkernels.search.trace import Trace, header_of
from slimkernels.search.tree import Tree

# Called with a question's index and its tree, or its state, whenever a depth is complete.
OnDepth = Callable[[int, Tree], None]
OnProgress = Callable[[int, Progress], None]
# Called with the number of tokens drawn since the last call; negative where an estimate was too high.
OnTokens = Callable[[int], None]


class PathFinder:
    """A search that grows a tree of reasoning steps for every question, keeps the best branches, and selects one.

    At every depth each open leaf gets ``branching_factor`` children; those of all leaves and questions are generated in
    one batch. A child that has no text or fails a check is generated again, and cut after ``max_attempts``. With
    ``merge_siblings`` those that are alike become one, and with ``score_steps`` the others are scored in one call. The
    best ``beam`` open leaves and the best ``buffer_size`` hypotheses of each question are kept. At the end, or with
    ``stop_when_agreed`` where enough finished branches have one answer, the selector chooses among the hypotheses that
    are left.

    A node's noise is keyed by the configuration's seed, the prompt, the node's path and the attempt; it does not depend
    on other prompts, batches or pruned branches. A prompt that was asked before in the same call is drawn anew; its
    number among the equal ones is a part of its key (``Question.repeat``).

    Args:
        engine: Language model.
        config: Settings of the search; by default ``PathFinderConfig()``.
        checks: Checks of new steps, in the order in which they run; by default a ``RepetitionCheck``. Add a
            ``ContradictionCheck``, which needs an NLI model. ``()`` runs none.
        selector: Scorer of a question's candidates, a function from candidates to one number for each (``Scorer``); by
            default ``consensus()``.
        chat: Whether questions that are plain texts are asked in the chat template of the engine's model, if it has
            one. A ``Question`` is always read as it is.

    Raises:
        TypeError: A check or the selector does not follow its protocol; the message says what it lacks.
        ValueError: The selector is ``step_score``, and the configuration has no ``score_steps``.

    References: Golovneva et al. 2023, "PathFinder: Guided search over multi-step reasoning paths", arXiv 2312.05180.
    """

    def __init__(
        self,
        engine: Engine,
        config: PathFinderConfig | None = None,
        *,
        checks: Sequence[Check] | None = None,
        selector: Scorer | None = None,
        chat: bool = True,
    ) -> None:
        self.engine = engine
        self.config = config or PathFinderConfig()
        self.checks = (RepetitionCheck(),) if checks is None else tuple(checks)
        self.selector = consensus() if selector is None else selector
        self.chat = chat
        for check in self.checks:
            if not callable(check) or not isinstance(getattr(check, "name", None), str):
                raise TypeError(
                    f"checks must be functions of branches with a name, a string, as in slimkernels.search.Check, got "
                    f"{check!r}"
                )
        if not callable(self.selector):
            raise TypeError(
                "selector must be a function from candidates to scores, such as slimkernels.search.consensus(), got "
                f"{self.selector!r}"
            )

        if self.selector is step_score and self.config.score_steps is None:
            raise ValueError("selector step_score needs scores of steps: give the configuration score_steps")

    def plan(self, questions: Sequence[Prompt | Question]) -> Plan:
        """Returns upper bounds of the tokens and bytes that ``solve`` takes, without generating any tokens.

        Raises:
            ValueError: As in ``solve``.
        """
        checked = self._check_questions(questions)
        return plan(self.config, [self.engine.count_tokens(question.prompt) for question in checked], self.engine)

    async def solve_async(
        self,
        questions: Sequence[Prompt | Question],
        *,
        trace: str | os.PathLike[str] | None = None,
        on_depth: OnDepth | None = None,
    ) -> list[Result]:
        """Runs ``solve`` in a thread, so that the caller's event loop keeps running."""
        return await asyncio.to_thread(self.solve, questions, trace=trace, on_depth=on_depth)

    def solve(
        self,
        questions: Sequence[Prompt | Question],
        *,
        trace: str | os.PathLike[str] | None = None,
        on_depth: OnDepth | None = None,
    ) -> list[Result]:
        """Searches every question.

        Args:
            questions: Texts, token ids of prompts, or prompts with their contexts. A text is asked in the chat template
                of the model, if it has one and unless ``chat`` is False, and is else continued.
            trace: File to record the search in as it proceeds. If the file exists, the search resumes from it, with the
                same trees and results as without the interruption.
            on_depth: Function called with a question's index and its tree whenever a depth of it is complete.

        Returns:
            One result for each question in the same order, even for a question whose branches were all cut.

        Raises:
            ValueError: A question is empty, or the engine cannot take it. All questions are checked before the first is
                searched.
            FloatingPointError: The model returned NaN logits.
            StepScoreError: ``score_steps`` raised an error or returned something other than one finite number for each
                branch. The trace holds the depths before.
            TraceMismatchError: The trace is of another search: other questions, checks, model or configuration.
            TraceDamagedError, DamagedLineError, FileInUseError, ForeignFileError: As in ``Trace``.
        """
        return [result for _, result in self.solve_each(questions, trace=trace, on_depth=on_depth)]

    def solve_each(
        self,
        questions: Sequence[Prompt | Question],
        *,
        trace: str | os.PathLike[str] | None = None,
        on_depth: OnDepth | None = None,
        on_progress: OnProgress | None = None,
        on_tokens: OnTokens | None = None,
    ) -> Iterator[tuple[int, Result]]:
        """Yields the index and result of each question as soon as its batch of questions is complete.

        Args:
            questions: Questions in any form that ``solve`` takes.
            trace: File to record the search in, or to resume it from.
            on_depth: Function called with a question's index and its tree whenever a depth of it is complete.
            on_progress: Function called with a question's index and its state whenever a depth of it is complete.
            on_tokens: Function called with the number of tokens drawn since its last call: after every token of an
                engine in this process, and after every answer of a server.

        Raises:
            ValueError, FloatingPointError, StepScoreError, TraceMismatchError, ...: The same as in ``solve``.
        """
        checked = self._check_questions(questions)
        watchers = [] if on_progress is None else [on_progress]
        if on_depth is not None:
            watchers.append(lambda index, progress: on_depth(index, progress.tree))
        batch_size = self.config.batch_questions
        with contextlib.ExitStack() as stack:
            written, progress = None, lambda _: Progress()
            if trace is not None:
                header = header_of(self.engine, self.config, self.checks, checked)
                written = stack.enter_context(Trace(trace, header))
                progress = written.progress
            for first in range(0, len(checked), batch_size):
                searches = [
                    QuestionSearch(self.engine, self.config, index, question, progress(index))
                    for index, question in enumerate(checked[first : first + batch_size], first)
                ]
                yield from enumerate(self._search_batch(searches, written, watchers, on_tokens), first)

    def _check_questions(self, questions: Sequence[Prompt | Question]) -> list[Question]:
        """Returns all questions with their contexts.

        Raises:
            TypeError: A single question was given.
            ValueError: As in ``solve``.
        """
        if isinstance(questions, (str, Question)):
            raise TypeError(f"questions must be a sequence, got one {type(questions).__name__}: give [question]")
        return count_repeats([self._check_question(index, question) for index, question in enumerate(questions)])

    def _check_question(self, index: int, question: Prompt | Question) -> Question:
        if not isinstance(question, Question):
            question = self._ask(question)
        prompt, context, choices, repeat = question
        if not len(prompt) or (isinstance(prompt, str) and not prompt.strip()):
            raise QuestionError(index, "the prompt must have text in it, got an empty one")
        try:
            self.engine.check(prompt)
        except ValueError as error:
            raise QuestionError(index, str(error)) from error
        if context is None:
            context = prompt if isinstance(prompt, str) else ""
        return Question(prompt, context, tuple(choices), repeat)

    def _ask(self, question: Prompt) -> Question:
        """Returns a question in the chat template of the engine's model, if that has one; else it is continued."""
        chat_prompt = getattr(self.engine, "chat_prompt", None)
        if not self.chat or chat_prompt is None or not isinstance(question, str) or not question.strip():
            return Question(question)
        prompt = chat_prompt(question)
        return Question(question) if prompt is None else Question(prompt, question)

    def _search_batch(
        self,
        searches: Sequence[QuestionSearch],
        trace: Trace | None,
        watchers: Sequence[OnProgress],
        on_tokens: OnTokens | None,
    ) -> list[Result]:
        """Grows the trees of a batch of questions depth by depth, and selects their results."""
        config = self.config
        started = time.monotonic() - max(search.progress.seconds for search in searches)
        deadline = None if config.time_limit_s is None else started + config.time_limit_s
        limit = "depth"
        try:
            self._start([search for search in searches if search.is_open])
            for depth in range(config.max_depth):
                if not any(search.is_open for search in searches):
                    break
                if deadline is not None and time.monotonic() >= deadline:
                    limit = "budget"
                    break
                # In a resumed search some questions may have completed this depth before the interruption.
                growing = [search for search in searches if search.is_open and search.progress.depth == depth]
                self._expand(growing, depth, deadline, on_tokens)
                for search in growing:
                    search.prune()
                    search.progress.depth = depth + 1
                    search.stop_if_agreed()
                    search.progress.seconds = time.monotonic() - started
                    if trace is not None:
                        trace.write_depth(search)
                    for watcher in watchers:
                        watcher(search.index, search.progress)
            for search in searches:
                search.end(limit)
        finally:
            for search in searches:
                search.close()
        engine_notes = getattr(self.engine, "notes", ())
        results = [select_result(search, self.selector, self.checks, engine_notes) for search in searches]
        if trace is not None:
            for search, result in zip(searches, results, strict=True):
                trace.write_result(search, result)
        return results

    def _start(self, searches: Sequence[QuestionSearch]) -> None:
        """Gives every search the engine's branches for its open leaves: the prompt's, or those of a resumed tree."""
        if not searches:
            return
        branches = self.engine.start([search.question.prompt for search in searches])
        for search, branch in zip(searches, branches, strict=True):
            search.start(branch)
        self._replay(searches)

    def _replay(self, searches: Sequence[QuestionSearch]) -> None:
        """Lets the engine read the branches of open leaves again, one batch per depth."""
        waiting = [(search, node) for search in searches for node in search.nodes_to_replay()]
        for depth in sorted({int(search.tree.depth[node]) for search, node in waiting}):
            level = [(search, node) for search, node in waiting if search.tree.depth[node] == depth]
            steps = [
                Step(
                    branch=search.branch_of[int(search.tree.parent[node])],
                    token_ids=search.tree.step_token_ids(node),
                    text=search.tree.steps[node],
                    sum_logprob=0.0,
                    end="step",
                )
                for search, node in level
            ]
            for (search, node), step in zip(level, self.engine.replay(steps, embed=self._embeds), strict=True):
                search.receive_replayed(node, step)
        for search in searches:
            search.release_expanded()

    @property
    def _embeds(self) -> bool:
        similarity = self.config.merge_siblings
        merges = similarity is not None and similarity < 1 and self.config.merge_embed is None
        return merges or any(getattr(check, "needs_embeddings", False) for check in self.checks)

    def _expand(
        self, searches: Sequence[QuestionSearch], depth: int, deadline: float | None, on_tokens: OnTokens | None
    ) -> None:
        """Gives every open leaf its children: generates all in one batch, then those that fail in further batches."""
        children = [child for search in searches for child in search.new_children(self.config.branching_at(depth))]
        pending = children
        for attempt in range(self.config.max_attempts):
            if attempt > 0:
                late = deadline is not None and time.monotonic() >= deadline
                pending = [] if late else _affordable([child for child in children if child.failure])
                for child in pending:
                    child.discard()
            if not pending:
                break
            self._generate(pending, depth, on_tokens)
            self._check_steps(pending, depth)
        for child in children:
            child.search.add(child)
        if self.config.merge_siblings is not None:
            merge_new_siblings(searches, depth + 1, self.config.merge_siblings, self.config.merge_embed)
        if self.config.score_steps is not None:
            score_new_steps(self.config.score_steps, searches, depth + 1)

    def _generate(self, children: Sequence[Child], depth: int, on_tokens: OnTokens | None) -> None:
        """Generates the steps of children in one batch."""
        config = self.config
        requests = [
            StepRequest(
                branch=child.search.branch_of[child.parent],
                path=child.path,
                attempt=child.attempts,
                seed=child.search.seed_of(child.path, child.attempts),
                temperature=config.temperature_at(depth),
                top_k=config.top_k,
                top_p=config.top_p,
                max_tokens=config.max_step_tokens,
                stop=config.stop,
            )
            for child in children
        ]
        counted = 0

        def is_step(text: str) -> bool:
            # Engines ask about every token but those that end a step by themselves.
            nonlocal counted
            counted += 1
            if on_tokens is not None:
                on_tokens(1)
            return config.is_step(text)

        steps = self.engine.extend(requests, is_step, embed=self._embeds)
        for child, step in zip(children, steps, strict=True):
            child.receive(step)
        if on_tokens is not None:
            on_tokens(sum(len(step.token_ids) for step in steps) - counted)

    def _check_steps(self, children: Sequence[Child], depth: int) -> None:
        """Sets every child's ``failure`` to the first check that its step fails, or to the empty string."""
        for child in children:
            # A lone end of text finishes a branch that has steps; below the root it would be an empty answer.
            ends = depth > 0 and child.step.end == "end_of_text"
            # Tokens that show as no text at all, such as special ones or the first bytes of a character, may be
            # followed by some.
            hidden = not child.step.text and child.step.end != "end_of_text"
            child.failure = "" if child.has_text or ends or hidden else "empty"
        for check in self.checks:
            passing = [child for child in children if not child.failure and child.has_text]
            if not passing:
                return
            branches = [child.search.checked_branch(child) for child in passing]
            failed = list(check(branches))
            if len(failed) != len(branches):
                raise ValueError(
                    f"check {check.name!r} must return one value for each of {len(branches)} branches, got "
                    f"{len(failed)}"
                )
            for child, fails in zip(passing, failed, strict=True):
                child.failure = check.name if fails else ""


def _affordable(children: Sequence[Child]) -> list[Child]:
    """Returns the first children of each question, as many as its token budget has whole steps left."""
    taken: Counter[int] = Counter()
    affordable = []
    for child in children:
        steps = child.search.affordable_steps()
        if steps is None or taken[id(child.search)] < steps:
            taken[id(child.search)] += 1
            affordable.append(child)
    return affordable
