"""Appends the measurements of a finished `make demo` to a JSONL file, with the machine that it ran on.

python -m bench.record_demo demo-output --out bench/results/demo.jsonl
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from bench.machine import machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("demo", type=Path, help="output folder of the demonstration")
    parser.add_argument("--out", type=Path, required=True, help="JSONL file to append to")
    args = parser.parse_args()
    results = json.loads((args.demo / "results.json").read_text())
    store, heldout, settings = results["store"], results["heldout"], results["settings"]
    run = {
        "layers": settings["layers"],
        "epochs": settings["epochs"],
        "seed": settings["seed"],
        "train_rows": store["rows"],
        "heldout_rows": heldout["rows"],
        "store_bytes_per_token": store["bytes_per_token"],
        "store_bits_per_entry": store["bits_per_entry"],
        "teacher_perplexity": results["before"]["teacher_perplexity"],
        "speed": results["speed"],
        "phase_seconds": results["phase_seconds"],
        **machine(),
    }
    with args.out.open("a") as out:
        for method, student in results["students"].items():
            row = {"op": "demo", "method": method, "kd_weight": student["kd_weight"], "curve": student["curve"]}
            row["train_tokens_per_second"] = student["train_tokens_per_second"]
            out.write(json.dumps(row | run) + "\n")
    shutil.copy(args.demo / "learning_curves.png", args.out.parent / "learning_curves.png")


if __name__ == "__main__":
    main()
