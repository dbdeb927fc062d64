# make quickstart   pretrain a small ViT on real images, end to end, on this machine
# make test         lint, types and the whole test suite
# make wheels       packages for a GPU machine without a network, in wheels/: benchmarks/README.md
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := $(shell grep ^torch== constraints.txt)

.PHONY: quickstart test lint wheels clean

quickstart: $(VENV)/.installed
	$(BIN)/fastvit data make digits --out data/digits --eval-fraction 0.2 --samples-per-shard 200
	$(BIN)/fastvit train quickstart --cpu-processes 2 --out runs/quickstart --resume auto
	$(BIN)/fastvit report runs/quickstart
	@echo "next: open the report in a browser, or bring your own photos, one folder a class:"
	@echo "      $(BIN)/fastvit data make PHOTOS --out data/photos"
	@echo "      $(BIN)/fastvit config show photos"

# A process a core, each with the tests of one file after the other, and one thread in each.
test: $(VENV)/.installed lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadscope --no-loadscope-reorder

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# torch goes first, alone: whatever is installed after it finds its need for torch already met.
$(VENV)/.installed: pyproject.toml kernels/pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ./kernels --editable '.[dev]'
	touch $@

# For another machine: Linux on x86-64, with the Python of PYTHON_VERSION.
PYTHON_VERSION ?= 3.12
wheels:
	rm -rf wheels
	$(PYTHON) -m pip download --quiet --no-deps --only-binary=:all: --dest wheels \
		--implementation cp --python-version $(PYTHON_VERSION) \
		--platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 --platform manylinux1_x86_64 \
		--constraint constraints.txt --requirement launch/wheels.txt
	DS_BUILD_OPS=0 $(PYTHON) -m pip wheel --quiet --no-deps --wheel-dir wheels --constraint constraints.txt deepspeed
	@du -sh wheels

clean:
	rm -rf $(VENV) data runs
