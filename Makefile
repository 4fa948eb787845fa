.PHONY: demo demo-memory test lint bench clean

BIN := .venv/bin
INSTALLED := .venv/.installed

# torch is pinned by constraints.txt, so that no newer one (with other GPU packages) is taken in its place.
$(INSTALLED): pyproject.toml constraints.txt
	python3 -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

.venv: $(INSTALLED)

demo: $(INSTALLED)
	$(BIN)/tessera demo

demo-memory: $(INSTALLED)
	$(BIN)/tessera demo-memory

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/pytest

bench: $(INSTALLED)
	$(BIN)/python benchmarks/bench.py

clean:
	rm -rf build dist src/*.egg-info .pytest_cache .ruff_cache .mypy_cache
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
