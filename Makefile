# Everything runs in a virtual environment of this folder, made when it is first needed.

PYTHON ?= python3
VENV ?= .venv
NODES ?=
OUT ?=
RUN_CONFIG ?=

# For tools that read code without running it: the package as an installation has it, the rooms in `fedmmkt`.
ROOMS = common server_app client_app starter deploy
LAYOUT = .layout/fedmmkt

# The shell reads them from the environment, so they may hold quotes:
#   make demo RUN_CONFIG='rounds=2 t2i.device="cpu"'
export NODES OUT RUN_CONFIG

.PHONY: install demo federation test lint docs layout starter

demo: $(VENV)/usable
	@$(VENV)/bin/fedmmkt demo $${NODES:+--nodes "$$NODES"} $${OUT:+--out "$$OUT"} --run-config "$$RUN_CONFIG"

federation: $(VENV)/usable
	@$(VENV)/bin/fedmmkt federation $${NODES:+--nodes "$$NODES"} $${OUT:+--out "$$OUT"} --run-config "$$RUN_CONFIG"

# Only the command, `.venv/bin/fedmmkt`.
install: $(VENV)/usable
	@echo "Installed. Next: . $(VENV)/bin/activate, then fedmmkt demo, or fedmmkt --help"

test: $(VENV)/developed
	$(VENV)/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

lint: $(VENV)/developed layout
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .
	MYPYPATH=$(dir $(LAYOUT)):. $(VENV)/bin/python -m mypy -p fedmmkt -p benchmarks

docs: $(VENV)/developed layout
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict --quiet
	@echo build/docs/index.html

layout:
	@mkdir -p $(LAYOUT)
	@for room in $(ROOMS); do ln -sfn ../../$$room $(LAYOUT)/$$room; done
	@for module in fedmmkt/*.py fedmmkt/flower; do ln -sfn ../../$$module $(LAYOUT)/$$(basename $$module); done

starter: $(VENV)/developed
	$(VENV)/bin/python -m fedmmkt.starter.train

# What a run needs; who develops needs more.
$(VENV)/usable: pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found; set PYTHON to Python 3.11 or newer" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$$($(PYTHON) --version) is too old: make PYTHON=python3.11 (or newer)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -e .
	@touch $@

$(VENV)/developed: $(VENV)/usable
	$(VENV)/bin/python -m pip install --quiet -e '.[dev]'
	@touch $@
