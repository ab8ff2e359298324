# Each target installs what it needs into .venv first. `make` alone lists them.
PYTHON ?= python3
HOME_DIR ?= demo
SBOM ?= sbom.json
BIN := .venv/bin

# What `make demo` may be given: DATA=folder TRAIN='stages.joint.steps=3000 …' HOME_DIR=folder HTTP_PORT=… and the other ports
demo_options = --home $(HOME_DIR) \
	$(if $(DATA),--data '$(DATA)') $(TRAIN:%=--train %) \
	$(if $(HTTP_PORT),--http-port $(HTTP_PORT)) $(if $(MLFLOW_PORT),--mlflow-port $(MLFLOW_PORT)) \
	$(if $(DASHBOARD_PORT),--dashboard-port $(DASHBOARD_PORT)) $(if $(GCS_PORT),--gcs-port $(GCS_PORT))

.DEFAULT_GOAL := help
.PHONY: help demo stop test check audit sbom docs bench-prepare bench-train bench-evaluate bench-index bench-encoder bench-serve chaos chaos-release soak fuzz paper-table install dev

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

demo: install ## from a catalogue to a search answered; DATA=folder for your own, HTTP_PORT=… and others
	@$(BIN)/python -m askew.demo up $(demo_options)

stop: ## end exactly what the demo started
	@if [ -x $(BIN)/python ]; then $(BIN)/python -m askew.demo stop --home $(HOME_DIR); fi

test: dev ## all tests, on a real Ray cluster, MLflow server and HTTP endpoint
	$(BIN)/python -m pytest

check: dev ## style, types, import layers, what bandit knows to be unsafe, and known weaknesses if OSV can be asked
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/bandit --quiet --configfile pyproject.toml --recursive platform jobs bench
	$(BIN)/python .ci/audit.py constraints.txt

audit: dev ## known weaknesses of the pinned versions; fails also where OSV cannot be asked
	$(BIN)/python .ci/audit.py constraints.txt --strict

sbom: install .venv/sbom ## what is installed, as a CycloneDX list; SBOM=sbom.json
	.venv/sbom/bin/cyclonedx-py environment --of JSON --output-reproducible --pyproject pyproject.toml -o $(SBOM) $(BIN)/python

docs: install ## write docs/configuration.md from the settings themselves
	@$(BIN)/python -m askew.reference docs/configuration.md

bench-prepare: install ## speed and memory of the prepare stage, as one line of JSON
	@$(BIN)/python bench/prepare.py

bench-train: .venv/installed-bench ## speed of the train stage against others', as one line of JSON
	@$(BIN)/python bench/train.py

bench-evaluate: install ## what ranking costs beyond a matrix product and its top-k, as one line of JSON
	@OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python bench/evaluate.py

bench-index: .venv/installed-bench ## the index against FAISS's HNSW, hnswlib, usearch and SVS, as one line of JSON
	@$(BIN)/python bench/index.py --plot docs/index.png $(OPTIONS)

bench-encoder: install ## the query encoder compiled and not; OPTIONS='--model folder --triplets folder'
	@$(BIN)/python bench/encoder.py $(OPTIONS)

bench-serve: .venv/installed-bench ## the endpoint under load, and its yardsticks, as one line of JSON; OPTIONS=--quick
	@$(BIN)/python bench/serve.py $(OPTIONS)

chaos-release: .venv/installed-bench ## move the alias a hundred times under load, as one line of JSON
	@$(BIN)/python bench/release.py $(OPTIONS)

chaos: .venv/installed-bench ## faults of every kind under load, on three nodes in namespaces; SEED=1, OPTIONS='--only kills'
	@$(BIN)/python bench/chaos.py $(if $(SEED),--seed $(SEED)) $(OPTIONS)

fuzz: .venv/installed-fuzz ## throw damaged and made-up input at what reads it, as one line of JSON; MINUTES=1 for each target
	@$(BIN)/python tests/fuzz/run.py $(if $(MINUTES),--minutes $(MINUTES)) $(OPTIONS)

soak: install ## half load with switches, changes and kills, as one line of JSON; MINUTES=60, SEED=1
	@$(BIN)/python bench/soak.py $(if $(MINUTES),--minutes $(MINUTES)) $(if $(SEED),--seed $(SEED)) $(OPTIONS)

paper-table: install ## both papers' rows under one budget, into docs/results.md; DATA=folder, and OPTIONS='--steps 600 …'
	@$(if $(DATA),,echo "askew: error: wanted a catalogue's folder; found none; give it as DATA=…" >&2; exit 2;) \
	$(BIN)/python bench/paper_table.py '$(DATA)' $(OPTIONS)

install: .venv/installed ## the package and what it needs, in .venv
dev: .venv/installed-dev ## and what checks and tests need

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -I platform/askew/preflight.py
	@echo "askew: installing into .venv (8.4 GB, three to five minutes, once)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

.venv/installed-dev: .venv/installed
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# apart: what it needs is found by jsonschema, and each process of Ray would start a second later
.venv/sbom: constraints.txt
	@$(PYTHON) -m venv $@
	@$@/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt cyclonedx-bom
	@touch $@

.venv/installed-fuzz: .venv/installed-dev
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[fuzz]'
	@touch $@

.venv/installed-bench: .venv/installed
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	@touch $@
