"""Instruction data in the layouts of public data sets, and the documents that students are trained on."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from transformers import PreTrainedTokenizerBase

from slimkernels.teacher.tokenized_document import TokenizedDocument

Item = TypeVar("Item")
_ALPACA = re.compile(r"### Instruction:\n(.*?)(?:\n\n### Input:\n(.*?))?\n\n### Response:", re.DOTALL)


class Example(NamedTuple):
    """An instruction, followed by its input if it has one, and the reference response of the data."""

    instruction: str
    reference: str


def read_examples(path: Path) -> list[Example]:
    """Reads the examples of a JSONL file that have a response.

    These layouts are supported:

    - ``prompt`` with ``response`` or ``answer``; Alpaca's template around a prompt is removed.
    - ``instruction`` with ``input`` or ``context``, and ``output`` or ``response``.
    - ``instruction`` with ``instances``, of which the first is used (Self-Instruct).
    - ``turns``, of which the first is used, with the answers in ``reference_*.jsonl`` in the same folder (MT-Bench,
      Vicuna).

    Raises:
        ValueError: A record has another layout; the message names it.
    """
    records = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    references: dict[int, str] = {}
    if records and "turns" in records[0]:
        for file in sorted(path.parent.glob("reference_*.jsonl")):
            answers = map(json.loads, file.read_text().splitlines())
            references |= {answer["question_id"]: answer["choices"][0]["turns"][0] for answer in answers}
    found = []
    for number, record in enumerate(records, 1):
        try:
            instruction, reference = _parts(record, references)
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(f"{path}, record {number}: unknown layout with fields {sorted(record)}") from error
        if instruction.strip() and reference.strip():
            found.append(Example(instruction.strip(), reference.strip()))
    return found


def _parts(record: dict, references: dict[int, str]) -> tuple[str, str]:
    if "turns" in record:
        return record["turns"][0], references.get(record["question_id"], "")
    if "instances" in record:
        instance = record["instances"][0]
        return _joined(record["instruction"], instance["input"]), instance["output"]
    if "prompt" in record:
        framed = _ALPACA.search(record["prompt"])
        prompt = _joined(framed[1], framed[2]) if framed else record["prompt"]
        return prompt, record["response"] if "response" in record else record["answer"]
    given = record.get("input") or record.get("context")
    return _joined(record["instruction"], given), record["output"] if "output" in record else record["response"]


def _joined(instruction: str, given: str | None) -> str:
    return f"{instruction}\n\n{given}" if given else instruction


def without(examples: Iterable[Example], held_out: Iterable[Example]) -> list[Example]:
    """Returns the examples without those whose instruction is held out or repeated, ignoring case and white space."""
    seen = {_normalised(example) for example in held_out}
    left = []
    for example in examples:
        if _normalised(example) not in seen:
            seen.add(_normalised(example))
            left.append(example)
    return left


def _normalised(example: Example) -> str:
    return " ".join(example.instruction.lower().split())


def prompt_ids(tokenizer: PreTrainedTokenizerBase, example: Example) -> list[int]:
    """Tokenizes an instruction as a user's message in the tokenizer's chat template."""
    messages = [{"role": "user", "content": example.instruction}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]


def short(tokenizer: PreTrainedTokenizerBase, examples: Iterable[Example], max_length: int) -> list[Example]:
    """Returns the examples whose prompts have at most ``max_length`` tokens."""
    return [example for example in examples if len(prompt_ids(tokenizer, example)) <= max_length]


def documents(tokenizer: PreTrainedTokenizerBase, examples: Iterable[Example]) -> Iterator[TokenizedDocument]:
    """Yields each example's token ids of prompt, response and end of text; the prompt has no labels."""
    for example in examples:
        prompt = prompt_ids(tokenizer, example)
        response = tokenizer(example.reference, add_special_tokens=False)["input_ids"]
        ids = [*prompt, *response, tokenizer.eos_token_id]
        yield TokenizedDocument(ids, positions=range(len(prompt), len(ids)), prompt_length=len(prompt))


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """Picks at most ``count`` items evenly, since neighbours in a file are often similar."""
    count = min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]
