"""``slimkernels-pathfinder``: PathFinder as a model of lm-eval.

Importing this module registers the model. ``python -m slimkernels.evaluate.lm_eval`` imports it and then runs lm-eval's
own command line.
"""

# lm-eval is an optional dependency. Without it, pyright takes this folder for the package lm_eval.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
from __future__ import annotations

import dataclasses
import functools
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from tqdm import tqdm

from slimkernels.search import (
    Engine,
    PathFinder,
    PathFinderConfig,
    Question,
    RepetitionCheck,
    Step,
    StepRequest,
    TransformersEngine,
    consensus,
    log_probability,
    majority_vote,
)
from slimkernels.search.engine import Prompt, StepEnd

SELECTORS = {"consensus": consensus(), "log_probability": log_probability, "majority_vote": majority_vote}
_SAMPLING = ("temperature", "top_k", "top_p")


@register_model("slimkernels-pathfinder")
class PathFinderLM(HFLM):
    """A causal language model of transformers that answers generative tasks by tree search.

    ``generate_until`` runs ``PathFinder`` over ``TransformersEngine``; likelihoods are computed by lm-eval's ``hf``. A
    branch ends at the first stop string of the task, at the end of text, or after ``max_gen_toks`` tokens; it is also
    limited by ``max_depth`` and ``max_step_tokens``. A task that asks for sampling (``do_sample``) sets temperature,
    top_k and top_p. Greedy decoding, which most tasks ask for by default, leaves the settings of the search unchanged.

    The tree of a prompt does not depend on the other requests. If a task repeats a prompt, the seed increases by one
    for each repetition. The search is seeded by ``seed``, not by lm-eval's ``--seed``.

    Args:
        pretrained: A folder, a name on the hub, or a model.
        selector: "consensus" | "log_probability" | "majority_vote" (which needs an ``answer_kind`` or
            ``answer_pattern``).
        repetition_check: Whether a step that repeats an earlier one is generated again, and cut if it still does.
        **options: Fields of ``PathFinderConfig`` by name, such as branching_factor, beam and seed; ``answer_kind`` is
            None by default, since tasks say themselves where an answer ends. All other options go to lm-eval's ``hf``,
            such as dtype and device.

    Raises:
        ValueError: ``selector`` is unknown, a setting of the search is outside its range, or, at the first generative
            task, the engine does not support the model.
    """

    def __init__(
        self, pretrained: Any, *, selector: str = "consensus", repetition_check: bool = True, **options: Any
    ) -> None:
        if selector not in SELECTORS:
            raise ValueError(f"selector must be one of {', '.join(map(repr, SELECTORS))}, got {selector!r}")
        fields = {field.name for field in dataclasses.fields(PathFinderConfig)} - {
            "step_end",
            "score_steps",
            "merge_embed",
        }
        settings: dict[str, Any] = {"answer_kind": None} | {name: options.pop(name) for name in fields & set(options)}
        self.config_of_search = PathFinderConfig(**settings)
        if selector == "majority_vote" and not (settings["answer_kind"] or self.config_of_search.answer_pattern):
            raise ValueError(
                "selector 'majority_vote' counts equal answers: give an answer_kind or answer_pattern that finds them"
            )
        self.selector = SELECTORS[selector]
        self.checks = (RepetitionCheck(),) if repetition_check else ()
        super().__init__(pretrained, **options)
        if self.backend != "causal":
            raise ValueError(
                f"pretrained must be a causal language model, got a {self.backend} one: use lm-eval's hf for it"
            )

    @functools.cached_property
    def engine(self) -> TransformersEngine:
        """The engine of the search, made for the first generative task."""
        return TransformersEngine(self.model, self.tokenizer)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Returns the text of each request's selected branch, up to the first stop string."""
        answers = [""] * len(requests)
        progress = tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Searching")
        with progress:
            for settings, repetition, indices in _groups(requests):
                for index, answer in self._search(settings, repetition, [requests[i].args[0] for i in indices]):
                    request = requests[indices[index]]
                    answers[indices[index]] = answer
                    self.cache_hook.add_partial("generate_until", request.args, answer)
                    progress.update()
        return answers

    def _search(self, settings: dict[str, Any], repetition: int, contexts: list[str]) -> Iterator[tuple[int, str]]:
        options = normalize_gen_kwargs(settings, self.max_gen_toks)
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        until = [stop for stop in handle_stop_sequences(options["until"], eos) if stop]
        config = self.config_of_search
        sampling = {name: options[name] for name in _SAMPLING if name in options} if options["do_sample"] else {}
        config = dataclasses.replace(config, **sampling, seed=config.seed + repetition)

        room = self.max_length - options["max_gen_toks"]
        if options["max_gen_toks"] < 1 or room < 1:
            raise ValueError(
                f"max_gen_toks must be at least 1 and leave room for a prompt in the model's {self.max_length} tokens, "
                f"got {options['max_gen_toks']}"
            )
        # Prompts that are too long are truncated at the beginning, as by lm-eval's own models.
        prompts = [self.tok_encode(context, left_truncate_len=room) for context in contexts]
        # A special token is not in the text, so the model's engine must stop at it.
        engine = LimitedEngine(self.engine.ending_at(until), until, options["max_gen_toks"])
        # An engine needs `identity` and `replay` only to resume from a trace, and this search writes none.
        finder = PathFinder(engine, config, checks=self.checks, selector=self.selector)  # pyright: ignore[reportArgumentType]
        # lm-eval's repetitions have seeds of their own, and its cache answers equal requests alike.
        questions = [Question(prompt, context, repeat=0) for prompt, context in zip(prompts, contexts, strict=True)]
        think_end = self.think_end_token if isinstance(self.think_end_token, str) else None
        for index, result in finder.solve_each(questions):
            yield index, postprocess_generated_text(result.text, until, think_end)


