# `make demo` and `make test` need nothing but a Python and a network: each makes its environment, builds, and does its job.
PYTHON ?= python3
PYTEST = OMP_NUM_THREADS=1 $(1)/bin/python -m pytest -n 2
FIGURES = README.md $(shell grep -l '<!-- figures' docs/*.md)
METHODS = tests/pid tests/dept tests/pasta tests/families tests/dect tests/ytuning
SOURCES = pyproject.toml setup.py $(shell find csrc -type f)

.PHONY: env demo figures test test-oldest test-newest test-families lint docs kernels clean

env: .venv/.ready
demo: env
	.venv/bin/peft-kernels demo
figures: env
	.venv/bin/peft-kernels report $(addprefix --figures ,$(FIGURES))
test: env lint
	$(call PYTEST,.venv) tests
test-oldest: .venv-oldest/.ready
	$(call PYTEST,.venv-oldest) $(METHODS)
# what the registry has today, whatever pyproject.toml allows; TORCH as below
test-newest:
	$(PYTHON) -m venv --clear .venv-newest
	.venv-newest/bin/pip install -q setuptools ninja $(or $(TORCH),torch) triton transformers peft accelerate safetensors numpy pytest pytest-xdist hypothesis
	.venv-newest/bin/pip install -q --no-build-isolation --no-deps -e .
	$(call PYTEST,.venv-newest) $(METHODS)
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
	rm -rf .venv .venv-oldest .venv-newest build site *.egg-info peft_kernels/*.so peft_kernels/_native*.txt

# torch comes first, and the package is built against it: an isolated build would fetch a torch of its own
.venv/.ready: constraints.txt $(SOURCES)
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q -c constraints.txt setuptools ninja torch
	.venv/bin/pip install -q -c constraints.txt --no-build-isolation -e '.[test,docs]'
	touch $@

# The oldest torch and the newest are CUDA builds of 2.5 GB; TORCH=torch==2.13.0 takes another. The library that .venv's torch built
# loads in the oldest, then the oldest builds it from its own headers.
.venv-oldest/.ready: .venv/.ready constraints-oldest.txt $(SOURCES)
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install -q -c constraints-oldest.txt setuptools ninja $(or $(TORCH),torch==2.11.0)
	test ! -e peft_kernels/_native.so || .venv-oldest/bin/python -c 'from peft_kernels.ops.native_library import problem; exit(problem())'
	.venv-oldest/bin/pip install -q -c constraints-oldest.txt --no-build-isolation -e '.[hf]' pytest pytest-xdist hypothesis
	touch $@
