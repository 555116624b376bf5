# Two commands: `make demo` shows a language model being aligned, `make test` runs the fast tests.
# Both make the virtual environment .venv first. PYTHON=python3.12 make demo uses another Python (3.11 to 3.13).

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CPU_TORCH := https://download.pytorch.org/whl/cpu

.PHONY: demo test test-slow mutants docs lint format clean

demo: $(VENV)/base
	$(BIN)/rlhf-example --create-dummy-data

test: $(VENV)/dev
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

test-slow: $(VENV)/dev
	$(BIN)/python -m pytest -m slow

mutants: $(VENV)/dev
	$(BIN)/python tests/mutants.py

docs: $(VENV)/dev
	$(BIN)/python -m sphinx -n -W --keep-going -q -b html docs build/docs
	@echo "build/docs/index.html"

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build docs/reference/api docs/tutorials *.egg-info .pytest_cache .mypy_cache .ruff_cache

# Without an NVIDIA GPU, PyTorch's own index has a build without several GB of CUDA; where it cannot be reached, or
# has none for this machine, the next line takes what the default index has.
$(VENV)/base: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	@command -v nvidia-smi >/dev/null || [ "$$(uname)" != Linux ] || \
		$(BIN)/python -m pip install -q --retries 0 --timeout 10 --index-url $(CPU_TORCH) "torch>=2.11,<2.14" 2>/dev/null || true
	$(BIN)/python -m pip install -q -e .
	@touch $@

$(VENV)/dev: $(VENV)/base
	$(BIN)/python -m pip install -q -e ".[dev]"
	@touch $@
