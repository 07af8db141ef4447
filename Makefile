# The commands of the README. Each first brings the environment in .venv up to date.
BIN := .venv/bin

# OpenMP threads that spin while they wait make small networks 20 times slower on a machine that has other work.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: setup demo test slow gpu lint

setup:
	@scripts/bootstrap.sh

demo: setup
	$(BIN)/tnm-pipeline demo

test: setup
	$(BIN)/pytest -q

slow: setup
	$(BIN)/pytest -q -m "slow and not gpu"

gpu: setup
	$(BIN)/pytest -q -m gpu

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pyright
