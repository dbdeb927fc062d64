# make quickstart   pretrain a small ViT on real images, end to end, on this machine
# make test         lint, types and the whole test suite
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := $(shell grep ^torch== constraints.txt)

.PHONY: quickstart test lint clean

quickstart: $(VENV)/.installed
	$(BIN)/fastvit data make digits --out data/digits --eval-fraction 0.2 --samples-per-shard 200
	$(BIN)/fastvit train quickstart --cpu-processes 2 --out runs/quickstart --resume auto
	$(BIN)/fastvit report runs/quickstart
	@echo "next: open the report in a browser, or bring your own photos, one folder a class:"
	@echo "      $(BIN)/fastvit data make PHOTOS --out data/photos"
	@echo "      $(BIN)/fastvit config show photos"

# A process a core, each with the tests of one file after the other, and one thread in each.
test: $(VENV)/.installed lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadscope

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch goes first, alone: whatever is installed after it finds its need for torch already met.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[train,dev,integrations]'
	touch $@

clean:
	rm -rf $(VENV) data runs
