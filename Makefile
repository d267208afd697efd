# make demo   install, compile a real language model, show what came of it
# make test   install, run every test that needs no GPU
# make check  lint, format, types
# make size   lines of every file; tests/test_architecture.py holds the ceilings

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help

BIN := .venv/bin
STAMP := .venv/installed
FARM := build/typecheck
CODE := mixcomp passes lowering kernels

# the parts of the package lie in folders of their own; the type checker sees them as they are installed
MAPPED := passes lowering kernels

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TOKENIZERS_PARALLELISM := false
# threads that wait at a barrier should sleep: spinning ones cost a busy machine twenty times the work itself
export OMP_WAIT_POLICY := passive

.PHONY: help demo test check size clean

help:
	@sed -n 's/^# //p' $(MAKEFILE_LIST) | head -4

demo: $(STAMP)
	$(BIN)/mixcomp demo --out .demo $(DEMO)

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -q $(TESTS)

check: $(STAMP) $(FARM)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=$(FARM) $(BIN)/mypy -p mixcomp

size:
	@find $(CODE) -name '*.py' -print0 | sort -z | xargs -0 wc -l

clean:
	rm -rf .venv .demo build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

# the first Python on the path that is new enough and can make an environment
$(STAMP): pyproject.toml constraints.txt
	@for name in python3.11 python3.12 python3.13 python3.14 python3 python; do
	  if "$$name" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then
	    python=$$name
	    break
	  fi
	done
	if [ -z "$${python:-}" ]; then
	  echo "make: no Python 3.11 or newer with venv was found on PATH" >&2
	  exit 1
	fi
	"$$python" -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

$(FARM): $(MAKEFILE_LIST) $(wildcard mixcomp/*)
	@rm -rf $@
	mkdir -p $@/mixcomp
	ln -s "$(CURDIR)"/mixcomp/* $@/mixcomp/
	for name in $(MAPPED); do ln -s "$(CURDIR)/$$name" "$@/mixcomp/$$name"; done
