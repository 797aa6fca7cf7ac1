"""lm-eval's command line with the model ``slimkernels-pathfinder``.

python -m slimkernels.evaluate.lm_eval run --model slimkernels-pathfinder
    --model_args pretrained=FOLDER,branching_factor=4,beam=4 --tasks gsm8k

A task reads local files instead of the hub if a YAML file in the folder ``--include_path`` defines it so. This one
reads the two files that the authors of gsm8k publish::

    include: LM_EVAL/tasks/gsm8k/gsm8k.yaml
    task: gsm8k
    dataset_path: json
    dataset_name: null
    dataset_kwargs: {data_files: {train: DATA/gsm8k/train.jsonl, test: DATA/gsm8k/test.jsonl}}

LM_EVAL is the folder of lm-eval's package, as printed by ``python -c "import lm_eval; print(lm_eval.__path__[0])"``.
``slimkernels.evaluate.lm_eval.local_data.write_local_tasks`` writes such files for multiple-choice tasks.
"""

from __future__ import annotations

import importlib
import sys

from slimkernels.evaluate.lm_eval.local_data import require_lm_eval


def main() -> None:
    """Registers ``slimkernels-pathfinder`` and runs lm-eval's command line with the arguments of the process."""
    try:
        require_lm_eval()
    except ImportError as error:
        sys.exit(f"slimkernels: {error}")
    # Both modules need the optional package lm-eval. Importing the first one registers the model.
    importlib.import_module("slimkernels.evaluate.lm_eval.model")
    importlib.import_module("lm_eval.__main__").cli_evaluate()


if __name__ == "__main__":
    main()
