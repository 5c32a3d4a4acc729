PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
CXX_FILES := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.inc' -o -name '*.cu')

.PHONY: bench test gpu sanitize format clean

bench: $(VENV)/.built
	$(BIN)/python bench/backward_speed.py

test: $(VENV)/.built
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python -m pytest -n 2 $(ARGS)

# For a machine with a GPU, as it is: installs nothing and needs no network.
gpu: export PYTHONPATH := $(CURDIR)
gpu:
	NEQ_CUDA=1 python3 setup.py -q build_ext --inplace
	python3 bench/gpu_check.py $(ARGS)

# The tests that reach compiled code, with every bad access and undefined operation an error; then the
# kernels' threads, with every race an error (tests/support/races.cpp).
sanitize: export CXXFLAGS = -g -fsanitize=address,undefined -fno-sanitize-recover=all
sanitize: $(VENV)/.deps build/sanitize/races
	NEQ_CUDA=0 $(BIN)/python setup.py -q build --build-base build/sanitize --build-lib build/sanitize/lib
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=build/sanitize/lib:$(CURDIR) PYTHONSAFEPATH=1 \
		$(BIN)/python -m pytest -o pythonpath= --capture=sys tests/kernels/step/test_native.py \
		tests/kernels/step/test_ops.py tests/kernels/similarity/test_native.py tests/optim/test_by_rows*.py \
		tests/kernels/wgrad/test_native.py tests/kernels/wgrad/test_pack_columns.py \
		tests/kernels/wgrad/test_zero_rows.py tests/kernels/wgrad/test_cuda_bindings.py \
		tests/kernels/wgrad/test_narrow.py::test_exact_however_cut \
		$(ARGS)
	build/sanitize/races

# Linked without libgomp: the file brings what of it the kernels need.
build/sanitize/races: tests/support/races.cpp $(shell find csrc -type f)
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

$(VENV)/.built: $(VENV)/.deps pyproject.toml setup.py $(shell find csrc -type f)
	CXXFLAGS=-Werror $(PIP) --no-build-isolation --no-deps -e .
	touch $@
