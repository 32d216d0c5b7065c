# SPDX-License-Identifier: Apache-2.0
# make train    set up .venv, build, train the default recipe (digits), print its WER
# make test     set up .venv, build, run the whole test suite
# make bench    build the other projects' losses, run every benchmark suite, write build/benchmarks
# make lint     check style and types
# make docs     build the documentation site in build/site
# make soak     run the slow checks: mutated kernels, all CUDA architectures, fuzzing; takes hours
# make wheels   build and audit a wheel for each Python that is found, in dist/cpu and dist/cuda
# make release-assets  train the default recipe and write its model and card to dist/release
# make gpu-kit  download everything that a GPU machine without network needs, into .gpu_kit
# make clean    remove .venv and all build results (trained models in outputs/ stay)
#
# ARGS is passed to the command: make train ARGS="loss=torchaudio seed=2",
# make test ARGS="-k joiner", make bench SUITES="loss step" ARGS="--threads 2 --lattice peaky".

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PEERS := build/peers
RESULTS := build/benchmarks
WORKERS ?= --numprocesses=auto --maxprocesses=4 --dist=loadfile  # empty for one process
SUITES ?= loss step pruned decode memory scaling accuracy
# The sources of the compiled module and the metadata. Python files are used in place.
SOURCES := pyproject.toml setup.py CMakeLists.txt transducer_toolkit/_version.py \
           $(filter-out csrc/tests csrc/emulation,$(wildcard csrc/*))

.PHONY: train test bench lint docs soak wheels release-assets gpu-kit clean
.DELETE_ON_ERROR:

train: $(INSTALLED)
	$(BIN)/transducer-train $(ARGS)

test: $(INSTALLED)
	$(BIN)/python -m pytest $(WORKERS) $(ARGS)

bench: $(PEERS)/.installed
	@for suite in $(SUITES); do \
	  $(BIN)/python -m benchmarks.run --suite $$suite --peers-dir $(PEERS) \
	    --json $(RESULTS)/$$suite.json --plot $(RESULTS)/$$suite.png $(ARGS) || exit 1; \
	done

lint: $(INSTALLED)
	$(BIN)/python -m pip install --quiet 'ruff>=0.8' 'mypy>=1.13' 'clang-format==19.1.7'
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.inl' | \
	  xargs $(BIN)/clang-format --dry-run --Werror

docs: $(INSTALLED)
	$(BIN)/python -m pip install --quiet 'mkdocs-material>=9.5,<10' 'mkdocstrings[python]>=0.30,<2' 'ruff>=0.8'
	$(BIN)/python -m benchmarks.lattice_picture docs/images/lattice.png --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(ARGS)

# Checks that the tests notice the removal of any barrier, that no kernel spills registers, and that
# the tests catch seeded defects. Then fuzzes the inputs and kills trainings. Takes hours.
soak: $(INSTALLED)
	$(BIN)/python -m tests.mutate_barriers
	$(BIN)/python csrc/kernel_report.py
	$(BIN)/python -m tests.soak.mutants
	$(BIN)/python -m tests.soak.fuzz_inputs --cases 20000
	$(BIN)/python -m tests.soak.fuzz_files --cases 3000
	$(BIN)/python -m tests.soak.fuzz_numerics --cases 400
	$(BIN)/python -m tests.soak.fuzz_numerics --cases 40 --large
	$(BIN)/python -m tests.soak.fuzz_precision --cases 2000
	$(BIN)/python -m tests.soak.kill_and_resume --kills 20
	csrc/tests/fuzz.sh build/fuzz -max_total_time=900

# TEST=test installs each into an empty environment and tests the losses there.
wheels:
	.ci/wheels $(TEST)

release-assets: $(INSTALLED)
	$(BIN)/python recipes/digits/release_assets.py $(ARGS)

gpu-kit: $(INSTALLED)
	bash benchmarks/gpu/prepare.sh

clean:
	rm -rf $(VENV) .gpu_kit build dist *.egg-info transducer_toolkit/_C.*.so

# A project that cannot be built is reported once, and gets a row in every table.
$(PEERS)/.installed: benchmarks/install_peers.py $(INSTALLED)
	$(BIN)/python -m pip install --quiet pybind11 cmake 'setuptools<82' wheel
	$(BIN)/python benchmarks/install_peers.py --target $(PEERS)
	@touch $@

$(INSTALLED): $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "error: Python >= 3.10 is needed, $(PYTHON) is `$(PYTHON) --version`;" \
	         "try make PYTHON=python3.11"; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || \
	  { echo "error: a C++17 compiler is needed (Debian, Ubuntu: apt-get install g++)"; exit 1; }
	@echo "== 1/2 virtual environment in $(VENV)"
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV) || \
	  { echo "error: python -m venv failed (Debian, Ubuntu: apt-get install python3-venv)"; exit 1; }
	@echo "== 2/2 packages (about 5 GB with torch) and the compiled module; takes a few minutes"
	$(BIN)/python -m pip install --disable-pip-version-check --editable '.[all]'
	@touch $@
	@$(BIN)/python -m transducer_toolkit
