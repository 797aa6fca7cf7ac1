"""Makes documents with a teacher's dense logits, for tests that write them in the formats of other projects."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from support import teachers

from slimkernels.store import Document

VOCAB_SIZE, TOP_K = 300, 12


class Case(NamedTuple):
    """A document of T likely tokens, and the teacher's (T, V) log-probabilities; row j predicts token j + 1."""

    input_ids: list[int]
    logprobs: np.ndarray

    def largest(self, row: int, top_k: int = TOP_K) -> list[int]:
        """Returns the ids of a row's largest log-probabilities, in descending order."""
        return np.argsort(-self.logprobs[row], kind="stable")[:top_k].tolist()


def make_cases(count: int = 4, temperature: float = 1.0) -> list[Case]:
    """Generates documents with the tiny teacher, so that most labels are among the kept ids."""
    model = teachers.make_teacher()
    generator = torch.Generator().manual_seed(0)
    cases = []
    for length in range(20, 20 + 3 * count, 3):
        ids = torch.randint(300, (1, 1), generator=generator)
        with torch.inference_mode():
            while ids.shape[1] < length:
                logits = model(input_ids=ids).logits[0, -1].double()
                drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
                ids = torch.cat([ids, drawn[None]], -1)
            logits = model(input_ids=ids).logits[0].double()
        cases.append(Case(ids[0].tolist(), (logits / temperature).log_softmax(-1).numpy()))
    return cases


def assert_is(
    document: Document,
    case: Case,
    *,
    positions: list[int],
    whole_row: bool = True,
    temperature: float = 1.0,
    atol: float = 1e-5,
) -> None:
    """The document is the case's, its rows are the case's largest, and so are its probabilities at the temperature.

    ``temperature`` is that of the case's log-probabilities; not over the whole row, they were renormalised. The rest of
    a row is known at this temperature alone, and only if the log-probabilities are over the whole row.
    """
    assert document.input_ids.tolist() == case.input_ids
    assert document.positions.tolist() == positions
    assert (document.teacher.rest_lse is not None) == whole_row
    if whole_row and temperature != 1:
        assert document.teacher.rest_lse_at(1.0).isnan().all()
    for row, position in enumerate(positions):
        teacher = document.teacher[row]
        kept = teacher.ids >= 0
        ids = teacher.ids[kept].tolist()
        assert ids == sorted(case.largest(position - 1, len(ids)))
        expected = torch.from_numpy(case.logprobs[position - 1, ids])
        logits = teacher.logits[kept].double()
        actual = logits / temperature - (teacher.lse_at(temperature) if whole_row else 0.0)
        if not whole_row:
            expected, actual = (values - values.logsumexp(-1) for values in (expected, actual))
            torch.testing.assert_close(teacher.lse_at(1.0).double(), logits.logsumexp(-1), atol=atol, rtol=0)
        torch.testing.assert_close(actual.double(), expected, atol=atol, rtol=0)
        if whole_row:
            rest = 1 - torch.from_numpy(case.logprobs[position - 1, ids]).exp().sum()
            assert rest > 1e-4
            # An error of every log-probability is the same error of their mass.
            assert teacher.rest_lse_at(temperature).double().exp() == pytest.approx(float(rest), abs=max(atol, 1e-6))
        label = case.input_ids[position]
        if label in ids:
            assert teacher.target_logit == teacher.logits[kept][ids.index(label)]
        else:
            assert teacher.target_logit == -torch.inf
