PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
DOCS := build/docs-venv
CXX_FILES := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.inc' -o -name '*.cu')

.PHONY: bench test check docs gpu sanitize format clean

bench: $(VENV)/.built
	$(BIN)/python bench/backward_speed.py

test: check $(VENV)/.built
	$(BIN)/python -m pytest -n 2 $(ARGS)

# What needs nothing compiled, the quickest first.
check: $(VENV)/.deps
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy

# The site, into build/site. It reads the sources without importing them: no torch in its environment.
docs: export NO_MKDOCS_2_WARNING = 1
docs: $(DOCS)/.deps
	$(DOCS)/bin/mkdocs build --strict

# For a machine with a GPU, as it is: installs nothing and needs no network.
gpu: export PYTHONPATH := $(CURDIR)
gpu:
	NEQ_CUDA=1 python3 setup.py -q build_ext --inplace
	python3 bench/gpu_check.py $(ARGS)

# The tests that reach compiled code, with every bad access and undefined operation an error; then the
# kernels' threads, with every race an error (tests/support/races.cpp). ./neq_kernels/_C is not
# instrumented, so nothing may put this folder before build/sanitize/lib: neither pytest's pythonpath
# nor `python -m`. tests/project/test_sanitize.py fails if something does.
SANITIZED := build/sanitize/lib
sanitize: $(VENV)/.deps build/sanitize/races
	rm -rf $(SANITIZED)
	NEQ_CUDA=0 CXXFLAGS="-g -fsanitize=address,undefined -fno-sanitize-recover=all" \
		$(BIN)/python setup.py -q build --build-base build/sanitize --build-lib $(SANITIZED)
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$(CURDIR)/$(SANITIZED):$(CURDIR) PYTHONSAFEPATH=1 \
		$(BIN)/pytest -o pythonpath= --capture=sys tests/project/test_sanitize.py \
		tests/kernels/step/test_native.py tests/kernels/step/test_ops.py \
		tests/kernels/similarity/test_native.py tests/optim/test_by_rows*.py \
		tests/kernels/wgrad/test_native.py tests/kernels/wgrad/test_pack_columns.py \
		tests/kernels/wgrad/test_zero_rows.py tests/kernels/wgrad/test_cuda_bindings.py \
		tests/kernels/wgrad/test_narrow.py::test_exact_however_cut \
		$(ARGS)
	build/sanitize/races

# Linked without libgomp: the file brings what of it the kernels need.
build/sanitize/races: tests/support/races.cpp $(shell find csrc -type f)
	rm -rf build/sanitize/threads
	mkdir -p build/sanitize/threads
	cd build/sanitize/threads && printf '%s\n' $(CURDIR)/csrc/cpu/*/*.cpp $(CURDIR)/tests/support/races.cpp | \
		xargs -P 2 -I{} c++ -std=c++20 -O2 -g -fopenmp -fno-math-errno -fsanitize=thread \
		-Wall -Wextra -c {}
	c++ -fsanitize=thread build/sanitize/threads/*.o -o $@

format: $(VENV)/.deps
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_FILES)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -f neq_kernels/_C.*.so
	find . -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.deps: requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) "$$(grep ^torch== requirements-dev.txt)"
	$(PIP) -r requirements-dev.txt
	touch $@

$(DOCS)/.deps: requirements-docs.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/pip install --quiet --disable-pip-version-check -r requirements-docs.txt
	touch $@

$(VENV)/.built: $(VENV)/.deps pyproject.toml setup.py $(shell find csrc -type f)
	CXXFLAGS=-Werror $(PIP) --no-build-isolation --no-deps -e .
	touch $@
