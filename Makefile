# Both targets need only Python 3.11 or later, pip and make.
PYTHON ?= python3
RUN := runs/quickstart
export JAX_PLATFORMS ?= cpu
# Python keeps what it compiled of a package that it imports, also where the surroundings forbid it: without, each of the many processes that the
# tests start compiles all of them anew, which takes longer than the rest of its start.
unexport PYTHONDONTWRITEBYTECODE
# Keep freed memory in the process: training allocates the same large arrays at every step.
FAST := MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 MALLOC_TOP_PAD_=268435456

# Two workers; tests that share an expensive fixture stay together.
PYTEST := .venv/bin/python -m pytest -q --durations=15 tests -n 2 --dist loadgroup --no-loadscope-reorder
# By how much a test that is not marked slow may exceed its ten seconds: machines differ, and the workers share one.
export QIMG2_TEST_SLOWNESS ?= 4

.PHONY: quickstart test test-fast lint

quickstart: .venv/.installed
	.venv/bin/python -m launch.prepare_data --dataset=glyphs --out=runs/data
	$(FAST) .venv/bin/python -m launch.train --config=configs/quickstart.py --workdir=$(RUN)
	.venv/bin/python -m launch.sample --workdir=$(RUN) --out=$(RUN)/grid.png \
	  --prompt="a large green K on yellow paper, centered" --prompt="blue star on white" \
	  --prompt="pink paper with a large black 7, centered" --prompt="red heart on cyan, top left"
	.venv/bin/python -m launch.sample --workdir=$(RUN) --out=$(RUN)/k.png --prompt="a large green K on yellow paper, centered"
	.venv/bin/python -m launch.sample --workdir=$(RUN) --out=$(RUN)/red_k.png --image=$(RUN)/k.png --prompt="make it red"

test: .venv/.installed-dev
	$(PYTEST)

test-fast: .venv/.installed-dev
	$(PYTEST) -m "not slow"

lint: .venv/.installed-dev
	.venv/bin/ruff check .

# The pip that comes with Python 3.11 takes twice as long to choose among the files of an index.
.venv/bin/python:
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q --no-compile pip==26.3

.venv/.installed: requirements.txt requirements.lock | .venv/bin/python
	.venv/bin/python -m pip install -q --no-compile -r requirements.txt -c requirements.lock
	touch $@

# Wheels of torchvision name a torch build of their own, and lpips asks for torchvision; their Python code is all that the tests need.
.venv/.installed-dev: requirements.txt requirements-data.txt requirements-dev.txt requirements.lock | .venv/bin/python
	.venv/bin/python -m pip install -q --no-compile -r requirements.txt -r requirements-data.txt -r requirements-dev.txt -c requirements.lock
	.venv/bin/python -m pip install -q --no-compile --no-deps torchvision==0.29.1 lpips==0.1.4
	touch .venv/.installed $@
