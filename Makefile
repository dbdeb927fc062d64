# `make help` lists the targets. They create .venv on first use, and reuse it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := $(shell grep ^torch== constraints.txt)
VERSION = $(shell sed -n 's/^__version__ = "\([0-9][0-9a-z.]*\)"$$/\1/p' fastvit_engine/__init__.py)
# Three processes for every two cores, as tests spend a good part of their time waiting; each with the tests of one file in
# turn, and one thread in each. The processes that tests start find the code compiled, also where the environment forbids
# to keep that.
WORKERS := $(shell expr '(' `env -u OMP_NUM_THREADS nproc` '*' 3 + 1 ')' / 2)
PYTEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -p tests.skips -n $(WORKERS) --dist loadscope --no-loadscope-reorder

EVERYTHING := FASTVIT_TEST_RESUMES=all FASTVIT_TEST_FAULTS=all FASTVIT_TEST_CLUSTER=all FASTVIT_TEST_FUZZ=all \
	FASTVIT_TEST_BUCKETS=all FASTVIT_TEST_RAY=all FASTVIT_TEST_LONG=all FASTVIT_TEST_KILLS=10
# Types are checked beside the tests, which do not keep all cores busy; what that says comes last.
define with_types
$(MAKE) --no-print-directory types > $(VENV)/types.log 2>&1 & types=$$!; failed=0; \
	$(1) || failed=$$?; wait $$types || failed=1; cat $(VENV)/types.log; exit $$failed
endef

.PHONY: help quickstart test test-all lint style types format docs site version dist licenses hub-kernel wheels clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | awk -F '\t' '{ printf "make %-12s %s\n", $$1, $$2 }'

quickstart: $(VENV)/.installed  ## pretrain a small ViT on real images, end to end, on this machine
	$(BIN)/fastvit data make digits --out data/digits --eval-fraction 0.2 --samples-per-shard 200
	$(BIN)/fastvit train quickstart --cpu-processes 2 --out runs/quickstart --resume auto
	$(BIN)/fastvit report runs/quickstart
	@echo "next: open the report in a browser, or train on photos of your own, one folder per class:"
	@echo "      $(BIN)/fastvit data make PHOTOS --out data/photos"
	@echo "      $(BIN)/fastvit config show photos"

test: style  ## lint, types and every test but the long matrices
	$(call with_types,$(PYTEST))

# The matrices of tests/cluster also need root and the launchers they start; a test without its launcher is skipped.
test-all: style $(VENV)/.docs  ## the same with every matrix: all resumes, faults, launchers, malformed files, buckets, Ray, and more random kills
	$(call with_types,$(EVERYTHING) $(PYTEST))

lint: style types  ## style, formatting, types, and the direction of imports

style: $(VENV)/.installed  ## style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed  ## types, and the direction of imports
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed  ## format the code, and fix what can be fixed by itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed  ## write the generated pages: docs/configuration.md, and the results in docs/verification.md
	$(BIN)/fastvit config explain --markdown > docs/configuration.md.tmp
	mv docs/configuration.md.tmp docs/configuration.md
	$(BIN)/fastvit bench readme

site: $(VENV)/.docs  ## build the documentation site, into build/site
	$(BIN)/python -m sphinx --quiet --fail-on-warning -c docs -d build/doctrees . build/site

version:  ## write the version that fastvit_engine/__init__.py says into all other files that say it
	@test -n "$(VERSION)" || { echo 'fastvit_engine/__init__.py has no line such as __version__ = "0.2.0"'; exit 2; }
	sed -i 's/^__version__ = .*/__version__ = "$(VERSION)"/' kernels/fastvit_kernels/__init__.py
	sed -i 's/"fastvit-kernels==[^"]*"/"fastvit-kernels==$(VERSION)"/' pyproject.toml
	sed -i 's/^version: .*/version: "$(VERSION)"/' CITATION.cff

# From a copy of what is committed, whose READMEs get absolute links: FASTVIT_SOURCE_URL is where they lead.
dist: $(VENV)/.installed  ## build wheel and sdist of both packages, into dist/, and check what a package index will show
	test -n "$$FASTVIT_SOURCE_URL" || { echo "set FASTVIT_SOURCE_URL=https://HOST/OWNER/NAME/blob/TAG: where READMEs link to"; exit 2; }
	rm -rf build/release dist && mkdir -p build/release
	git archive HEAD | tar -x -C build/release
	$(BIN)/python docs/pages.py build/release
	$(BIN)/python -m pip install --quiet --constraint constraints.txt build twine
	$(BIN)/python -m build --outdir dist build/release/kernels
	$(BIN)/python -m build --outdir dist build/release
	$(BIN)/python -m twine check --strict dist/*

licenses: $(VENV)/.installed  ## list the license of every package in .venv, in build/licenses.md
	mkdir -p build
	$(BIN)/python -m pip install --quiet --constraint constraints.txt pip-licenses
	$(BIN)/pip-licenses --format markdown --from mixed --output-file build/licenses.md

hub-kernel: $(VENV)/.installed  ## write the kernels for Hugging Face's `kernels` package, to build/fastvit-kernels
	rm -rf build/fastvit-kernels
	$(BIN)/python -m fastvit_kernels.hub --out build/fastvit-kernels

# torch is installed first, by itself: packages installed later then find their requirement of torch already satisfied.
# The assembler comes last, without what the rest of its package requires: 80 MB. 22,000 files are compiled on all cores,
# where pip would use one.
$(VENV)/.installed: pyproject.toml kernels/pyproject.toml constraints.txt
	@echo "installing PyTorch and the other packages into $(VENV), which takes some minutes"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile $(TORCH)
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable ./kernels --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps "nvidia-cuda-nvcc; platform_system == 'Linux'"
	$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true  # a file of PyTorch needs a newer Python
	touch $@

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ./kernels --editable '.[docs]'
	touch $@

# For another machine: Linux on x86-64, with the Python of PYTHON_VERSION.
PYTHON_VERSION ?= 3.12
wheels:  ## packages for a GPU machine without a network, in wheels/: see benchmarks/README.md
	rm -rf wheels
	$(PYTHON) -m pip download --quiet --no-deps --only-binary=:all: --dest wheels \
		--implementation cp --python-version $(PYTHON_VERSION) \
		--platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 --platform manylinux1_x86_64 \
		--constraint constraints.txt --requirement launch/wheels.txt
	$(PYTHON) -m benchmarks.slim_wheel wheels/nvidia_cuda_nvcc-*.whl '*/bin/ptxas'
	DS_BUILD_OPS=0 $(PYTHON) -m pip wheel --quiet --no-deps --wheel-dir wheels --constraint constraints.txt deepspeed
	@du -sh wheels

clean:  ## remove .venv, data and runs
	rm -rf $(VENV) data runs
