"""lm-eval's command line, with the models of this package.

python -m slimkernels.evaluate.lm_eval run --model slimkernels-pathfinder
    --model_args pretrained=FOLDER,branching_factor=4,beam=4 --tasks gsm8k
"""

from __future__ import annotations

import importlib

from slimkernels.evaluate.harness_data import require_lm_eval


def main() -> None:
    """Registers ``slimkernels-pathfinder``, then does as ``lm_eval`` with the process's arguments."""
    require_lm_eval()
    importlib.import_module("slimkernels.evaluate.harness_model")
    importlib.import_module("lm_eval.__main__").cli_evaluate()


if __name__ == "__main__":
    main()
