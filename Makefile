# Everything runs in a virtual environment of this folder, made when it is first needed.

PYTHON ?= python3
VENV ?= .venv
NODES ?= 6
OUT ?= runs/demo
RUN_CONFIG ?=

PACKAGES = common server_app client_app starter deploy

# The shell reads them from the environment, so they may hold quotes:
#   make demo RUN_CONFIG='rounds=2 t2i.device="cpu"'
export NODES OUT RUN_CONFIG

.PHONY: demo federation test lint starter

demo: $(VENV)/installed
	@$(VENV)/bin/python -m deploy.simulation --nodes "$$NODES" --out "$$OUT" --run-config "$$RUN_CONFIG"

federation: OUT = runs/federation
federation: NODES = 4
federation: $(VENV)/installed
	@$(VENV)/bin/python -m deploy.federation --nodes "$$NODES" --out "$$OUT" --run-config "$$RUN_CONFIG"

test: $(VENV)/installed
	$(VENV)/bin/python -m pytest

lint: $(VENV)/installed
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .
	$(VENV)/bin/python -m mypy $(PACKAGES)

starter: $(VENV)/installed
	$(VENV)/bin/python -m starter.train

$(VENV)/installed: pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found; set PYTHON to Python 3.11 or newer" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$$($(PYTHON) --version) is too old: make PYTHON=python3.11 (or newer)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -e '.[dev]'
	@touch $@
