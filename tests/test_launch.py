"""The commands of the examples' README: accelerate and the command line accept them, and two processes train."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from support.tiny import make_store
from torch.distributed.run import get_args_parser
from transformers import AutoModelForCausalLM

from slimkernels.cli.parser import make_parser

ROOT = Path(__file__).parents[1]
COMMANDS = re.findall(r"^    ((?:accelerate|torchrun) .*)$", (ROOT / "examples/README.md").read_text(), re.M)
CONFIGS = sorted((ROOT / "examples/accelerate").glob("*.yaml"))
PROCESSES = {"one": 1, "eight": 8, "two": 16}


def arguments_of(command: str) -> list[str]:
    return shlex.split(command.replace("examples/", f"{ROOT}/examples/"))


def test_every_configuration_is_launched_by_a_command():
    assert len(COMMANDS) == len(CONFIGS) + 2
    assert all(any(path.name in command for command in COMMANDS) for path in CONFIGS)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_loads_the_configuration(path):
    """Loads the configuration with accelerate, which rejects keys that it does not know."""
    config = load_config_from_file(str(path))
    assert config.num_processes == PROCESSES[path.stem.split("_")[0]]
    assert config.num_machines == (2 if path.stem.startswith("two_nodes") else 1)
    kinds = {"one_gpu": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero3": "DEEPSPEED"}
    name = "one_gpu" if path.stem == "one_gpu" else path.stem.rsplit("_", 1)[1]
    assert config.distributed_type == kinds[name]
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
    if name == "zero3":
        assert config.deepspeed_config["zero_stage"] == 3


@pytest.mark.parametrize("command", COMMANDS)
def test_launcher_and_script_take_their_arguments(command, monkeypatch):
    launcher, *arguments = arguments_of(command)
    parser = launch_command_parser() if launcher == "accelerate" else get_args_parser()
    if launcher == "accelerate":
        assert arguments.pop(0) == "launch"
    args = parser.parse_args(arguments)
    assert args.module
    assert args.training_script == "slimkernels"
    trained = make_parser().parse_args(args.training_script_args)
    assert (trained.command, trained.store, trained.out) == ("train", ["STORE"], "OUT")
    if launcher == "accelerate":
        assert Path(args.config_file).is_file()
        # This machine may lack GPUs or DeepSpeed, which are not part of the command.
        monkeypatch.setattr("accelerate.commands.launch.is_deepspeed_available", lambda: True)
        _validate_launch_command(args)


def test_a_wrong_argument_would_be_noticed(tmp_path):
    with pytest.raises(SystemExit):
        make_parser().parse_args(["train", "--store", "STORE", "--out", "OUT"])
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text((ROOT / "examples/accelerate/one_gpu.yaml").read_text() + "num_procs: 3\n")
    with pytest.raises(ValueError, match="num_procs"):
        load_config_from_file(str(wrong))


def test_two_processes_train_by_the_command_of_the_readme(tmp_path):
    make_store(tmp_path / "STORE")
    (command,) = [command for command in COMMANDS if "use_cpu" in command]
    _, *arguments = arguments_of(command)
    arguments = ["--standalone", *arguments, "--max-steps", "2", "--batch-size", "2"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    settings = json.loads((tmp_path / "OUT/checkpoint-2/slim_run.json").read_text())
    assert settings["documents_per_step"] == 2 * 2
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "OUT").config.vocab_size == 97
