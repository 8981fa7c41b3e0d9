# Needs Python, gcc, g++ and make; everything else comes from PyPI. All that is set up lies in this checkout:
# .venv-vllm (vLLM for the CPU and this package), .venv-msprobe (msProbe, to check our dumps with) and .cache.

PYTHON ?= python3
ARGS ?=

VLLM := .venv-vllm
MSPROBE := .venv-msprobe
PIP_INSTALL := -m pip --disable-pip-version-check install --quiet

.DELETE_ON_ERROR:
.PHONY: help demo test lint clean

help:
	@echo "make demo    real vLLM on the CPU, a tiny model, one request, and a look at the dump"
	@echo "make test    all tests; some of them: make test ARGS='tests/dump -k reader'"
	@echo "make lint    ruff, and mypy --strict on an installed copy"
	@echo "make clean   remove all that the others have made"
	@echo "PYTHON=python3.12 picks another Python (vLLM for the CPU asks for 3.11 or newer)"

demo: $(VLLM)/.package
	$(VLLM)/bin/python examples/vllm_cpu/demo.py

test: $(VLLM)/.test $(MSPROBE)/.msprobe
	MSPROBE_VENV=$(CURDIR)/$(MSPROBE) $(VLLM)/bin/pytest --numprocesses auto --dist loadfile $(ARGS)

# mypy can't follow the mapped folder of an editable install, so it checks an installed copy.
lint: $(VLLM)/.test
	$(VLLM)/bin/ruff check .
	$(VLLM)/bin/ruff format --check .
	rm -rf build .cache/installed
	$(VLLM)/bin/python $(PIP_INSTALL) --no-deps --no-build-isolation --target .cache/installed .
	cd .cache/installed && ../../$(VLLM)/bin/mypy --config-file ../../pyproject.toml --cache-dir ../mypy -p msprobe_graph

clean:
	rm -rf $(VLLM) $(MSPROBE) .cache build *.egg-info examples/vllm_cpu/output msprobe_graph/*/_*.so

$(VLLM)/.vllm: examples/vllm_cpu/install.py
	$(PYTHON) examples/vllm_cpu/install.py $(VLLM)
	touch $@

$(VLLM)/.package: $(VLLM)/.vllm pyproject.toml setup.py $(wildcard msprobe_graph/*/*.c msprobe_graph/*/*.cpp)
	$(VLLM)/bin/python $(PIP_INSTALL) --no-build-isolation --editable .
	touch $@

$(VLLM)/.test: $(VLLM)/.package
	$(VLLM)/bin/python $(PIP_INSTALL) --no-build-isolation --editable '.[test]'
	touch $@

# Where msProbe can't be installed its tests are skipped, and say so. (torch first: setups may offer several builds of it.)
$(MSPROBE)/.msprobe:
	@echo "Installing msProbe into $(MSPROBE) ..."
	@$(PYTHON) -m venv $(MSPROBE) \
	    && $(MSPROBE)/bin/python $(PIP_INSTALL) torch==2.13.0 setuptools==78.1.1 wheel \
	    && $(MSPROBE)/bin/python $(PIP_INSTALL) mindstudio-probe==26.2.0 \
	    && touch $@ \
	    || echo "msProbe could not be installed: the tests marked msprobe will be skipped."
