# Penstock's commands. `make demo` and `make test` set up everything they need first.
.PHONY: demo test setup setup-test check sim linux bench soak sim-many rip

PYTHON := .venv/bin/python

setup:            ## prepare this machine, leave .venv/bin/penstock
	@scripts/setup

setup-test:
	@scripts/setup --test

demo: setup-test  ## start Penstock, drive it with the real e2b SDK, stop, show that nothing was left
	@$(PYTHON) scripts/demo.py

test: setup-test  ## every test, the real kernel included (root)
	@scripts/test

check:            ## style, types, layers
	.venv/bin/ruff check src tests bench scripts
	.venv/bin/ruff format --check src tests bench scripts
	.venv/bin/mypy
	.venv/bin/pytest tests/shape

sim:              ## replay one simulated world: make sim SEED=42, with ingress and clients: TRAFFIC=1
	$(PYTHON) -m penstock.sim $(if $(TRAFFIC),--traffic) --seed $(SEED)

linux: setup-test ## the real-kernel tests alone (root)
	.venv/bin/pytest tests/linux tests/spec

rip: setup-test   ## take each promise of a drain away, and see that a test notices: make rip [ROW=id]
	@$(PYTHON) scripts/rip.py $(ROW)

bench:            ## measure, and compare with what a user would pick instead
	@PENSTOCK_SETUP_BENCH=1 scripts/setup --test
	@$(PYTHON) bench/all.py

soak:             ## ten minutes of sandboxes while everything that can break does: SEED=n replays, SECONDS=n
	$(PYTHON) -m bench.soak $(if $(SEED),--seed $(SEED)) $(if $(SECONDS),--seconds $(SECONDS))

sim-many:         ## 2,000 simulated worlds, and 200 with traffic: about 4 minutes; SEEDS=n, FIRST=n
	$(PYTHON) -m penstock.sim --quiet --first $(or $(FIRST),0) --seeds $(or $(SEEDS),2000)
	$(PYTHON) -m penstock.sim --quiet --first $(or $(FIRST),0) --seeds 200 --traffic
