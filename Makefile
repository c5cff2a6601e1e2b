# tierd: `make demo` runs the main job end to end, `make test` every check, `make bench` the benchmarks.
PYTHON ?= python3
SIZE ?= full
MODEL ?=
ONLY ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.tierd-installed
NATIVE := $(wildcard kernels/cpu/*) kernels/CMakeLists.txt

.PHONY: help venv test check pytest demo bench stub clean

help:
	@echo "make demo    environment, build, and the main job end to end (SIZE=small, MODEL=path)"
	@echo "make test    every check: make check, the tests, a small demo"
	@echo "make bench   all benchmarks (ONLY=name for one)"
	@echo "make check   format, lint, types, import layers, the kernel stub"
	@echo "make venv    the environment alone"

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt $(NATIVE)
	@tools/prerequisites $(PYTHON)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt \
	    "scikit-build-core>=1.0" "nanobind>=3.0" "cmake>=3.25" ninja
	$(BIN)/python -m pip install --quiet --no-build-isolation -c constraints.txt -e '.[dev]'
	@touch $@

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@mkdir -p build
	@$(BIN)/python -m nanobind.stubgen -q -m tierd_kernels._cpu -o build/_cpu.pyi && \
	    diff -u kernels/tierd_kernels/_cpu.pyi build/_cpu.pyi

pytest: $(STAMP)
	$(BIN)/python -m pytest -q

test: check pytest
	$(MAKE) demo SIZE=small

demo: $(STAMP)
	$(BIN)/python -m tierd_tools.demo --size $(SIZE) $(if $(MODEL),--model '$(MODEL)')

bench: $(STAMP)
	$(BIN)/python -m tierd_tools.bench $(ONLY)

stub: $(STAMP)
	$(BIN)/python -m nanobind.stubgen -q -m tierd_kernels._cpu -o kernels/tierd_kernels/_cpu.pyi

clean:
	rm -rf build
