# Everything starts here: `make demo` shows the package at work, `make test` proves it.
# A machine needs make, Python 3.11 or newer and (for torch.compile on a CPU) a C++ compiler; each target makes or
# reuses .venv and installs there what it lacks, pinned by constraints.txt.
#
#   make demo        fine-tune a Llama-3 debug model through lora_fx.compile; writes loss_curves.png
#   make test        lint beside the fast tests, then the slow ones: what CI runs
#   make test-fast   the tests to run while working (five to seven minutes on 2 cores)
#   make test-slow   the others
#   make test-gpu    tests/gpu, on a machine with a CUDA device
#   make test-gpu-memory  every kernel under compute-sanitizer's memory checker, there
#   make lint        ruff (lint and format) and mypy
#   make format      let ruff rewrite what it can
#   make docs        the reference as HTML pages, in build/docs
#   make bench       the CPU benchmark
#   make bench-gpu   both GPU benchmarks, on a machine with a CUDA device; writes examples/benchmarks/results/*.json
#   make clean       remove what builds and tools leave; `make distclean` removes .venv as well
#
# Variables:
#   PYTHON=python3.12   the interpreter that makes .venv (default: the first of the list below that is new enough)
#   PY=python           an interpreter that has everything already: nothing is installed, .venv is not used
#   TORCH_INDEX=auto    where torch comes from, see below; `none`, or the address of a package index
#   JOBS=4              processes that run the tests (default: one per core, at most 8)
#   ARGS="-k stack"     passed on to pytest, or to the program that the target runs

TORCH_INDEX ?= auto
VENV        ?= .venv
ARGS        ?=

# Python compiles what is imported when it is, and keeps it; most of what is installed never is.
export PYTHONDONTWRITEBYTECODE :=
pip := "$(VENV)/bin/python" -m pip install --no-compile

ifdef PY
ready =
else
PY    := $(VENV)/bin/python
ready = $(VENV)/.ready-$(1)
endif

# Most of a test's time goes to compiling, in one thread: a process per core, each with one thread and without helpers
# of its own, beats fewer processes with more. Measured: Inductor's pool of compile workers costs a tenth more than it
# gives on kernels this small.
pytest := OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 $(PY) -m pytest
spread := -n $(or $(JOBS),auto --maxprocesses 8) --dist worksteal

.PHONY: demo test test-fast test-slow test-gpu test-gpu-memory lint format docs bench bench-gpu clean distclean
.NOTPARALLEL:
.SUFFIXES:

demo: $(call ready,examples)
	$(PY) examples/finetune.py $(ARGS)

# Lint beside the fast tests: mypy takes half a minute in one thread, and tests leave a core alone now and then.
test: $(call ready,test)
	@mkdir -p build; $(MAKE) --no-print-directory lint >build/lint.log 2>&1 & lint=$$!; \
	trap 'kill $$lint 2>/dev/null' EXIT; trap 'exit 1' INT TERM; \
	$(MAKE) --no-print-directory test-fast; tests=$$?; \
	wait $$lint && tail -n 1 build/lint.log || { cat build/lint.log; exit 1; }; exit $$tests
	$(MAKE) --no-print-directory test-slow

test-fast: $(call ready,test)
	$(pytest) -m "not slow and not gpu" $(spread) $(ARGS)

test-slow: $(call ready,test)
	$(pytest) -m "slow and not gpu" $(spread) $(ARGS)

test-gpu: $(call ready,test)
	$(PY) -m pytest tests/gpu $(ARGS)

# Each tensor is an allocation of its own: a caching allocator would hide a read behind its end in the next one. Some
# kernels of cuBLAS ask whether they can run at all, which is no fault of theirs: calls that report an error are let be.
test-gpu-memory: $(call ready,test)
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 3 \
	  $(PY) -m pytest tests/gpu/test_kernels.py $(ARGS)

lint: $(call ready,test)
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy

format: $(call ready,test)
	$(PY) -m ruff check --fix
	$(PY) -m ruff format

# Sphinx writes a stub for each public name; those of names that are gone must go too.
docs: $(call ready,docs)
	rm -rf .docs/reference
	$(PY) -m sphinx -W --keep-going -q -d build/doctrees .docs build/docs
	@echo "build/docs/index.html"

bench: $(call ready,bench)
	$(PY) examples/benchmarks/cpu.py $(ARGS)

bench-gpu: $(call ready,bench)
	$(PY) examples/benchmarks/block.py --suite --budget 3600 --json examples/benchmarks/results/block.json $(ARGS)
	$(PY) examples/benchmarks/model.py --json examples/benchmarks/results/model.json

clean:
	rm -rf build dist .docs/reference .pytest_cache .mypy_cache .ruff_cache
	find lora_fx/ passes tests examples -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)

# ---- the environment ------------------------------------------------------------------------------------------------

# `.ready-examples` says that .venv has the package with its extra `examples`, and so on: the demo does not wait for
# what only the tests need. They take torchtitan's models alone, which is one small package: what else it names, for its
# data sets and dashboards, is 40 packages that nothing here runs.
$(VENV)/.ready-%: $(VENV)/.torch pyproject.toml
	@echo "installing lora_fx[$*] into $(VENV)"
	@$(pip) --quiet --constraint constraints.txt --editable ".[$*]"
	@test "$*" != test || $(pip) --quiet --constraint constraints.txt --no-deps torchtitan
	@touch $@
.PRECIOUS: $(VENV)/.ready-%

# torch by itself and first, because on Linux the torch of PyPI brings several GB of CUDA libraries along. Where no
# NVIDIA driver is found, the CPU builds of download.pytorch.org are offered beside what pip is set up to use; their
# version, 2.13.0+cpu, satisfies torch==2.13.0 and is preferred to it. That host is asked first and left out when it
# does not answer: pip would go on without it too, but only after eight seconds of retries for each package, and a
# machine behind a mirror (or with the wheel in a find-links folder) needs none of it. Only torch is looked up there.
$(VENV)/.torch: constraints.txt
	@python="$(PYTHON)"; \
	for candidate in python3 python python3.13 python3.12 python3.11 python3.14; do \
		test -z "$$python" || break; \
		"$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && python="$$candidate"; \
	done; \
	test -n "$$python" || { echo "lora_fx needs Python 3.11 or newer: none found, name one with PYTHON=..." >&2; exit 1; }; \
	echo "making $(VENV) with $$("$$python" --version)"; \
	"$$python" -m venv "$(VENV)"
	@command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || test -n "$$CXX" || \
		echo "warning: no C++ compiler found; torch.compile needs one to run on a CPU" >&2
	@index="$(TORCH_INDEX)"; \
	if [ "$$index" = auto ]; then \
		index=none; \
		if [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null; then \
			cpu=https://download.pytorch.org/whl/cpu; \
			"$(VENV)/bin/python" -c "import urllib.request as r; r.urlopen('$$cpu/torch/', timeout=5)" 2>/dev/null \
				&& index=$$cpu || echo "$$cpu does not answer: taking torch from where pip is set up to look"; \
		fi; \
	fi; \
	set -- --constraint constraints.txt --no-deps torch; \
	test "$$index" = none || set -- --extra-index-url "$$index" "$$@"; \
	$(pip) "$$@"
	@touch $@
