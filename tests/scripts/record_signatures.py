"""Records what the adapters import from other projects' packages, for tests/test_signatures.py.

    python tests/scripts/record_signatures.py                        # wheels, from the package index
    python tests/scripts/record_signatures.py nemo_rl=FOLDER@COMMIT  # a checkout, of what has no wheel

Entries of packages that are not asked for stay as they are. Nothing of a package is imported.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.signatures import imported, record

ROOT = Path(__file__).parents[2]
RECORDED = ROOT / "tests/data/signatures.json"
# The release of each package that an adapter imports; None for those that are no wheel.
ADAPTERS = {
    "slimkernels/integrations/axolotl.py": ("axolotl", "axolotl==0.19.0"),
    "slimkernels/integrations/ms_swift.py": ("swift", "ms-swift==4.6.0"),
    "slimkernels/integrations/torchtitan.py": ("torchtitan", "torchtitan==0.3.0"),
    "slimkernels/integrations/verl.py": ("verl", "verl==0.9.1"),
    "slimkernels/integrations/megatron.py": ("megatron", "megatron-core==0.16.1"),
    "examples/llamafactory_slim.py": ("llamafactory", "llamafactory==0.9.5"),
    "examples/torchtune_loss.py": ("torchtune", "torchtune==0.6.1"),
    "examples/nemo_rl_loss.py": ("nemo_rl", None),
    "examples/kdflow_algorithm.py": ("kdflow", None),
}


def main() -> None:
    recorded = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    checkouts = dict(argument.split("=", 1) for argument in sys.argv[1:])
    for adapter, (package, release) in ADAPTERS.items():
        names = sorted(set(imported(ast.parse((ROOT / adapter).read_text())).values()))
        if checkouts and package not in checkouts:
            continue
        if package in checkouts:
            folder, _, version = checkouts[package].rpartition("@")
            recorded[package] = {"version": version, "names": {name: record(name, Path(folder)) for name in names}}
        elif release is not None:
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, "-m", "pip", "-q", "download", "--no-deps", "-d", folder, release]
                subprocess.run(command, check=True)
                zipfile.ZipFile(next(Path(folder).glob("*.whl"))).extractall(f"{folder}/sources")
                entries = {name: record(name, Path(folder, "sources")) for name in names}
            recorded[package] = {"version": release, "names": entries}
    RECORDED.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
