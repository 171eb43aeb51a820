# Everything here works in a fresh clone; `make` alone tells what there is.
# What it makes lies in .venv and .demo, and `make clean` removes it.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.ONESHELL:
MAKEFLAGS += --no-builtin-rules --no-print-directory

# Which Python makes .venv. Without a choice newer names are tried if python3 is too old.
PYTHON ?= python3
CANDIDATES = $(PYTHON) $(if $(filter file,$(origin PYTHON)),python3.13 python3.12 python3.11)

# Relative, so that the path of the checkout may contain spaces.
VENV = .venv
RUN = $(VENV)/bin/python

# Another choice than the one that made .venv makes it anew; no choice takes it as it is.
ifneq ($(filter command environment,$(firstword $(origin PYTHON))),)
ifneq ($(shell cat $(VENV)/choice 2>/dev/null),$(PYTHON))
.PHONY: $(VENV)/installed
endif
endif

# Caches of the tools go where `make clean` finds them, and nowhere else.
export PYTHONPYCACHEPREFIX = $(CURDIR)/$(VENV)/cache/python
export RUFF_CACHE_DIR = $(VENV)/cache/ruff
export MYPY_CACHE_DIR = $(VENV)/cache/mypy
export HYPOTHESIS_STORAGE_DIRECTORY = $(VENV)/cache/hypothesis
export MPLCONFIGDIR = $(CURDIR)/$(VENV)/cache/matplotlib
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help install test test-full test-rdma check format demo bench clean

help: ## Show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' Makefile

install: $(VENV)/installed ## Make .venv and install the packages and tools into it

$(VENV)/installed: setup.cfg pyproject.toml
	@python=""
	for candidate in $(CANDIDATES); do
	  if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null &&
	     "$$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
	    python=$$candidate
	    break
	  fi
	done
	if [ -z "$$python" ]; then
	  echo "Python 3.11 or newer with its venv module is needed; none of these is one:" >&2
	  for candidate in $(CANDIDATES); do
	    echo "  $$candidate: $$("$$candidate" --version 2>&1 | head -n 1 || true)" >&2
	  done
	  echo "Name one with: make PYTHON=/path/to/python3" >&2
	  echo "(On Debian and Ubuntu the venv module is the package python3-venv.)" >&2
	  exit 1
	fi
	echo "Installing into $(VENV) with $$("$$python" --version) (about a minute)"
	"$$python" -m venv --clear $(VENV)
	if [ -t 1 ]; then line='\r\033[K'; else line=''; fi
	$(RUN) -m pip install --editable '.[bench,dev]' 2>&1 |
	  tee $(VENV)/install.log | awk -v line="$$line" '
	  /^Collecting/ && line { printf line "  %d: %s", ++count, $$2; fflush() }
	  /Retrying/ { print line $$0; fflush() }
	  /^Successfully installed/ { installed = NF - 2 }
	  END { if (installed) print line "  " installed " packages installed" }' ||
	  { cat $(VENV)/install.log >&2; exit 1; }
	echo '$(PYTHON)' > $(VENV)/choice
	touch $(VENV)/installed

test: install ## Run the tests
test: WHICH = -m 'not long'
test-full: install ## Run all tests, the long ones too
test test-full:
	@tmp=$$(mktemp -d)
	trap 'rm -rf "$$tmp"' EXIT
	TMPDIR=$$tmp PYTHONASYNCIODEBUG=1 \
	  $(RUN) -m pytest -o cache_dir=$(VENV)/cache/pytest $(WHICH) $(ARGS)

# In a virtual machine with soft devices; what it lacks, tests/rdma/prepare says.
test-rdma: install ## Run the tests of RDMA on real verbs
	@pyverbs=$$(tests/rdma/prepare $(RUN))
	PYTHONPATH=$$pyverbs tests/rdma/run-in-vm -t 2400 -- \
	  $(RUN) -m pytest -p no:cacheprovider -o faulthandler_timeout=600 tests/rdma $(ARGS)

check: install ## Check formatting, lint and types
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy

format: install ## Format the code and fix what can be fixed
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

bench: install ## Measure the data path beside its limit (ARGS=--trials=5)
	@$(RUN) -m kvstore_bench run bench/jobs/limits.ini bench/jobs/small.ini $(ARGS)

# Real sessions instead of generated ones: make demo TRACE='traces/*.json.gz'
demo: install ## Agent sessions on an emulated cluster, by one path and by both; picture in .demo/
	@sessions=$$(mktemp -d)
	trap 'rm -rf "$$sessions"' EXIT
	trace=$${TRACE:-}
	if [ -z "$$trace" ]; then
	  trace=$$sessions/agents.json.gz
	  $(RUN) -m kvstore_bench generate --dataset 64k --sessions 12 --output "$$trace"
	  echo
	fi
	mkdir -p .demo
	status=0
	$(RUN) -m kvstore_bench emulate "$$trace" --turns 24 --token-scale 16 --bytes-per-token 2k \
	  --policies direct,shortest_queue,balanced --plot .demo/cluster.png $(ARGS) || status=$$?
	if [ $$status = 3 ]; then  # no such networks here: one daemon on loopback
	  echo
	  $(RUN) -m kvstore_bench replay "$$trace" --plot .demo/replay.png
	elif [ $$status != 0 ]; then
	  exit $$status
	else
	  echo "the picture: .demo/cluster.png"
	fi

clean: ## Remove everything that was made here
	rm -rf $(VENV) .demo .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist
	rm -rf ./*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
