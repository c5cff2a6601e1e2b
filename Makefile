# tierd: `make demo` runs the main job end to end, `make test` every check, `make bench` the benchmarks.
PYTHON ?= python3
SIZE ?= full
MODEL ?=
ONLY ?=
SECONDS ?= 60
PROCESSES ?= auto
WHEELS ?=
MODELS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.tierd-installed
MODULES := _cpu _encode
NATIVE := $(wildcard kernels/cpu/*) kernels/CMakeLists.txt

.PHONY: help venv test check pytest sanitize fuzz demo bench gpu-acceptance gpu-resources ptx stub clean

help:
	@echo "make demo      environment, build, and the main job end to end (SIZE=small, MODEL=path)"
	@echo "make test      every check: make check, the tests, make sanitize, a small demo (PROCESSES=auto, at most 4)"
	@echo "make bench     all benchmarks (ONLY=name for one)"
	@echo "make check     format, lint, types, import layers, the kernel stub"
	@echo "make sanitize  the kernels' tests with AddressSanitizer and UBSan in the C++ modules"
	@echo "make fuzz      hostile files, guided by coverage, sanitized (SECONDS=60; findings: build/fuzz)"
	@echo "make gpu-acceptance   on a node with a GPU, offline, 8 minutes (WHEELS=folder, MODELS=folder, ONLY='part ...')"
	@echo "make gpu-resources    the Triton kernels compiled for three processors, their needs recorded (3 minutes)"
	@echo "make ptx       the Triton kernels' tests on their compiled form, executed without a GPU (10 minutes)"
	@echo "make venv      the environment alone"

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
	@for module in $(MODULES); do \
	    $(BIN)/python -m nanobind.stubgen -q -m tierd_kernels.$$module -o build/$$module.pyi && \
	    diff -u kernels/tierd_kernels/$$module.pyi build/$$module.pyi || exit 1; \
	done

# A file stays with one process: its daemons and packs are made once, and no two of its tests meet.
pytest: $(STAMP)
	$(BIN)/python -m pytest -q -n $(PROCESSES) --maxprocesses 4 --dist loadfile

test: check pytest
	$(MAKE) sanitize
	$(MAKE) demo SIZE=small

sanitize: $(STAMP)
	tools/sanitize

fuzz: $(STAMP)
	@$(BIN)/python -c 'import atheris' || { echo "make fuzz needs atheris: $(BIN)/pip install -e '.[fuzz]'"; exit 1; }
	@mkdir -p build/fuzz/corpus
	$(BIN)/python tests/fuzz/fuzz_pack.py build/fuzz/corpus -max_total_time=$(SECONDS) \
	    -timeout=60 -rss_limit_mb=4096 -artifact_prefix=build/fuzz/
	tools/sanitize $(BIN)/python tests/fuzz/fuzz_pack.py --replay build/fuzz/corpus

demo: $(STAMP)
	$(BIN)/python -m tierd_tools.demo --size $(SIZE) $(if $(MODEL),--model '$(MODEL)')

bench: $(STAMP)
	$(BIN)/python -m tierd_tools.bench $(ONLY)

# With the Python that has the node's packages: no environment is made, nothing is fetched.
gpu-acceptance:
	@PYTHONPATH=tools '$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))' \
	    -m tierd_tools.gpu_acceptance $(if $(WHEELS),--wheels '$(WHEELS)') $(if $(MODELS),--models '$(MODELS)') \
	    $(if $(ONLY),--only '$(ONLY)')

# The records that tests/kernels/gpu/test_compiled.py holds the kernels to.
gpu-resources: $(STAMP)
	@mkdir -p build
	env -u TRITON_INTERPRET $(BIN)/python -m tierd_kernels.gpu.compiled > build/resources.json
	mv build/resources.json tests/kernels/gpu/resources.json

# What Triton compiles for these processors, run by tests/kernels/gpu/ptx: every recorded variant, and
# the tests that run elsewhere on a GPU or under the interpreter. Expansions are the same for all.
ptx: $(STAMP)
	@for device in sm_80 sm_90 sm_100; do \
	    TIERD_KERNELS_DEVICE=$$device $(BIN)/python -m pytest -q \
	        tests/kernels/gpu/test_compiled_runs.py tests/kernels/gpu/test_linear.py || exit 1; \
	done
	@TIERD_KERNELS_DEVICE=sm_90 $(BIN)/python -m pytest -q tests/kernels/gpu/test_expand.py

stub: $(STAMP)
	@for module in $(MODULES); do \
	    $(BIN)/python -m nanobind.stubgen -q -m tierd_kernels.$$module \
	        -o kernels/tierd_kernels/$$module.pyi || exit 1; \
	done

clean:
	rm -rf build
