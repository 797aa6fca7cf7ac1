"""Runs the code cells of a notebook in order, and with --write stores what they print as their outputs.

python tests/scripts/run_notebook.py examples/largest_logits.ipynb --write
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path


def main() -> None:
    path, write = Path(sys.argv[1]), "--write" in sys.argv[2:]
    notebook = json.loads(path.read_text())
    namespace = {"__name__": "__main__"}
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(code, 1):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("".join(cell["source"]), f"cell {number} of {path.name}", "exec"), namespace)  # noqa: S102 -- its own notebooks
        text = printed.getvalue().splitlines(True)
        sys.stdout.writelines(text)
        cell["execution_count"] = number
        cell["outputs"] = [{"name": "stdout", "output_type": "stream", "text": text}] if text else []
    if write:
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
