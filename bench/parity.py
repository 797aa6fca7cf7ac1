"""Compares values and gradients of the losses of other trainers with ours; float64 is the judge.

make parity    # installs the peers into a folder of their own, and runs
python -m bench.parity --out bench/results/parity.jsonl

A row for each (peer, loss, dtype, case). Peers that are not installed are left out and named.
"""

from __future__ import annotations

import argparse
import os
import warnings
from pathlib import Path

import torch

from bench import records
from bench.losses import peers
from bench.losses.cases import TOP_K, all_cases
from bench.losses.judge import DTYPES, Peer, agrees, applies, compare
from bench.machine import machine


def main() -> None:
    """Measures every peer that is installed and appends its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results/parity.jsonl"), help="JSONL to append to")
    parser.add_argument("--only", nargs="+", choices=sorted(peers.DISTRIBUTIONS), help="peers (default: all)")
    args = parser.parse_args()
    # The peers' kernels for GPUs are interpreted; Triton reads this when a peer imports it.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    torch.set_num_threads(1)
    described = machine()
    for module in args.only or peers.DISTRIBUTIONS:
        peer = peers.load_peer(module)
        if peer.version is None:
            print(f"{peer.name} is not installed and left out; `make parity` installs it")
            continue
        rows = measure(peer)
        records.append(args.out, [row | described for row in rows])
        off = sum("raised" in row or not agrees(row["theirs"], row["dtype"]) for row in rows)
        print(f"{peer.name} {peer.version}: {len(rows)} comparisons, {off} differ from float64", flush=True)


def measure(peer: Peer) -> list[dict]:
    """Returns the rows of one peer, without the machine's fields."""
    rows = []
    for loss in peer.losses:
        for case in filter(lambda case: applies(loss, case), all_cases()):
            for dtype in DTYPES:
                with warnings.catch_warnings():  # peers warn of deprecations of their own
                    warnings.simplefilter("ignore")
                    compared = compare(loss, case, dtype)
                rows.append(
                    {
                        "op": "parity",
                        "peer": peer.name,
                        "version": peer.version,
                        "function": loss.name,
                        "options": loss.options,
                        "says": loss.says,
                        "equals": loss.ours,
                        "squares_temperature": loss.squares_temperature if loss.takes_temperature else None,
                        "dtype": dtype,
                        "case": case.name,
                        "case_says": case.says,
                        "shape": {
                            "rows": len(case.target),
                            "vocab": case.student.shape[-1],
                            "top_k": TOP_K if loss.top_k else None,
                        },
                        **compared,
                    }
                )
    return rows


if __name__ == "__main__":
    main()
