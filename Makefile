# make demo: from a fresh clone to a results table. make test: the tests. Each makes .venv first (about 2 minutes).
PYTHON ?= python3
PY = .venv/bin/python

demo: .venv/installed
	$(PY) -m data.demo datasets/demo
	$(PY) sweep.py configs/sweeps/demo.yaml

test: .venv/developer
	$(PY) -m pytest -m "not slow"

test-all: .venv/developer
	$(PY) -m pytest

lint: .venv/developer
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

bench: .venv/installed
	$(PY) -m benchmarks.coreset
	$(PY) -m benchmarks.defects
	$(PY) -m benchmarks.dino_loss
	$(PY) -m benchmarks.knn
	$(PY) -m benchmarks.neighbor
	$(PY) -m benchmarks.padim
	$(PY) -m benchmarks.predict
	$(PY) -m benchmarks.train_step
	$(PY) -m benchmarks.views
	$(PY) -m benchmarks.aupro

tensorboard: .venv/installed
	.venv/bin/tensorboard --logdir runs

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q -r requirements.txt
	touch $@

.venv/developer: requirements-dev.txt .venv/installed
	.venv/bin/pip install -q -r requirements-dev.txt
	touch $@

.PHONY: demo test test-all lint bench tensorboard
