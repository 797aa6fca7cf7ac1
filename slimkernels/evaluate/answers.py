"""The answers of outputs, read by the same rule with which the search finishes branches and votes."""

from slimkernels.search.answers import (
    ANSWER_KINDS,
    AnswerKind,
    Extraction,
    before_next_question,
    canonical,
    extract,
    parse_number,
    same_answer,
)

__all__ = [
    "ANSWER_KINDS",
    "AnswerKind",
    "Extraction",
    "before_next_question",
    "canonical",
    "extract",
    "parse_number",
    "same_answer",
]
