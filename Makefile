# All but `clean` first install what they need into .venv: nothing but Python, its venv and make has
# to be there, and nothing is written outside this folder but pip's cache.
#
#   PYTHON=python3.12   the Python that .venv is made with: 3.11 or newer, python3 if not given
#   ARGS="..."          goes to the program: make test ARGS="-k death", make demo ARGS="--world-size 4"
#   TORCH=0             tests and checks without torch; those that need it are skipped

BIN := .venv/bin
INSTALL := @PYTHON="$(PYTHON)" sh scripts/install
comma := ,
TEST := test$(if $(filter 0,$(TORCH)),,$(comma)test-torch)
N ?= 50
SECONDS ?= 600

.PHONY: help demo test test-vllm check bench bench-peers bench-bounds bench-vllm soak repeat clean
.NOTPARALLEL:

help:
	@echo "make demo    a real transformer, split over worker processes, writes a text"
	@echo "make test    all tests"
	@echo "make test-vllm    vLLM itself on rankwise, in an environment of its own (4 GB)"
	@echo "make check   lint, types, import rules, unit and contract tests: what to run before a commit"
	@echo "make bench   what a call costs, beside the floor and the alternatives; plots in docs/benchmarks"
	@echo "make bench-peers   install the alternatives that are not in the standard library"
	@echo "make bench-bounds  how soon deaths are told and all is gone, beside the bounds; docs/faults.md"
	@echo "make bench-vllm   vLLM on rankwise, beside its own executor; figures in docs/benchmarks"
	@echo "make soak    random calls against random faults for SECONDS=$(SECONDS)"
	@echo "make repeat  the process and fault tests N=$(N) times, until one fails"
	@echo "make clean   remove .venv and all caches"

demo:
	$(INSTALL) demo
	@$(BIN)/python examples/tensor_parallel/generate.py $(ARGS)

test:
	$(INSTALL) $(TEST)
	@$(BIN)/python -m pytest $(ARGS)

test-vllm:
	@PYTHON="$(PYTHON)" sh scripts/install-vllm
	@.venv-vllm/bin/python -m pytest tests/vllm $(ARGS)

# The import rules are tests/unit/test_imports.py; mypy's --strict is in pyproject.toml.
check:
	$(INSTALL) $(TEST),check
	@$(BIN)/python scripts/check.py $(ARGS)

bench:
	$(INSTALL) bench
	@$(BIN)/python benchmarks/run.py --out docs/benchmarks $(ARGS)

bench-peers:
	$(INSTALL) bench,bench-peers

bench-bounds:
	$(INSTALL) bench
	@$(BIN)/python benchmarks/bounds.py --out docs/benchmarks $(ARGS)
	@$(BIN)/python scripts/faults_page.py > docs/faults.md
bench-vllm:
	@PYTHON="$(PYTHON)" sh scripts/install-vllm
	@.venv-vllm/bin/python benchmarks/vllm_bench.py --out docs/benchmarks $(ARGS)

soak:
	$(INSTALL) $(TEST)
	@$(BIN)/python tests/faults/chaos.py --seconds $(SECONDS) $(ARGS)

repeat:
	$(INSTALL) $(TEST)
	@green=0; while [ $$green -lt $(N) ]; do \
		$(BIN)/python -m pytest -q -x $(wildcard tests/process tests/faults) $(ARGS) || \
			{ echo "repeat: $$green of $(N) rounds were green, the next was not"; exit 1; }; \
		green=$$((green + 1)); echo "repeat: $$green of $(N) rounds green"; \
	done

clean:
	rm -rf .venv .venv-vllm .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
