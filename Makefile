# Two commands do all set-up: `make quickstart` runs the main job, `make test` passes the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart test soak parity gpu bench bench-gpu lint schema clean

quickstart: $(VENV)/.installed
	@$(BIN)/megascale quickstart

test: $(VENV)/.installed-test
	@$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder -m "not slow"

# Long fault runs, minutes to an hour; CI does not run them.
soak: $(VENV)/.installed-test
	@$(BIN)/python -m pytest -m slow

# Every layout against the plain loop, as a table; twenty minutes on two cores.
parity: $(VENV)/.installed-test
	@$(BIN)/python -m tests.dist.parity_table

# Needs a CUDA device; skipped without one.
gpu: $(VENV)/.installed-test
	@$(BIN)/python -m pytest tests/gpu

bench: $(VENV)/.installed-test
	@$(BIN)/python -m bench.step_overhead
	@$(BIN)/python -m bench.loader
	@$(BIN)/python -m bench.resume_cost
	@$(BIN)/python -m bench.tokenize
	@$(BIN)/python -m bench.checkpoint
	@$(BIN)/python -m bench.comm_volume
	@$(BIN)/python -m bench.memory
	@$(BIN)/python -m bench.schedule_trace

# Needs a CUDA device. Half an hour; `python -m bench.gpu --shape NAME` is one row of the table.
bench-gpu: $(VENV)/.installed-test
	@$(BIN)/python -m bench.gpu

lint: $(VENV)/.installed-test
	@$(BIN)/ruff check .

schema: $(VENV)/.installed
	@$(BIN)/megascale schema > configs/schema.json

clean:
	rm -rf $(VENV) build *.egg-info

$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.created pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	@touch $@ $(VENV)/.installed
