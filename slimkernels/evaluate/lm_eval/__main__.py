"""lm-eval's command line, with the models of this package.

python -m slimkernels.evaluate.lm_eval run --model slimkernels-pathfinder
    --model_args pretrained=FOLDER,branching_factor=4,beam=4 --tasks gsm8k

Without the hub, a task reads local files where a folder given as ``--include_path`` has a YAML file for it. For gsm8k,
whose authors publish two files::

    include: LM_EVAL/tasks/gsm8k/gsm8k.yaml
    task: gsm8k
    dataset_path: json
    dataset_name: null
    dataset_kwargs: {data_files: {train: DATA/gsm8k/train.jsonl, test: DATA/gsm8k/test.jsonl}}

LM_EVAL is the folder of the package: ``python -c "import lm_eval; print(lm_eval.__path__[0])"``. For multiple choice
``harness_data.write_local_tasks`` writes such files.
"""

from __future__ import annotations

import importlib

from slimkernels.evaluate.lm_eval.local_data import require_lm_eval


def main() -> None:
    """Registers ``slimkernels-pathfinder``, then does as ``lm_eval`` with the process's arguments."""
    require_lm_eval()
    importlib.import_module("slimkernels.evaluate.lm_eval.model")
    importlib.import_module("lm_eval.__main__").cli_evaluate()


if __name__ == "__main__":
    main()
