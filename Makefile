# make demo: install what is missing and show the main job.  make test: everything.  make check: types and style only.
# make flaky N=5 [BUSY=2] [WORKERS=1]: the tests N times, and what differed.
# make vmtest [SUITE=trixie] [ARGS=TEST]: tests on another Debian.  make cuts [CUTS=50] [ARGS=--plant]: cut its power.
# make referee: build the tests' Dockerfiles with docker's classic builder too, where dockerd is installed, and compare.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed

.PHONY: demo test check flaky vmtest cuts bench referee clean

demo: $(STAMP)
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" examples/demo.sh $(IMAGE)

test: check
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile

flaky: $(STAMP)
	$(VENV)/bin/python -m tests.flaky $(or $(N),3) --workers $(or $(WORKERS),2) --busy $(or $(BUSY),0) $(ARGS)

vmtest: $(STAMP)
	$(VENV)/bin/python -m tests.vm.run $(or $(SUITE),trixie) $(ARGS)

cuts: $(STAMP)
	$(VENV)/bin/python -m tests.vm.cuts $(or $(SUITE),trixie) $(or $(CUTS),50) $(ARGS)

check: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: $(STAMP)
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" bench/create.sh $(or $(TREE),/var/tmp/cafs-demo/debian-python)

$(STAMP): pyproject.toml setup.cfg packages.sh
	./packages.sh
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q --config-settings editable_mode=compat -e '.[fuse,s3,dev]'
	touch $@

referee: $(STAMP)
	$(VENV)/bin/python -m tests.referee

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
