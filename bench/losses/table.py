"""The generated block of docs/parity.md."""

from __future__ import annotations

import math

from bench.losses.judge import TOLERANCES, agrees

PARTS = ("value", "gradient")

Key = tuple[str, str, str]


def parity_block(rows: list[dict]) -> str:
    """Returns what every loss computes, its errors next to ours, and every case in which float64 contradicts one."""
    newest = {(row["peer"], row["function"], row["options"], row["dtype"], row["case"]): row for row in rows}
    losses: dict[Key, list[dict]] = {}
    for key, row in newest.items():
        losses.setdefault(key[:3], []).append(row)
    lines = ["| loss | computes | with our options |", "|---|---|---|"]
    lines += [f"| {_name(group[0])} | {group[0]['says']} | {_equals(group[0])} |" for group in losses.values()]
    lines += [
        "",
        "Largest errors of the value and of the gradient, over the rows on which the loss agrees with float64; ours on "
        "the same rows, and whether it agrees or not:",
        "",
        "| loss | rows that agree | float32: theirs | float32: ours | bfloat16: theirs | bfloat16: ours |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for group in losses.values():
        agreeing = [row for row in group if _is_right(row)]
        cells = [
            _largest([row[side] for row in (agreeing if side == "theirs" else group) if row["dtype"] == dtype])
            for dtype in TOLERANCES
            for side in ("theirs", "ours")
        ]
        lines.append(f"| {_name(group[0])} | {len(agreeing)} of {len(group)} | {' | '.join(cells)} |")
    lines += ["", "Where float64 contradicts a loss, theirs or ours (the value is followed by the exact one):", ""]
    lines += [*_contradicted(losses), "", _closing(list(newest.values()))]
    return "\n".join(lines)


def _contradicted(losses: dict[Key, list[dict]]) -> list[str]:
    """Returns a table with a line for each loss and case that disagrees with float64, in either dtype."""
    lines = ["| rows | loss | float32 | bfloat16 |", "|---|---|---|---|"]
    found: dict[tuple[str, str], dict[str, str]] = {}
    for group in losses.values():
        for row in group:
            if not _is_right(row):
                found.setdefault((row["case_says"], _name(row)), {})[row["dtype"]] = _difference(row)
            if not agrees(row["ours"], row["dtype"]):
                ours = f"**ours**, {_equals(row)}"
                found.setdefault((row["case_says"], ours), {})[row["dtype"]] = _errors(row["ours"])
    for (case, name), by_dtype in sorted(found.items(), key=lambda item: item[0][0]):
        lines.append(f"| {case} | {name} | {' | '.join(by_dtype.get(dtype, 'agrees') for dtype in TOLERANCES)} |")
    return lines


def _difference(row: dict) -> str:
    """Returns how the value and the gradient of a peer differ from float64."""
    if "raised" in row:
        return f"raises {row['raised'].partition(':')[0]}"
    theirs, limit = row["theirs"], TOLERANCES[row["dtype"]]
    parts = []
    if theirs["value"] is None or theirs["value"] > limit:
        parts.append(f"value {_number(row['value'])} for {_number(row['judge'])}")
    if theirs["gradient"] is None:
        parts.append("gradient not finite")
    elif theirs["gradient"] > limit:
        # An exact gradient of almost 0 makes any multiple of it small.
        is_multiple = theirs["direction"] is not None and theirs["direction"] <= limit and 0.01 < theirs["scale"] < 100
        parts.append(
            f"gradient {theirs['scale']:.3g} times the right one"
            if is_multiple
            else f"gradient off by {theirs['gradient']:.1e}"
        )
    return "; ".join(parts)


def _is_right(row: dict) -> bool:
    return "raised" not in row and agrees(row["theirs"], row["dtype"])


def _name(row: dict) -> str:
    options = f", {row['options']}" if row["options"] else ""
    return f"{row['peer']} `{row['function']}`{options}"


def _equals(row: dict) -> str:
    """Returns the options of ours, and the factor of the divergence."""
    options = ", ".join(f"`{name}={value!r}`".replace("'", '"') for name, value in row["equals"].items())
    squares = {None: "", True: ", times T²", False: ", not times T²"}
    return options + squares[row["squares_temperature"]]


def _largest(errors: list[dict]) -> str:
    if not errors:
        return "-"
    largest = (max(math.inf if error[part] is None else error[part] for error in errors) for part in PARTS)
    return " / ".join(f"{error:.0e}" for error in largest)


def _errors(errors: dict) -> str:
    return ", ".join(
        f"{part} {'not finite' if errors[part] is None else f'off by {errors[part]:.1e}'}" for part in PARTS
    )


def _number(value: float | str) -> str:
    return {"nan": "NaN"}.get(value, value) if isinstance(value, str) else f"{value:.4g}"


def _closing(rows: list[dict]) -> str:
    row = rows[-1]
    shape = row["shape"]
    versions = ", ".join(dict.fromkeys(f"{row['peer']} {row['version']}" for row in rows))
    return (
        f"{_nearly_equal(rows)}{shape['rows']} rows of {shape['vocab']} logits, {_kept(rows)} of them kept where a "
        f"loss takes the largest. {versions}; {row['device']}, commits "
        f"{', '.join(dict.fromkeys(row['commit'] for row in rows))}, {row['date'][:10]}; "
        "`python -m bench.parity --out bench/results/parity.jsonl`."
    )


def _nearly_equal(rows: list[dict]) -> str:
    """Returns a sentence about the absolute errors of the divergences in float32 on the rows that nearly agree."""
    close = [row for row in rows if row["case"] == "nearly equal" and row["dtype"] == "float32"]
    close = [row for row in close if row["equals"].get("kd_weight") != 0]
    if not close:
        return ""
    sides = []
    for side in ("ours", "theirs"):
        # A loss that raised has no value, and a value that is not finite no error.
        nats = [row[side]["nats"] for row in close if side in row and row[side]["nats"] is not None]
        silent = f"; {len(close) - len(nats)} of {len(close)} give no number" if len(nats) < len(close) else ""
        sides.append(f"{max(nats, default=math.inf):.0e} nats ({side}{silent})")
    return (
        f"Where student and teacher nearly agree, a divergence in float32 is wrong by at most {' and '.join(sides)}, "
        "which may be most of it. "
    )


def _kept(rows: list[dict]) -> int:
    return max((row["shape"]["top_k"] or 0 for row in rows), default=0)
