# Every target makes and reuses .venv by itself; nothing else is installed.
#
#   make walkthrough                          all notebooks on the sandbox, then the table of results
#   make walkthrough PARAMS=params/mine.yaml  the same for any params file (SEED=1 RUN=name CORES=4)
#   make real                                 a real language model: alignment, all notebooks
#   make real BUDGET=full                     held-out backbones: the table in docs/real.md
#   make seeds                                the walkthrough for seeds 0 to 4: means and intervals
#   make experiment                           all methods, ablations and sweeps: tables, notebook 05
#   make experiment BUDGET=full JOBS=2        with more seeds and trials: what the README shows
#   make report TABLES=docs/experiment        the tables of a finished experiment as markdown
#   make publish                              the full experiment's tables into docs/ and README
#   make backbone                             train the shipped sandbox backbone again, by its recipe
#   make bench                                every stage beside its peer and its limit (25 minutes)
#   make bench SMALL=1                        the smallest sizes, against the published figures
#   make publish-bench                        a finished one into docs/speed.md
#   make lab                                  JupyterLab on the notebooks
#   make docs                                 the site, into site/: pages, executed notebooks, reference
#   make test, make lint                      what the continuous integration runs
#   make test-slurm                           a sweep on a SLURM of two nodes, one of which dies
#   make fuzz                                 20,000 wrong patch files and checkpoints (FILES=200000)
#   make test-kills                           an experiment, killed 20 times: its tables are the same
#   make clean                                delete all runs and caches (make distclean: .venv too)

PYTHON ?= python3
VENV ?= .venv
PARAMS ?= params/sandbox.yaml
CORES ?= 2
SEED ?=
SEEDS ?= 0 1 2 3 4
RUN ?=
BUDGET ?= quick
JOBS ?= 2
FILES ?= 20000
REAL := params/smollm2-135m.yaml
HELD_OUT ?= 0 1 2
XSTEST ?=
OKTEST ?=
TABLES ?= docs/experiment

BIN := $(VENV)/bin
READY := $(VENV)/.spkit-installed

.PHONY: docs solutions walkthrough real publish-real bench publish-bench seeds experiment report publish backbone test test-kills fuzz lint lab clean distclean

walkthrough: $(READY)
	$(BIN)/spkit run $(PARAMS) --cores $(CORES)$(if $(SEED), --seed $(SEED))$(if $(RUN), --run-name $(RUN))

# XSTEST=file.csv and OKTEST=file.csv: the published over-safety prompts, where you have them
comma := ,
EXTRA := $(if $(XSTEST),-o data.sources.xstest.path=$(XSTEST)) $(if $(OKTEST),-o data.sources.oktest.path=$(OKTEST))
NAMED := $(if $(XSTEST),$(comma) xstest)$(if $(OKTEST),$(comma) oktest)
EVALUATION := $(if $(NAMED),-o "data.evaluation=[advbench$(comma) over_safety$(comma) rho$(NAMED)]")

real: $(READY)
ifeq ($(BUDGET),full)
	$(BIN)/spkit study $(REAL) $(HELD_OUT) $(EVALUATION) $(EXTRA)
else
	$(BIN)/spkit run $(REAL) --cores $(CORES)$(if $(SEED), --seed $(SEED)) $(EVALUATION) $(EXTRA)
endif

# after a full one: its tables become the committed ones, and the pages that show them are filled
publish-real: $(READY)
	mkdir -p docs/smollm2
	cd outputs/smollm2-135m/study/tables && cp rates.csv differences.csv skills.csv about.csv ../../../../docs/smollm2/
	$(BIN)/python -m spkit.study.continual outputs/smollm2-135m/seed-0 docs/smollm2/continual.csv
	$(BIN)/python -m spkit.study.report docs/smollm2 README.md docs/real.md

seeds: $(READY)
	$(BIN)/spkit seeds $(PARAMS) $(SEEDS) --cores $(CORES) $(if $(RUN),--run-name $(RUN))

# resumes after an interruption, and ends with notebook 05 executed on the new tables
experiment: $(READY)
	$(BIN)/spkit experiment $(PARAMS) --budget $(BUDGET) --jobs $(JOBS)

report: $(READY)
	@$(BIN)/spkit report $(TABLES)

# after a full experiment: its tables become the committed ones, and the pages that show them are filled
publish: $(READY)
	mkdir -p docs/experiment && cp outputs/experiment/full/tables/*.csv docs/experiment/
	$(BIN)/spkit report docs/experiment > docs/experiment/report.md
	$(BIN)/spkit report docs/experiment --into README.md --into docs/results.md --into docs/choosing.md

backbone: $(READY)
	$(BIN)/python -m spkit.sandbox.ship $(PARAMS)

# a file of tests stays in one process, whose fixtures it shares; files with few tests can be long.
# One thread in each process: small matrices are faster so, and the processes share the cores
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --cov -n $(CORES) --dist loadfile --no-loadscope-reorder

test-kills: $(READY)
	$(BIN)/python tests/comparison/killed_at_random.py

# skipped with a reason where Debian's slurm-wlm and munge are missing; log in outputs/test-slurm
test-slurm: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python tests/cluster/slurm_on_loopback.py

# what is found is kept in outputs/fuzz
fuzz: $(READY)
	PYTHONPATH=tests $(BIN)/python tests/patchfile/fuzz_patchfile.py --files $(FILES) --keep outputs/fuzz

# peers are installed into outputs/bench/peers; without a network their rows are left out
bench: $(READY)
ifdef SMALL
	$(BIN)/spkit bench importance top_sets evaluation apply growth --small --threads 1 --out outputs/bench-small
	-$(BIN)/spkit bench --compare docs/bench/small.json outputs/bench-small/bench.json --threshold 0.5
else
	$(BIN)/spkit bench --peers
endif

publish-bench: $(READY)
	mkdir -p docs/bench && cp outputs/bench/bench.json docs/bench/bench.json
	cp outputs/bench/ratios.png docs/figures/bench_ratios.png && cp outputs/bench/growth.png docs/figures/bench_growth.png
	$(BIN)/python -m spkit.bench.publish docs/bench/bench.json docs/speed.md

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/nbstripout --verify $(wildcard notebooks/*.ipynb notebooks/solutions/*.ipynb)

lab: $(READY)
	$(BIN)/jupyter lab --notebook-dir=. --LabApp.default_url=/lab/tree/notebooks

clean:
	find outputs -mindepth 1 -maxdepth 1 ! -name README.md -exec rm -rf {} +
	rm -rf .snakemake .pytest_cache .ruff_cache .hypothesis .coverage htmlcov build dist site

distclean: clean
	rm -rf $(VENV) *.egg-info

# installed again whenever the dependencies change
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[all]'
	touch $@

# ---- the site ----

# a walkthrough and solutions that are there already are not run again
docs: $(READY)
	$(MAKE) walkthrough PARAMS=params/sandbox.yaml SEED=0 RUN=sandbox
	$(MAKE) solutions
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "The site is in site/: open site/index.html"

LOG := outputs/sandbox/seed-0/log
solutions: $(patsubst notebooks/%,$(LOG)/%,$(wildcard notebooks/solutions/*.ipynb))

# the walkthrough leaves the second
$(LOG)/solutions/%.ipynb: notebooks/solutions/%.ipynb $(LOG)/%.ipynb | $(READY)
	mkdir -p $(@D)
	$(BIN)/papermill -k python3 --log-level WARNING $< $@ || { rm -f $@; exit 1; }
