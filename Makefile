# Every target works from a fresh clone: `.venv` is made when it is missing. Try `make help`.
PIP_ARGS ?=
BIN := .venv/bin
PY := $(BIN)/python
READY := .venv/.installed
WORKERS ?= 2
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help book test lab docs bench results export preview quarto

help: ## this list
	@sed -n 's/^\([a-z]*\):[^#]*## /\1|/p' Makefile | awk -F'|' '{ printf "make %-9s %s\n", $$1, $$2 }'

$(READY): pyproject.toml constraints.txt
	@sh .ci/venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) --constraint constraints.txt --editable ".[dev,peers,gpu]"
	@touch $@

book: $(READY) ## execute every chapter into _book/, as pages, and print the scoreboard (downloads no data)
	@$(PY) .ci/execute.py
	@$(PY) .ci/preview.py _book
	@$(PY) .ci/scoreboard.py

test: $(READY) ## is the export in sync, do the tests pass, do all notebooks reproduce
	@$(PY) .ci/export.py
	@$(ONE_THREAD) $(PY) -m pytest --nbval -n $(WORKERS) --dist loadfile

lab: $(READY) ## open JupyterLab on nbs/; notebooks are cleaned when they are saved
	@$(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) --ServerApp.root_dir=nbs --FileContentsManager.pre_save_hook=nbdev.clean.clean_jupyter

docs: quarto $(READY) ## render the site into _docs/ (needs Quarto)
	@find nbs -name '*.ipynb' -exec touch {} + # Quarto's cache looks at these times only
	PATH="$(CURDIR)/$(BIN):$$PATH" quarto render

quarto:
	@command -v quarto >/dev/null || { echo "make docs needs Quarto 1.5 or newer: install it from https://quarto.org/docs/get-started/ (or use make preview, which does without)" >&2; exit 1; }

bench: $(READY) ## time fairbook beside its peers, one thread, into benchmarks/results/; make bench CH=ch01 for one chapter
	@mkdir -p benchmarks/results
	@for f in benchmarks/bench_$(CH)*.py; do c=$${f#benchmarks/bench_}; \
		$(ONE_THREAD) $(PY) -m pytest $$f -o addopts= -p no:xdist -q --benchmark-columns=min,median,rounds --benchmark-json=benchmarks/results/$${c%.py}.json || exit 1; done

results: $(READY) ## make results CH=ch01: redo the stored figures of a chapter
	@test -n "$(CH)" || { echo "which chapter? make results CH=ch01" >&2; exit 1; }
	@ls nbs/$(CH)*.ipynb >/dev/null
	$(ONE_THREAD) FAIRBOOK_RECORD=1 $(PY) .ci/execute.py nbs/$(CH)*.ipynb
	@$(PY) .ci/execute.py nbs/scoreboard.ipynb
	@$(BIN)/nbdev_clean

export: $(READY) ## write fairbook/ from the notebooks, and clean them
	@$(BIN)/nbdev_export
	@$(BIN)/nbdev_clean

preview: $(READY) ## every notebook as a page in _preview/, without Quarto
	@$(PY) .ci/preview.py nbs _preview
