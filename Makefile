# Targets make .venv first (about 2 minutes).
PYTHON ?= python3
PY = .venv/bin/python
THREADS = OMP_NUM_THREADS=1 # of each of the two processes that run the tests

demo: .venv/installed # from a fresh clone to a results table
	$(PY) -m data.demo datasets/demo
	$(PY) sweep.py configs/sweeps/demo.yaml

test: .venv/developer # the tests, but for the slow ones
	$(THREADS) $(PY) -m pytest -n 2 --dist worksteal -m "not slow"

test-all: .venv/developer # all tests
	$(THREADS) $(PY) -m pytest -n 2 --dist worksteal

lint: .venv/developer # rules and format of the code
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

types: .venv/developer # mypy, basic; pyproject.toml says of which files
	.venv/bin/mypy

bench: .venv/installed # every speed claim
	$(PY) -m benchmarks.coreset
	$(PY) -m benchmarks.defects
	$(PY) -m benchmarks.dino_loss
	$(PY) -m benchmarks.knn
	$(PY) -m benchmarks.landscape
	$(PY) -m benchmarks.loading datasets/demo/scavport
	$(PY) -m benchmarks.neighbor
	$(PY) -m benchmarks.padim
	$(PY) -m benchmarks.predict
	$(PY) -m benchmarks.subspace
	$(PY) -m benchmarks.train_step
	$(PY) -m benchmarks.classifier_step
	$(PY) -m benchmarks.views
	$(PY) -m benchmarks.aupro
	$(PY) -m benchmarks.corruptions

tensorboard: .venv/installed # the curves of all runs
	.venv/bin/tensorboard --logdir runs

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q -r requirements.txt
	touch $@

.venv/developer: requirements-dev.txt .venv/installed
	.venv/bin/pip install -q -r requirements-dev.txt
	touch $@

.PHONY: demo test test-all lint types bench tensorboard
