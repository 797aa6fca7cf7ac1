"""Records, data files and a small model for the tests of side-by-side evaluation."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from support.tiny import word_level
from tokenizers import decoders, pre_tokenizers

from slimkernels.evaluate.records import Record, content_key
from slimkernels.evaluate.scoring import score
from slimkernels.models.make_student import make_student

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install 'slimkernels[harness]'"
)
GSM8K = [
    {"question": f"Ann has {n} apples and gets {n} more. How many has she?", "answer": f"{n}+{n}\n#### {2000 * n:,}"}
    for n in range(1, 8)
]
CHOICES = [{"label": label, "text": text} for label, text in zip("ABC", ("bank", "mall", "river"), strict=True)]
CSQA = [
    {"id": f"c{n}", "answerKey": "ABC"[n % 3], "question": {"stem": f"Where is {n}?", "choices": CHOICES}}
    for n in range(5)
]
STRATEGYQA = [{"qid": f"s{n}", "question": f"Is {n} even?", "answer": n % 2 == 0} for n in range(4)]
SELF_INSTRUCT = [
    {"id": "u0", "instruction": "Translate.", "instances": [{"input": "the cat", "output": "die Katze, schön"}]}
]


def make_data(folder: Path) -> Path:
    """Writes small files in the layouts in which the data sets are published."""
    for name, rows in (
        ("gsm8k/test.jsonl", GSM8K),
        ("commonsenseqa/dev_rand_split.jsonl", CSQA),
        ("self_instruct/user_oriented_instructions.jsonl", SELF_INSTRUCT),
    ):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "strategyqa").mkdir()
    (folder / "strategyqa" / "dev.json").write_text(json.dumps(STRATEGYQA))
    return folder


def make_folder(path: Path, seed: int = 0) -> Path:
    """Saves a Llama of a few thousand parameters that writes characters, with its tokenizer."""
    characters = sorted(set("\n .,:()#0123456789ABCDEQabcdefghijklmnopqrstuvwxyz"))
    tokenizer = word_level(characters, pre_tokenizers.Split("", "isolated"), decoders.Fuse())
    sizes = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "max_length": 512}
    make_student(vocab_size=len(tokenizer), seed=seed, **sizes).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def make_record(sample: int | str, output: str, reference: str = "1", **fields: Any) -> Record:
    """Makes a scored record of GSM8K, or of the given task."""
    given = {"model": "m", "decoder": "greedy", "task": "gsm8k", "seed": None} | fields
    return score(
        Record(
            key=content_key(sample, given["model"], given["decoder"], given["task"], given["seed"]),
            sample=str(sample),
            order=int(sample) if str(sample).isdecimal() else 0,
            output=output,
            reference=reference,
            **{"prompt": "p", "question": "How many?", "answers": {}, "scores": {}} | given,
        )
    )
