# make demo   the main job on this machine: a coordinator and three volunteers train a small model
# make test   the tests (ARGS="-m slow": those that take minutes each)
# make lint   format, lint, types             make bench      the benchmarks
# Each sets up .venv by itself, once, and again only when the requirements change.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test lint format bench clean

demo: $(READY)
	$(BIN)/kantha demo $(ARGS)

test: $(READY)
	$(BIN)/pytest $(ARGS)

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY)
	for file in benchmarks/*.py; do $(BIN)/python $$file $(ARGS) || exit 1; done

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "Kantha needs Python 3.11, 3.12 or 3.13; say which one: make PYTHON=python3.12 …" >&2; exit 1; }
	@echo "setting up .venv (some minutes the first time: PyTorch is large) …"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,dev,duplicates,evaluate,postgresql]'
	@touch $@
