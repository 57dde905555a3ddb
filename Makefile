BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test test-all bench lint clean

demo: $(READY)
	$(BIN)/scclip-fast segment --model scenes --no-multi-level --short-side 224 --compare --json --force --out demo
	$(BIN)/scclip-fast lof --model scenes --force --out demo/lof.png

# In the files' own order: those of few but long tests would otherwise come last, on one core.
PYTEST := $(BIN)/pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

test: lint
	$(PYTEST) -m "not slow"

# Adds the tests marked slow: other GPUs to compile for, other processes, whole models. CI runs it.
test-all: lint
	$(PYTEST)

bench: $(READY)
	$(BIN)/pytest --benchmark

lint: $(READY)
	$(BIN)/ruff check --quiet
	$(BIN)/ruff format --check --quiet
	$(BIN)/mypy --no-error-summary

clean:
	rm -rf .venv build dist *.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache demo
	find . -name __pycache__ -prune -exec rm -rf {} +

# One resolve, so that pip picks a torchvision that fits its torch.
$(READY): setup.py
	@echo "Setting up .venv; the first time downloads PyTorch and takes a few minutes."
	python3 -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[test,lint]"
	touch $@
