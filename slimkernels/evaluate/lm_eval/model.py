"""``slimkernels-pathfinder``: PathFinder as a model of lm-eval.

lm-eval knows a model once the module that registers it is imported: ``python -m slimkernels.evaluate.lm_eval`` imports
this one and goes on as lm-eval's own command line.
"""

# lm-eval is an extra; without it, pyright takes the lm_eval.py beside this file for it.
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

    ``generate_until`` is ``PathFinder`` over ``TransformersEngine``; likelihoods are those of lm-eval's ``hf``. A
    branch is finished at the first of the task's stop strings or the end of text, and has ``max_gen_toks`` tokens at
    most; ``max_depth`` and ``max_step_tokens`` limit it too. A task that asks for sampling (``do_sample``) sets
    temperature, top_k and top_p; the greedy decoding that most ask for is taken for what it is, a default.

    Equal prompts have equal trees, whatever else is asked; where a task repeats a prompt, the seed goes up by one each
    time. lm-eval's ``--seed`` does not change the search, ``seed`` does.

    Args:
        pretrained: A folder, a hub name, or a model.
        selector: "consensus" | "log_probability" | "majority_vote" (which needs an ``answer_pattern``).
        repetition_check: Whether steps that repeat an earlier one are generated again, then cut.
        options: Fields of ``PathFinderConfig`` by name, such as branching_factor, beam and seed; all others are those
            of lm-eval's ``hf``, such as dtype and device.

    Raises:
        ValueError: An unknown selector, a search setting outside its range, or, at the first generative task, a model
            that the engine does not reproduce.
    """

    def __init__(
        self, pretrained: Any, *, selector: str = "consensus", repetition_check: bool = True, **options: Any
    ) -> None:
        if selector not in SELECTORS:
            raise ValueError(f"selector must be one of {', '.join(map(repr, SELECTORS))}, got {selector!r}")
        fields = {field.name for field in dataclasses.fields(PathFinderConfig)} - {"step_end"}
        self.config_of_search = PathFinderConfig(**{name: options.pop(name) for name in fields & set(options)})
        if selector == "majority_vote" and self.config_of_search.answer_pattern is None:
            raise ValueError("selector 'majority_vote' counts equal answers: give an answer_pattern that finds them")
        self.selector = SELECTORS[selector]
        self.checks = (RepetitionCheck(),) if repetition_check else ()
        super().__init__(pretrained, **options)
        if self.backend != "causal":
            raise ValueError(f"pretrained must be a causal language model, got a {self.backend} one: use lm-eval's hf")

    @functools.cached_property
    def engine(self) -> TransformersEngine:
        """Made for the first generative task."""
        return TransformersEngine(self.model, self.tokenizer)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text of the selected branch of each request, before the first stop string."""
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
        # Prompts that are too long lose their beginning, as with lm-eval's own models.
        prompts = [self.tok_encode(context, left_truncate_len=room) for context in contexts]
        engine = LimitedEngine(self.engine, until, options["max_gen_toks"])
        # Without a trace, no search goes on from one, for which an engine has `identity` and `replay`.
        finder = PathFinder(engine, config, checks=self.checks, selector=self.selector)  # pyright: ignore[reportArgumentType]
        questions = [Question(prompt, context) for prompt, context in zip(prompts, contexts, strict=True)]
        think_end = self.think_end_token if isinstance(self.think_end_token, str) else None
        for index, result in finder.solve_each(questions):
            yield index, postprocess_generated_text(result.text, until, think_end)


class LimitedEngine:
    """An engine whose branches end at stop strings, also where one lies across two steps, and at a number of tokens.

    A step in which a stop string is completed ends the text, and its own text is cut before the stop string, or after
    it where it began in an earlier step. A branch of ``max_tokens`` cannot be continued: its last step ends as by the
    model's context.

    Args:
        engine: Does the work.
        until: The stop strings, none empty.
        max_tokens: Of a branch, without its prompt, at least 1.
    """

    def __init__(self, engine: Engine, until: Sequence[str], max_tokens: int) -> None:
        self._engine, self._until, self._max_tokens = engine, tuple(until), max_tokens
        # What could become a stop string with the next step: all but one character of the longest.
        self._tail_length = max((len(stop) for stop in until), default=1) - 1
        self._tails: dict[int, str] = {}
        self._num_tokens: dict[int, int] = {}
        self.check, self.count_tokens, self.cache_bytes = engine.check, engine.count_tokens, engine.cache_bytes

    def start(self, prompts: Sequence[Prompt]) -> list[int]:
        """As the engine."""
        branches = self._engine.start(prompts)
        self._tails |= dict.fromkeys(branches, "")
        self._num_tokens |= dict.fromkeys(branches, 0)
        return branches

    def extend(self, requests: Sequence[StepRequest], step_end: StepEnd, *, embed: bool) -> list[Step]:
        """As the engine, within the limits."""
        limited = []
        for request in requests:
            left = self._max_tokens - self._num_tokens[request.branch]
            limited.append(dataclasses.replace(request, max_tokens=min(request.max_tokens, left)))
        steps = self._engine.extend(
            limited, lambda text: any(stop in text for stop in self._until) or step_end(text), embed=embed
        )
        return [self._ended(request.branch, step) for request, step in zip(requests, steps, strict=True)]

    def free(self, branch: int) -> None:
        """As the engine."""
        self._engine.free(branch)
        del self._tails[branch], self._num_tokens[branch]

    def _ended(self, parent: int, step: Step) -> Step:
        tail = self._tails[parent]
        text = tail + step.text
        self._tails[step.branch] = text[max(0, len(text) - self._tail_length) :]
        self._num_tokens[step.branch] = self._num_tokens[parent] + len(step.token_ids)
        stops = [(text.index(stop), text.index(stop) + len(stop)) for stop in self._until if stop in text]
        if stops:
            first, last = min(stops)
            # A stop string that began in the step before is kept whole, to be found in the whole text.
            text = text[len(tail) : first if first >= len(tail) else last]
            return dataclasses.replace(step, text=text, end="end_of_text")
        if self._num_tokens[step.branch] >= self._max_tokens and step.end != "end_of_text":
            return dataclasses.replace(step, end="context")
        return step


def _groups(requests: Sequence[Instance]) -> Iterator[tuple[dict[str, Any], int, list[int]]]:
    """Requests of equal settings by how often their prompt came before: the settings, that number, their indices."""
    groups: dict[tuple[str, int], list[int]] = defaultdict(list)
    seen: Counter[tuple[str, str]] = Counter()
    for index, request in enumerate(requests):
        context, settings = request.args
        key = json.dumps(settings, sort_keys=True, default=str)
        groups[key, seen[context, key]].append(index)
        seen[context, key] += 1
    for (_, repetition), indices in groups.items():
        yield requests[indices[0]].args[1], repetition, indices