class LimitedEngine:
    """An engine whose branches end at stop strings, even across steps, and at a maximum number of tokens.

    The step that completes a stop string has the end "end_of_text". Its text is cut before the stop string, or after it
    if the stop string began in an earlier step. The step that reaches ``max_tokens`` has the end "context", as if the
    model's context were full.

    Args:
        engine: Engine that generates the steps.
        until: Stop strings, none of them empty.
        max_tokens: Maximum number of tokens of a branch, not counting its prompt, at least 1.
    """

    def __init__(self, engine: Engine, until: Sequence[str], max_tokens: int) -> None:
        self._engine, self._until, self._max_tokens = engine, tuple(until), max_tokens
        # A stop string that the next step completes begins at most this many characters before that step.
        self._tail_length = max((len(stop) for stop in until), default=1) - 1
        self._tails: dict[int, str] = {}
        self._num_tokens: dict[int, int] = {}
        self.check, self.count_tokens, self.cache_bytes = engine.check, engine.count_tokens, engine.cache_bytes

    def start(self, prompts: Sequence[Prompt]) -> list[int]:
        """Starts a branch for every prompt."""
        branches = self._engine.start(prompts)
        self._tails |= dict.fromkeys(branches, "")
        self._num_tokens |= dict.fromkeys(branches, 0)
        return branches

    def extend(self, requests: Sequence[StepRequest], step_end: StepEnd, *, embed: bool) -> list[Step]:
        """Generates a step for every request, within the limits."""
        limited = []
        for request in requests:
            left = self._max_tokens - self._num_tokens[request.branch]
            limited.append(dataclasses.replace(request, max_tokens=min(request.max_tokens, left)))
        steps = self._engine.extend(
            limited, lambda text: any(stop in text for stop in self._until) or step_end(text), embed=embed
        )
        return [self._ended(request.branch, step) for request, step in zip(requests, steps, strict=True)]

    def free(self, branch: int) -> None:
        """Frees a branch."""
        self._engine.free(branch)
        del self._tails[branch], self._num_tokens[branch]

    def _ended(self, parent: int, step: Step) -> Step:
        tail = self._tails[parent]
        tail = tail[: max(0, len(tail) - step.replaces)]
        text = tail + step.text
        self._tails[step.branch] = text[max(0, len(text) - self._tail_length) :]
        self._num_tokens[step.branch] = self._num_tokens[parent] + len(step.token_ids)
        stops = [(text.index(stop), text.index(stop) + len(stop)) for stop in self._until if stop in text]
        if stops:
            first, last = min(stops)
            # A stop string that began in an earlier step is kept complete, so that it is found in the whole text.
            text = text[len(tail) : first if first >= len(tail) else last]
            return dataclasses.replace(step, text=text, end="end_of_text")
        if self._num_tokens[step.branch] >= self._max_tokens and step.end != "end_of_text":
            return dataclasses.replace(step, end="context")
        return step


def _groups(requests: Sequence[Instance]) -> Iterator[tuple[dict[str, Any], int, list[int]]]:
    """Groups requests by their settings and by how often their prompt came before.

    Yields:
        The settings, the number of earlier requests with the same prompt, and the indices of the group's requests.
    """
    groups: dict[tuple[str, int], list[int]] = defaultdict(list)
    seen: Counter[tuple[str, str]] = Counter()
    for index, request in enumerate(requests):
        context, settings = request.args
        key = json.dumps(settings, sort_keys=True, default=str)
        groups[key, seen[context, key]].append(index)
        seen[context, key] += 1
    for (_, repetition), indices in groups.items():
        yield requests[indices[0]].args[1], repetition, indices
