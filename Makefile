# Every target makes and reuses .venv by itself; nothing else is installed.
#
#   make walkthrough                          all notebooks on the sandbox, then the table of results
#   make walkthrough PARAMS=params/mine.yaml  the same for any params file (SEED=1 RUN=name CORES=4)
#   make lab                                  JupyterLab on the notebooks
#   make test, make lint                      what the continuous integration runs
#   make clean                                delete all runs and caches (make distclean: .venv too)

PYTHON ?= python3
VENV ?= .venv
PARAMS ?= params/sandbox.yaml
CORES ?= 2
SEED ?=
RUN ?=

BIN := $(VENV)/bin
READY := $(VENV)/.spkit-installed

.PHONY: walkthrough test lint lab clean distclean

# --nolock: a killed run would leave a lock behind, and the next one is to go on from there
walkthrough: $(READY)
	$(BIN)/snakemake --cores $(CORES) --rerun-incomplete --nolock --quiet progress host reason --config \
	  params=$(PARAMS) $(if $(SEED),seed=$(SEED)) $(if $(RUN),run_name=$(RUN))
	$(BIN)/python -m spkit.summary $(PARAMS) \
	  $(if $(SEED),--seed $(SEED)) $(if $(RUN),--run-name $(RUN))

test: $(READY)
	$(BIN)/python -m pytest --cov

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(if $(wildcard notebooks/*.ipynb),$(BIN)/nbstripout --verify $(wildcard notebooks/*.ipynb))

lab: $(READY)
	$(BIN)/jupyter lab --notebook-dir=. --LabApp.default_url=/lab/tree/notebooks

clean:
	find outputs -mindepth 1 -maxdepth 1 ! -name README.md -exec rm -rf {} +
	rm -rf .snakemake .pytest_cache .ruff_cache .hypothesis .coverage htmlcov build dist

distclean: clean
	rm -rf $(VENV) *.egg-info

# installed again whenever the dependencies change
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[run,dev]'
	touch $@
