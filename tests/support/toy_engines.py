"""Two engines without a model, one that plays a script and one that draws characters; ``find`` searches a script."""

from __future__ import annotations

import dataclasses
import hashlib

import torch

import slimkernels as sk
from slimkernels.search import PathFinder, PathFinderConfig, Status, Step, StepRequest, log_probability

END = "$"  # end of text in scripts


class ToyEngine:
    """An engine that keeps branches as texts, one token per character, and records the calls that it gets."""

    context_length = 1000

    def __init__(self) -> None:
        self.texts: dict[int, tuple[str, str]] = {}  # prompt and generated text of every branch not yet freed
        self.batches: list[list[StepRequest]] = []
        self.encoded: list[str] = []
        self.replayed: list[str] = []
        self.peak_tokens = 0  # largest number of distinct tokens of prompts and texts at any time
        self._next = 0

    def identity(self):
        return {"engine": type(self).__name__}

    def check(self, prompt: str) -> None:
        if len(prompt) >= self.context_length:
            raise ValueError(f"the prompt must be shorter than {self.context_length} tokens, got {len(prompt)}")

    def count_tokens(self, prompt: str) -> int:
        return len(prompt)

    def cache_bytes(self, prompt_tokens: int, generated_tokens: int) -> int:
        return prompt_tokens + generated_tokens

    def start(self, prompts):
        self.encoded += prompts
        return [self._open(prompt, "") for prompt in prompts]

    def extend(self, requests, step_end, *, embed):
        self.batches.append(list(requests))
        steps = []
        for request in requests:
            assert request.max_tokens >= 1
            prompt, above = self.texts[request.branch]
            text, logprob, end = self.draw(request, prompt, above, step_end)
            count = len(text) + (end == "end_of_text")
            assert 1 <= count <= request.max_tokens
            tokens = [ord(c) for c in text] + [ord(END)] * (end == "end_of_text")
            steps.append(Step(self._open(prompt, above + text), tokens, text, logprob, end, 0.0, self.embed(text)))
        return steps

    def replay(self, steps, *, embed):
        self.replayed += [step.text for step in steps]
        return [
            dataclasses.replace(
                step,
                branch=self._open(self.texts[step.branch][0], self.texts[step.branch][1] + step.text),
                embedding=self.embed(step.text),
            )
            for step in steps
        ]

    def embed(self, text):
        return None

    def free(self, branch: int) -> None:
        del self.texts[branch]

    def _tokens_kept(self) -> int:
        prefixes = {(prompt, text[:end]) for prompt, text in self.texts.values() for end in range(1, len(text) + 1)}
        return len(prefixes) + sum(len(prompt) for prompt in {prompt for prompt, _ in self.texts.values()})

    def _open(self, prompt: str, text: str) -> int:
        self._next += 1
        self.texts[self._next] = (prompt, text)
        self.peak_tokens = max(self.peak_tokens, self._tokens_kept())
        return self._next


class ScriptedEngine(ToyEngine):
    """An engine that plays a script.

    Args:
        script: ``script[text so far][ordinal]`` is (text, log-probability of each token), or a list of such pairs by
            attempt. A text ends with a newline or with END. ``script[prompt]`` may hold a script for one prompt.
        vectors: Embeddings of steps, by their stripped text.
    """

    def __init__(self, script, vectors=None) -> None:
        super().__init__()
        self.script, self.vectors = script, vectors or {}

    def draw(self, request, prompt, above, step_end):
        script = self.script.get(prompt, self.script)
        drawn = script[above][request.path[-1]]
        text, logprob = drawn[request.attempt] if isinstance(drawn, list) else drawn
        if text.endswith(END):
            return text[:-1], logprob * len(text), "end_of_text"
        assert step_end(text)
        assert not step_end(text[:-1])
        return text, logprob * len(text), "step"

    def embed(self, text):
        return self.vectors.get(text.strip())


class CharacterEngine(ToyEngine):
    """A language model of six characters whose logits are a hash of the text before."""

    alphabet = "ab \nz" + END

    def __init__(self, end_logit: float = -1.0) -> None:
        super().__init__()
        self.end_logit = end_logit

    def draw(self, request, prompt, above, step_end):
        text, total = "", 0.0
        while len(text) < request.max_tokens:
            drawn = sk.sample_logits(
                self.logits(prompt + above + text)[None],
                seed=request.seed,
                position=len(prompt + above + text),
                temperature=request.temperature,
                top_k=request.top_k,
                top_p=request.top_p,
            )
            total += drawn.logprob.item()
            character = self.alphabet[drawn.token.item()]
            if character == END:
                return text, total, "end_of_text"
            text += character
            if step_end(text):
                return text, total, "step"
        return text, total, "length"

    def logits(self, text: str) -> torch.Tensor:
        digest = hashlib.blake2b(text.encode(), digest_size=len(self.alphabet)).digest()
        logits = torch.tensor(list(digest), dtype=torch.float32) / 64
        logits[-1] += self.end_logit
        return logits


def find(script, *, checks=(), selector=log_probability, vectors=None, prompts=("Q",), **fields):
    """Searches a script with two children per leaf and a beam of two. Returns the engine and the results."""
    engine = ScriptedEngine(script, vectors)
    config = PathFinderConfig(**{"branching_factor": 2, "beam": 2, "max_depth": 4, "max_step_tokens": 20} | fields)
    results = PathFinder(engine, config, checks=checks, selector=selector).solve(prompts)
    assert engine.texts == {}, "every branch is freed"
    return engine, results


def nodes_of(tree):
    """Returns (text, status, reason) of every node except the root, by path."""
    return {
        tree.path(node): (tree.steps[node], Status(tree.status[node]).name, tree.reasons[node])
        for node in range(1, len(tree))
    }
