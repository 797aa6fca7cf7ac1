"""Chains of reasoning whose steps are known to be new, or to repeat an earlier step."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from slimkernels.search import PathFinderConfig, TransformersEngine, greedy

# Steps "between" are not used to choose a threshold: a step with other numbers may be about something else, and a
# paraphrase has other words.
KINDS = {
    "new": ("gsm8k", "strategyqa", "own"),
    "repeated": ("loop", "verbatim", "retyped", "reworded"),
    "between": ("renumbered", "paraphrased"),
}
# Two steps that the model generates count as different if their words' Jaccard similarity is below this.
MAX_SIMILARITY = 0.5

SYNONYMS = {
    "each": "every",
    "total": "whole",
    "so": "thus",
    "has": "owns",
    "earns": "makes",
    "makes": "earns",
    "spent": "paid",
    "bought": "purchased",
    "costs": "is priced at",
    "cost": "price",
    "altogether": "overall",
    "remaining": "left over",
    "left": "remaining",
    "needs": "requires",
    "would": "will",
    "got": "received",
    "gets": "receives",
    "sold": "dealt",
    "did": "had done",
    "people": "persons",
    "more": "additional",
    "number": "count",
    "amount": "quantity",
    "there are": "we have",
}

# Paraphrases of the first steps of some lines of GSM8K's train.jsonl, by line number from 0.
PARAPHRASES = {
    0: "In May, 48/2 = 24 of her friends got a clip from Natalia.",
    1: "Every minute of babysitting is worth 12/60 = $0.2 to Weng.",
    2: "At first half of the wallet's price, 100 / 2 = $50, is what Betty owns.",
    3: "Today's reading of Maila comes to 12 x 2 = 24 pages.",
    4: "A single friend receives 3*2=6 pages from him in seven days",
    5: "The purple flowers outnumber the yellow ones by 80/100 * 10 = 8.",
    6: "2 x 16 = 32, so the big pizzas give him 32 slices",
    9: "One shift of eight hours pays her 8*18 = $144.00, since an hour is worth $18",
    11: "95 + 15 = 110, which is how many dollars he had put aside in the end",
    12: "Coconuts aside, 60/2 = 30 trees are one half of all the mango trees that Randy owns.",
    13: "Cream cheese is half as dear, $10 / 2 = $5 a pound.",
    14: "Sixty minutes hold three times twenty minutes.",
    15: "The price at which a DVD left his shop was 6*2.5=$15",
    16: "Mike is given 2 shares whenever Johnson is given 5",
    17: "After Carl carried off 4 of the 26 pink hats, 26-4 = 22 of them were still there",
    18: "Walking to the office costs Roque 2*3 = 6 hours in a week.",
    19: "For work he rides 20*2=40 miles by bike daily",
    20: "She has 11 + 9 = 20 stamps with trucks on them.",
    21: "Begin with how many snakes get eaten: 6 jaguars with 5 each make 5 * 6 = 30",
    22: "Jamie's surname has 4 letters; doubling that and adding 2 gives Bobbie's, 4*2 +2 = 10 letters.",
    23: "The five shorts were $7 apiece, which makes 5*7=$35",
    24: "Mary's repayments until now are $15 +$23=$38.",
    28: "3 gnomes at each of the first 4 houses make 4 * 3 = 12 gnomes.",
    30: "The pizzas were cut into 4 x 4 = 16 slices altogether.",
    31: "Eight large paintings at $60 brought Noah $60 x 8 = $480.",
    34: "Twice $1750, that is 2*$1750 = $3500, went to Tony",
    36: "Half of the $60, $60 * 1/2 = $30, is what Lisa made.",
    37: "For 5 hamburgers at $3 they pay $3 x 5 = $15.",
    38: "12 x 6 = 72, so that is how many ounces of water go in",
}


class Step(NamedTuple):
    """A step of a chain.

    Attributes:
        token_ids: Token ids of the step.
        text: Text of the step.
        kind: One of the kinds in KINDS; empty if it is unknown, or if no step precedes it.
    """

    token_ids: list[int]
    text: str
    kind: str


class Chain(NamedTuple):
    """The answer to one question.

    Attributes:
        number: Number of the question. Even ones choose a threshold, odd ones evaluate it.
        prompt: Token ids of the prompt.
        steps: Steps in order.
    """

    number: int
    prompt: list[int]
    steps: list[Step]


def gsm8k_chains(file: Path, tokenizer: PreTrainedTokenizerBase, count: int) -> list[Chain]:
    """Returns reference solutions, each with one more step that repeats an earlier one in some way."""
    draw = random.Random(0)  # noqa: S311 -- a choice, not a secret
    chains = []
    for number, line in enumerate(file.read_text().splitlines()[:count]):
        row = json.loads(line)
        steps = [re.sub(r"<<.*?>>", "", step) for step in row["answer"].split("\n")[:-1]]
        ways = ("verbatim", "retyped", "reworded", "renumbered")
        kind = "paraphrased" if number in PARAPHRASES else ways[number // 2 % len(ways)]
        said = steps[0] if kind == "paraphrased" else draw.choice(steps)
        again = PARAPHRASES[number] if kind == "paraphrased" else say_again(said, kind)
        kinds = ["", *["gsm8k"] * (len(steps) - 1), kind if again != said or kind == "verbatim" else ""]
        chains.append(_chain(tokenizer, number, row["question"], [*steps, again], kinds))
    return chains


def strategyqa_chains(file: Path, tokenizer: PreTrainedTokenizerBase, count: int) -> list[Chain]:
    """Returns the facts that each question needs, which are all different."""
    rows = [row for row in json.loads(file.read_text()) if len(row["facts"]) > 1][:count]
    return [
        _chain(tokenizer, number, row["question"], row["facts"], ["", *["strategyqa"] * (len(row["facts"]) - 1)])
        for number, row in enumerate(rows)
    ]


def own_chains(engine: TransformersEngine, questions: Sequence[str], config: PathFinderConfig) -> list[Chain]:
    """Returns chains that the model generates greedily, each up to the first repeated step.

    The prompt uses the tokenizer's chat template if there is one.
    """
    prompts = [_chat_prompt(engine.tokenizer, question) for question in questions]
    chains = []
    for number, result in enumerate(greedy(engine, config).solve(prompts)):
        steps: list[Step] = []
        words: list[list[str]] = []
        for node in range(1, len(result.tree)):
            text = result.tree.steps[node]
            words.append(re.findall(r"\w+", text.lower()))
            steps.append(Step(result.tree.step_token_ids(node), text, _kind_of_own(words)))
            if steps[-1].kind == "loop":
                break
        chains.append(Chain(number, engine.tokenizer(prompts[number])["input_ids"], steps))
    return chains


def say_again(step: str, kind: str) -> str:
    """Returns the step rewritten in the given way; the step itself if that changes nothing."""
    if kind == "retyped":
        return "So, " + step[:1].lower() + step[1:].rstrip(".") + "!" * (not step.endswith("."))
    if kind == "reworded":
        return re.sub(r"\b(" + "|".join(SYNONYMS) + r")\b", lambda found: SYNONYMS[found[0].lower()], step, flags=re.I)
    if kind == "renumbered":
        return re.sub(r"\d+", lambda found: str(int(found[0]) + 3), step)
    return step


def _kind_of_own(words: list[list[str]]) -> str:
    """Returns the kind of the last of the model's steps, each given as a list of words."""
    *earlier, last = words
    if not earlier or not last:
        return ""
    if last in earlier:
        return "loop"
    similarity = max(len(set(last) & set(other)) / len(set(last) | set(other)) for other in earlier)
    return "own" if similarity < MAX_SIMILARITY else ""


def _chat_prompt(tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    if not tokenizer.chat_template:
        return _prompt(question)
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def _prompt(question: str) -> str:
    return f"Q: {question}\nA:"


def _chain(
    tokenizer: PreTrainedTokenizerBase, number: int, question: str, steps: Sequence[str], kinds: Sequence[str]
) -> Chain:
    lines = [" " * (place == 0) + step + "\n" for place, step in enumerate(steps)]
    encoded = tokenizer(lines, add_special_tokens=False)["input_ids"]
    prompt = tokenizer(_prompt(question))["input_ids"]
    return Chain(number, prompt, [Step(*step) for step in zip(encoded, lines, kinds, strict=True)])
