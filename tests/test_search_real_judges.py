"""The checks of the search with trained models: an entailment model on SNLI and a sentence encoder."""

from __future__ import annotations

import pytest
import torch
from support import nli
from support.toy_engines import ScriptedEngine

from slimkernels.search import (
    CheckedBranch,
    CheckedStep,
    ContradictionCheck,
    PathFinder,
    PathFinderConfig,
    RepetitionCheck,
    Status,
    log_probability,
)

GUITAR = "A man is playing a guitar on the street."
ASLEEP = "A man is sleeping in his bed at night."
OUTDOORS = "The man is playing music outdoors."
IN_BED = "The man is asleep in his bed."
MUSIC = "A man is making music."
RESTING = "A man is resting."


@pytest.fixture(scope="module")
def judge(public_data, request):
    return nli.entailment_judge(public_data, request.config.cache.mkdir("nli"))


@pytest.fixture(scope="module")
def snli(public_data):
    pairs, labels = nli.read_snli(public_data, "test")
    return pairs[:1500], labels[:1500]


def cut_nodes(tree, check):
    """Returns the texts of the branches that the check cut."""
    engine = ScriptedEngine({above: [(f"{text}{end}", -1.0) for text, end in below] for above, below in tree.items()})
    config = PathFinderConfig(branching_factor=2, beam=4, max_step_tokens=80, max_attempts=1)
    [result] = PathFinder(engine, config, checks=[check], selector=log_probability).solve(["Q"])
    cut = result.tree.with_status(Status.CUT)
    assert {result.tree.reasons[node] for node in cut} == {check.name}
    return {tuple(result.tree.text(node).splitlines()) for node in cut}


def test_entailment_judge_is_right_about_sentences_it_was_not_trained_on(judge, snli):
    pairs, labels = snli
    right = judge.probabilities(pairs).argmax(-1) == labels
    assert right.float().mean() > 0.65  # 0.711 was measured, a third is chance
    assert all(right[labels == label].float().mean() > 0.5 for label in range(3))


def test_contradiction_check_tells_contradicted_from_entailed_sentences(judge, snli):
    pairs, labels = snli
    branches = [CheckedBranch("", [CheckedStep(premise)], CheckedStep(step)) for premise, step in pairs[:400]]
    failed = torch.tensor(ContradictionCheck(judge)(branches))
    share = {name: failed[labels[:400] == place].float().mean().item() for place, name in enumerate(nli.LABELS)}
    assert share["contradiction"] > 0.4, share
    assert share["neutral"] < 0.2, share
    assert share["entailment"] < 0.08, share


def test_contradiction_check_cuts_what_contradicts_its_own_ancestors(judge):
    asked = []

    def contradicts(pairs):
        asked.append(pairs)
        return judge(pairs)

    check = ContradictionCheck(contradicts)
    # Both branches are offered the same steps, each of which contradicts one branch and agrees with the other.
    tree = {
        "": [(GUITAR, "\n"), (ASLEEP, "\n")],
        f"{GUITAR}\n": [(OUTDOORS, "\n"), (IN_BED, "\n")],
        f"{ASLEEP}\n": [(OUTDOORS, "\n"), (IN_BED, "\n")],
        f"{GUITAR}\n{OUTDOORS}\n": [(MUSIC, "$"), (RESTING, "$")],
        f"{ASLEEP}\n{IN_BED}\n": [(MUSIC, "$"), (RESTING, "$")],
    }
    expected = {(GUITAR, IN_BED), (ASLEEP, OUTDOORS), (GUITAR, OUTDOORS, RESTING), (ASLEEP, IN_BED, MUSIC)}
    assert cut_nodes(tree, check) == expected
    # One call per depth covers the pairs of each leaf with its own ancestors. No pair is judged twice, even in another
    # search.
    assert [set(pairs) for pairs in asked] == [
        {(premise, step) for premise in (GUITAR, ASLEEP) for step in (OUTDOORS, IN_BED)},
        {(premise, step) for premise in (GUITAR, OUTDOORS, ASLEEP, IN_BED) for step in (MUSIC, RESTING)},
    ]
    assert [len(pairs) for pairs in asked] == [4, 8]
    assert cut_nodes(tree, check) == expected
    assert len(asked) == 2


def test_repetition_check_by_a_sentence_encoder_cuts_a_paraphrase():
    sold, again = "In May she sold half of 48 clips, that is 24.", "24 clips were sold by her in May, half of 48."
    total = "Altogether she sold 48 + 24 = 72 clips in April and May."
    tree = {"": [(sold, "\n"), (total, "\n")], f"{sold}\n": [(again, "$"), (total, "$")]}
    tree |= {f"{total}\n": [(sold, "$"), (again, "$")]}
    encoder = nli.sentence_encoder()
    assert cut_nodes(tree, RepetitionCheck(0.97, encoder)) == {(sold, again)}
