"""Rouge-L of responses with bootstrap intervals, and the ratings of a judge behind an OpenAI-compatible server."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

ROUNDS = 10_000
_RATING = re.compile(r"\[\[\s*(\d+(?:\.\d+)?)\s*\]\]")
_JUDGE = """\
Rate the response of an assistant to an instruction from 1 (useless) to 10 (as good as it can be) for helpfulness, \
relevance, accuracy and level of detail. A reference response is given. Say in one sentence why, and end with the \
rating in this form: [[5]]

[Instruction]
{instruction}

[Reference]
{reference}

[Response]
{response}
"""


def rouge_l(references: Sequence[str], responses: Sequence[str]) -> list[float]:
    """The F-measure of Rouge-L, 0 to 100, of each response, with stemming; by the package rouge-score.

    Its tokenizer keeps the letters a to z and digits alone: of other scripts nothing is left, and a response scores 0.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError("Rouge-L needs the package rouge-score: pip install 'slimkernels[evaluate]'") from error
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    pairs = zip(references, responses, strict=True)
    return [100 * scorer.score(reference, response)["rougeL"].fmeasure for reference, response in pairs]


def interval(values: Sequence[float], *, seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of a mean, over prompts; of differences of pairs, the paired one."""
    values = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(len(values), size=(ROUNDS, len(values)))
    low, high = np.percentile(values[drawn].mean(-1), [2.5, 97.5])
    return float(low), float(high)


def judge(url: str, model: str, answers: Sequence[dict[str, str]], **client: Any) -> list[float | None]:
    """A rating from 1 to 10 of each answer by a model behind ``url``; None where its reply holds none.

    Args:
        url: The base URL, as in ``http://localhost:8000/v1``.
        model: The server's name for the judge.
        answers: With ``instruction``, ``reference`` and ``response``.
        **client: Passed on to ``ServerClient``: ``key_env``, ``concurrency``, ...

    Raises:
        ImportError, ServerRequestError, ServerUnavailableError: As ``ServerClient``.
    """
    from slimkernels.server_client import ServerClient

    with ServerClient(url, **client) as server:

        def rate(answer: dict[str, str]) -> float | None:
            fields = {name: answer[name] for name in ("instruction", "reference", "response")}
            messages = [{"role": "user", "content": _JUDGE.format(**fields)}]
            payload = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 256}
            said = server.post("/chat/completions", payload)["choices"][0]["message"]["content"] or ""
            ratings = [float(rating) for rating in _RATING.findall(said)]
            return ratings[-1] if ratings and 1 <= ratings[-1] <= 10 else None

        return [rating for _, rating in server.map(rate, answers)]
