# `make demo` and `make test` need nothing but a Python and a network: each makes its environment, builds, and does its job.
PYTHON ?= python3
PYTEST = OMP_NUM_THREADS=1 $(1)/bin/python -m pytest -n 2
FIGURES = README.md $(shell grep -l '<!-- figures' docs/*.md)
SOURCES = pyproject.toml setup.py $(shell find csrc -type f)

.PHONY: env demo figures test test-oldest test-families lint docs kernels clean

env: .venv/.ready
demo: env
	.venv/bin/peft-kernels demo
figures: env
	.venv/bin/peft-kernels report $(addprefix --figures ,$(FIGURES))
test: env lint
	$(call PYTEST,.venv) tests
test-oldest: .venv-oldest/.ready
	$(call PYTEST,.venv-oldest) tests/pid tests/dept tests/pasta tests/families tests/dect tests/ytuning
# every text class of transformers, built tiny, under DePT and PASTA
test-families: env
	$(call PYTEST,.venv) tests/families/every_class.py
lint: env
	.venv/bin/ruff check . && .venv/bin/ruff format --check .
docs: env
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict
# what the compiled kernels hold: the table that the tests compare with, and docs/kernels.md; those of CUDA C++ where nvcc built them
kernels: env
	.venv/bin/python -m kernel_report --write >/dev/null
	test ! -e peft_kernels/_native_cuda.so || .venv/bin/python -m kernel_report --cuda --write >/dev/null
clean:
	rm -rf .venv .venv-oldest build site *.egg-info peft_kernels/*.so

# torch comes first, and the package is built against it: an isolated build would fetch a torch of its own
.venv/.ready: constraints.txt $(SOURCES)
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q -c constraints.txt setuptools ninja torch
	.venv/bin/pip install -q -c constraints.txt --no-build-isolation -e '.[test,docs]'
	touch $@

.venv-oldest/.ready: constraints-oldest.txt $(SOURCES)
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install -q -c constraints-oldest.txt setuptools ninja torch
	.venv-oldest/bin/pip install -q -c constraints-oldest.txt --no-build-isolation -e '.[hf]' pytest pytest-xdist hypothesis
	touch $@
