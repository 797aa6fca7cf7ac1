"""The description of a run in a report: models, decoders, tasks and machine, and how outputs from elsewhere compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from slimkernels.evaluate.report.blocks import Block, Heading, Paragraph, Table
from slimkernels.evaluate.served import PLAIN


def what_was_run(described: Mapping[str, Any]) -> list[Block]:
    """Describes the run; nothing if the description is empty."""
    blocks: list[Block] = []
    models = described.get("models", ())
    local = [[entry["model"], entry["identity"]] for entry in models if "served" not in entry]
    if local:
        blocks.append(Table(["model", "identity (hash of files, precision and prompt style)"], local))
    blocks += _served([entry for entry in models if "served" in entry])
    if described.get("decoders"):
        rows = [
            [entry["decoder"], ", ".join(f"{name} {value}" for name, value in entry["settings"].items())]
            for entry in described["decoders"]
        ]
        blocks.append(Table(["decoder", "settings"], rows))
    if described.get("tasks"):
        rows = [
            [entry["task"], f"{entry['samples']} of {entry['available']}", entry["file"], entry["hash"]]
            for entry in described["tasks"]
        ]
        blocks.append(Table(["task", "samples", "file", "hash"], rows))
    facts = [
        f"{title} {', '.join(map(str, described[name])) if isinstance(described[name], list) else described[name]}"
        for name, title in (
            ("seeds", "Sampling seeds:"),
            ("shots", "Worked examples before each question:"),
            ("batch_questions", "Questions decoded together:"),
            ("machine", "Machine:"),
        )
        if name in described
    ]
    if "versions" in described:
        facts.append("Versions: " + ", ".join(f"{name} {version}" for name, version in described["versions"].items()))
    if facts:
        blocks.append(Paragraph(". ".join(facts) + "."))
    if "judge" in described:
        asked = described["judge"]
        blocks.append(Paragraph(f"Judge: {asked['model']} at {asked['url']}, with a prompt of hash {asked['prompt']}."))
    return [Heading("What was run"), *blocks] if blocks else []


def published_outputs(described: Mapping[str, Any]) -> list[Block]:
    """Describes how outputs from elsewhere were scored, and how often their published scores agree."""
    blocks: list[Block] = []
    for entry in described.get("outputs", ()):
        blocks.append(Paragraph(entry["explained"]))
        if entry["published"]:
            blocks.append(Table(["score", "computed", "published", "rows that agree"], entry["published"]))
    return [Heading("Outputs from elsewhere, scored again"), *blocks] if blocks else []


def _served(models: Sequence[Mapping[str, Any]]) -> list[Block]:
    """Describes models behind servers: a table of the known facts, and what is unknown."""
    if not models:
        return []
    rows = []
    for entry in models:
        known = entry["served"]
        facts = ", ".join(f"{name} {value}" for name, value in known["said"].items()) or "nothing"
        rows.append([entry["model"], known["model"], known["url"], known["style"], facts, entry["identity"]])
    head = ["served model", "name on the server", "server", "prompt style", "facts stated by the server"]
    said = "A server shows neither the weights of a model nor their precision."
    if any(entry["served"]["style"] == PLAIN for entry in models):
        said += f" Run with --prompt-style plain to ask local models in {PLAIN} as well."
    notes = dict.fromkeys(note for entry in models for note in entry["served"]["notes"])
    searched = Paragraph(f"Search with a server: {'; '.join(notes)}.")
    return [Table([*head, "identity (hash of these columns and the template)"], rows), Paragraph(said), searched]
