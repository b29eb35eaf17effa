# make train   trains every scene (default: the built-in demo) and prints the table; set-up included
# make test    the tests (ARGS=--slow: also those that take a minute each)
# make lint    ruff and mypy
# make setup   only the virtual environment in .venv
# make pins    the versions of all packages, from pyproject.toml and package.json (ARGS=--upgrade: the newest)

VENV := .venv
STAMP := $(VENV)/.installed
PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11,\
	$(if $(shell $(p) -c 'import sys; print(*[1] * ((3, 11) <= sys.version_info[:2] <= (3, 13)))' 2>/dev/null),$(p))))

# What uv is asked: one version of each package for all systems and Pythons, and no word on where packages are found.
UV ?= uv
COMPILE = $(UV) pip compile pyproject.toml --quiet --universal --python-version 3.11 --fork-strategy fewest --all-extras \
	--no-annotate --no-emit-index-url --no-emit-find-links --custom-compile-command 'make pins'

.PHONY: setup train test lint pins

setup: $(STAMP)

# The stamp is written last: an installation that was interrupted is done again, over what is already there.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "flexgs needs Python 3.11, 3.12 or 3.13; found $$(python3 --version 2>&1); \
	install one or name it: make PYTHON=/path/to/python3.12" >&2; exit 2; }
	@test -x $(VENV)/bin/python && $(VENV)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "installing into $(VENV), this takes a few minutes"
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

train: setup
	$(VENV)/bin/python ray_jobs/train_all.py $(ARGS)

test: setup
	$(VENV)/bin/python -m pytest -n 2 $(ARGS)

lint: setup
	$(VENV)/bin/ruff check
	$(VENV)/bin/mypy

# Versions that are there stay, unless they no longer fit.
pins:
	@command -v $(UV) >/dev/null || { echo "make pins needs uv (pip install uv), or its place: make pins UV=/path/to/uv" >&2; exit 2; }
	$(COMPILE) $(ARGS) --output-file constraints.txt
	$(COMPILE) --generate-hashes --constraints constraints.txt --output-file requirements-hashes.txt
	for folder in web web/examples flexgs/formats/splat_transform; do npm install --prefix $$folder --package-lock-only --ignore-scripts \
		--omit-lockfile-registry-resolved --no-audit --no-fund || exit; done
