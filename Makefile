.PHONY: demo demo-memory test test-all lint bench figures clean

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

# In two processes side by side; then the slowest thirty tests of each, and the seconds of each folder.
test: lint
	$(BIN)/python tests/side_by_side.py --durations=30

# What make test leaves out too: every pair of layouts, and others that repeat what is tested; and every pool over gloo.
test-all: lint
	TESSERA_TEST_GLOO=1 $(BIN)/python tests/side_by_side.py --durations=30 -m ""

bench: $(INSTALLED)
	$(BIN)/python benchmarks/bench.py

# Every figure of docs/, in some minutes, most of them for `tessera count` and `tessera plan`.
INSPECT := $(BIN)/tessera inspect docs/figures/small.yaml

SHARED := $(INSPECT) --set tensor_parallel_size=1 --set context_parallel_size=4 --set context_parallel_mode=exchange \
    --set sequence_len=128 --set micro_batch_size=1

figures: $(INSTALLED)
	$(BIN)/python docs/figures/one_rule.py
	$(BIN)/python docs/figures/panels.py
	set -e; for mode in 1d 2d 2.5d 3d; do \
	    $(INSPECT) --set tensor_parallel_mode=$$mode --picture docs/figures/$$mode.svg > /dev/null; done
	$(INSPECT) --set tensor_parallel_mode=2d --set tensor_parallel_size=4 --set tensor_parallel_schedule=summa \
	    --picture docs/figures/summa.svg > /dev/null
	$(SHARED) --picture docs/figures/context-document.svg > /dev/null
	$(SHARED) --documents 20,6,50,32 --picture docs/figures/context-packed.svg > /dev/null
	$(BIN)/tessera count --output docs/figures > /dev/null
	rm docs/figures/scale.png
	$(BIN)/tessera plan 175B --scaling 8,16,32,64,128,256 --cluster Nx8xA100-80 --sequence-len 2048 --global-batch 512 \
	    --output docs/figures > /dev/null
	$(BIN)/tessera plan --tables --output docs/quoted-tables.md > /dev/null

clean:
	rm -rf build dist src/*.egg-info .pytest_cache .ruff_cache .mypy_cache
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
