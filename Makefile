# `make demo` trains, judges and draws a VAE on real data; `make test` passes the tests.
# Both set up .venv themselves, with the versions pinned in constraints.txt.

PYTHON ?= python3.11
BIN := .venv/bin
# of fourteen thousand modules most are never imported, and the others are compiled when they are
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt
RUN ?= runs/digits
PYTEST ?= --numprocesses auto --dist worksteal

.PHONY: demo docs test test-all check clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) torch
	$(INSTALL) --editable '.[dev]'
	touch $@

# networks this small train fastest on one thread, whatever else the machine does
demo: export OMP_NUM_THREADS = 1
demo: .venv/installed
	$(BIN)/pyro-vae train --data digits --binarize threshold --latent 2 --hidden 256,128 --epochs 100 --kl-warmup 20 \
		--patience 40 --batch-size 64 --out $(RUN) --overwrite
	$(BIN)/pyro-vae evaluate $(RUN) --num-samples 1000 --overwrite
	$(BIN)/pyro-vae plot $(RUN) --overwrite
	@echo
	@echo "Look at $(RUN)/figures; the numbers are in $(RUN)/metrics.csv and $(RUN)/evidence.npz."
	@echo "Type next: $(BIN)/pyro-vae train --help, or open notebooks/01_svi_script.ipynb."

# the pictures of the README
docs: demo
	mkdir -p docs
	cp $(RUN)/figures/manifold.png $(RUN)/figures/latent_map.png docs

test: .venv/installed
	$(BIN)/python -m pytest $(PYTEST)

# those that take a minute each as well
test-all: PYTEST += --slow
test-all: test

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
