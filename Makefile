# Two commands on a fresh machine: `make demo` and `make test`. Both do all the set-up, into .venv.
#
# TORCH_INDEX_URL  where torch comes from, e.g. PyTorch's CPU wheel index on a machine without a GPU.
# PYTHON           the interpreter that makes .venv (3.11 or 3.12).

PYTHON ?= python3.11
TORCH_INDEX_URL ?=
VENV := .venv
BIN := $(VENV)/bin
SETUP := $(VENV)/.setup-done
SETUP_DEV := $(VENV)/.setup-dev-done
RELEASE_TOOLS := $(VENV)/release-tools
RELEASE := $(VENV)/release
VERSION = $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' pixellm/__init__.py)
SOURCES := model platform jobs serve pixellm

.PHONY: demo test drills check format lint types setup setup-dev browser wheel lock licences sbom audit clean

demo: $(SETUP)
	$(BIN)/pixellm demo $(ARGS)

test: $(SETUP_DEV) browser
	$(BIN)/python -m coverage erase
	$(BIN)/python -m coverage run -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder -m "not drill" $(ARGS)
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report --fail-under=85 --skip-covered

drills: $(SETUP_DEV)
	$(BIN)/python -m pytest -m drill $(ARGS)

check: $(SETUP_DEV) lint types test

format: $(SETUP_DEV)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: $(SETUP_DEV)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -q tests/test_layers.py

types: $(SETUP_DEV)
	$(BIN)/mypy -p pixellm

setup: $(SETUP)
setup-dev: $(SETUP_DEV)

$(SETUP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=77" wheel
	TORCH_INDEX_URL="$(TORCH_INDEX_URL)" $(BIN)/python tools/install_torch.py
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable . --no-build-isolation
	$(BIN)/python -m pixellm.jobs.train.warm_up
	touch $@

$(SETUP_DEV): $(SETUP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]" --no-build-isolation
	touch $@

# The page is tested in a real browser. Debian and Ubuntu: installed here when we may; elsewhere the test says what is missing.
browser:
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null \
	|| { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
	&& apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null; } \
	|| echo "no Chromium found and no right to install one: tests/serve/test_page.py will fail; install the package 'chromium'"

wheel: $(SETUP_DEV)
	$(BIN)/python -m build --wheel --no-isolation

# The supply chain (CONTRIBUTING.md, "Releasing"). Its tools, and what an image would hold, have environments of their own.
lock: $(RELEASE_TOOLS)/.done
	$(RELEASE_TOOLS)/bin/python tools/lock.py

licences: $(RELEASE_TOOLS)/.done $(RELEASE)/.done
	$(RELEASE_TOOLS)/bin/python tools/licences.py $(RELEASE)/bin/python

sbom: $(RELEASE_TOOLS)/.done $(RELEASE)/.done
	mkdir -p dist
	sed 's/^dynamic = .*/version = "$(VERSION)"/' pyproject.toml > $(RELEASE)/pyproject.toml
	$(RELEASE_TOOLS)/bin/cyclonedx-py environment --pyproject $(RELEASE)/pyproject.toml --output-reproducible \
	  --output-file dist/pixellm-$(VERSION).cdx.json $(RELEASE)/bin/python

audit: $(RELEASE_TOOLS)/.done
	$(RELEASE_TOOLS)/bin/python tools/audit.py $(ARGS)

$(RELEASE_TOOLS)/.done: tools/release.lock
	$(PYTHON) -m venv --clear $(RELEASE_TOOLS)
	$(RELEASE_TOOLS)/bin/python -m pip install --quiet --require-hashes --requirement tools/release.lock
	touch $@

$(RELEASE)/.done: requirements.lock constraints.txt
	$(PYTHON) -m venv --clear $(RELEASE)
	$(RELEASE)/bin/python -m pip install --quiet --require-hashes --no-deps --requirement requirements.lock
	TORCH_INDEX_URL="$(TORCH_INDEX_URL)" $(RELEASE)/bin/python tools/install_torch.py
	$(RELEASE)/bin/python -m pip check
	touch $@

clean:
	rm -rf build dist *.egg-info demo runs .coverage* htmlcov
