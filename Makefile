# make demo     set up, then run the main job on two synthetic subjects
# make test     set up, then run the tests (up to 35 minutes on two cores)
# make test-all also the slow ones; make check: ruff, mypy, import-linter
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
QUICK := tests/unit tests/golden
# a process a core, but four at most: each takes 1.3 GB
SIDE_BY_SIDE := -n logical --maxprocesses 4 --dist loadfile
# two whole jobs at once: one waits for its processes to start while the other computes
TWO := -n 2 --dist loadfile
suites = failed=0; for tests in "$(QUICK) $(SIDE_BY_SIDE)" "tests/local $(2)" tests/gpu; do \
	echo "pytest $$tests" $(subst ",',$(1)); $(BIN)/python -m pytest $$tests $(1) || failed=1; done; exit $$failed
DEMO_SET := --set preprocess.portrait_size=256 --set preprocess.synthetic_frames=600 --set avatar_training.steps=700 --set ynet_training.steps=250

.PHONY: setup demo test test-all check format clean

setup: $(VENV)/.installed

$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "lavatar needs Python 3.11: install it, or name it: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	@echo "Setting up $(VENV) (about 3 GB, 2 to 4 minutes); log: $(VENV)/install.log"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade pip > $(VENV)/install.log 2>&1 && \
	 $(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]' >> $(VENV)/install.log 2>&1 || \
	 { tail -n 25 $(VENV)/install.log; echo "The installation failed; the whole log is in $(VENV)/install.log"; exit 1; }
	@$(BIN)/lavatar doctor
	@touch $@

demo: setup
	$(BIN)/lavatar subjects add --synthetic 0 ada
	$(BIN)/lavatar subjects add --synthetic 1 bruna
	$(BIN)/lavatar submit --avatar ada --actor bruna --recipe tiny $(DEMO_SET)

test: setup
	@$(call suites,-m "not slow",$(TWO))

test-all: setup
	@$(call suites,,)

check: setup
	$(BIN)/ruff check lavatar tests benchmarks
	$(BIN)/ruff format --check lavatar tests benchmarks
	$(BIN)/mypy lavatar
	PYTHONPATH=. $(BIN)/lint-imports --config setup.cfg

format: setup
	$(BIN)/ruff check --fix lavatar tests benchmarks
	$(BIN)/ruff format lavatar tests benchmarks

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
