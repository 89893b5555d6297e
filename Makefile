# `make demo` and `make test` need only Python and a network: each creates its environment, builds, and runs.
PYTHON ?= python3
PYTEST = OMP_NUM_THREADS=1 $(1)/bin/python -m pytest -n 2
FIGURES = README.md $(shell grep -l '<!-- figures' docs/*.md)
METHODS = tests/hf tests/pid tests/dept tests/pasta tests/families tests/dect tests/ytuning
SOURCES = pyproject.toml setup.py $(shell find csrc -type f)

# settings that make libraries round differently: one machine stands in for others
SETTINGS = MKL_CBWR=COMPATIBLE MKL_CBWR=AVX2 ATEN_CPU_CAPABILITY=default ATEN_CPU_CAPABILITY=avx2 \
	ONEDNN_MAX_CPU_ISA=SSE41 ONEDNN_MAX_CPU_ISA=AVX2 ONEDNN_MAX_CPU_ISA=AVX512_CORE OMP_NUM_THREADS=1 OMP_NUM_THREADS=2 \
	PEFT_KERNELS_CPU_CAPABILITY=default PEFT_KERNELS_CPU_CAPABILITY=avx2 \
	PYTEST_ADDOPTS=--odd-addresses=4 PYTEST_ADDOPTS=--odd-addresses=8 \
	$(if $(shell grep -m1 avx512f /proc/cpuinfo),ATEN_CPU_CAPABILITY=avx512 PEFT_KERNELS_CPU_CAPABILITY=avx512)
NUMERIC = tests/test_accuracy.py $(addprefix tests/,ops pid dept pasta dect ytuning)
# tests that failed on some machine, and one for each operator and method
QUICK = (any_shape and not triton) or saved_and_loaded or weights_are_stock or weights_while_generating or scores_are_stock \
	or test_accuracy or test_the_scores or trains_as_autograd or (pasta_fuse and outputs_and_gradients) or (test_equals_the_formula)
FULL = not triton and not cuda and not instruction_sets and not errors
ARITHMETIC ?= QUICK

.PHONY: env demo figures test test-arithmetic test-oldest test-newest test-kernels test-cuda-on-host test-gpu-check test-families lint docs kernels clean FORCE

env: .venv/.ready
demo: env
	.venv/bin/peft-kernels demo
figures: env
	.venv/bin/peft-kernels report --picture docs/images/methods.svg $(addprefix --figures ,$(FIGURES))
test: env lint
	$(call PYTEST,.venv) tests
test-oldest: .venv-oldest/.ready
	$(call PYTEST,.venv-oldest) $(METHODS)
# the newest releases, whatever versions pyproject.toml and pid.enable allow; TORCH as below
test-newest:
	$(PYTHON) -m venv --clear .venv-newest
	.venv-newest/bin/pip install -q setuptools ninja $(or $(TORCH),torch) triton transformers peft accelerate safetensors numpy pytest pytest-xdist hypothesis
	.venv-newest/bin/pip install -q --no-build-isolation --no-deps -e .
	$(call PYTEST,.venv-newest) --untested-transformers $(METHODS)
# every text class of transformers, built tiny, under DePT and PASTA
test-families: env
	$(call PYTEST,.venv) tests/families/every_class.py
# the numeric tests under every setting, until one fails; ARITHMETIC=FULL takes all of them, SETTINGS=... some settings
test-arithmetic: env
	for setting in $(SETTINGS); do \
		echo "== $$setting"; \
		env OMP_NUM_THREADS=1 "$$setting" .venv/bin/python -m pytest -n 2 $(NUMERIC) -k "$($(ARITHMETIC))" || exit 1; \
	done
lint: env
	.venv/bin/ruff check . && .venv/bin/ruff format --check .
	.venv/bin/clang-format --dry-run -Werror $(shell find csrc tests/cuda_on_host -type f ! -name '*.py*')
	.venv/bin/mypy
docs: env
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict
# every default config of every kernel compiled for every architecture, and compared with the table; CUDA C++ kernels if nvcc built them
test-kernels: env
	.venv/bin/python -m tools.kernel_report --check >/dev/null
	test ! -e peft_kernels/_native_cuda.so || .venv/bin/python -m tools.kernel_report --cuda --check >/dev/null
# the CUDA C++ kernels on the CPU: every case under ASan and UBSan, and faults that are planted in copies of the kernels
test-cuda-on-host: env
	$(call PYTEST,.venv) tests/cuda_on_host/full.py
# scripts/gpu_check.sh, which checks a machine with a GPU, in a small form on the CPU
test-gpu-check: env
	for part in A B C; do OUT=build PYTHON=.venv/bin/python scripts/gpu_check.sh $$part --dry-run || exit 1; done
# the table, and docs/kernels.md, written anew
kernels: env
	.venv/bin/python -m tools.kernel_report --write >/dev/null
	test ! -e peft_kernels/_native_cuda.so || .venv/bin/python -m tools.kernel_report --cuda --write >/dev/null
clean:
	rm -rf .venv .venv-oldest .venv-newest build site *.egg-info peft_kernels/*.so peft_kernels/_native*.txt

# torch comes first, and the package is built against it: an isolated build would fetch a torch of its own
.venv/.ready: constraints.txt $(SOURCES)
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q -c constraints.txt setuptools ninja torch
	.venv/bin/pip install -q -c constraints.txt --no-build-isolation -e '.[test,docs]'
	touch $@

# The oldest torch and the newest are CUDA builds of 2.5 GB; TORCH=torch==2.13.0 takes another. The library that .venv's torch built
# loads in the oldest, then the oldest builds it from its own headers. .ready holds the torch version: requesting another rebuilds all.
OLDEST = $(or $(TORCH),torch==2.11.0)
OTHER = $(filter-out $(OLDEST),$(or $(shell cat .venv-oldest/.ready 2>/dev/null),none))
.venv-oldest/.ready: .venv/.ready constraints-oldest.txt $(SOURCES) $(if $(OTHER),FORCE)
	$(PYTHON) -m venv $(if $(OTHER),--clear) .venv-oldest
	.venv-oldest/bin/pip install -q -c constraints-oldest.txt setuptools ninja triton '$(OLDEST)'
	test ! -e peft_kernels/_native.so || .venv-oldest/bin/python -c 'from peft_kernels.ops.native_library import load_error; exit(load_error())'
	.venv-oldest/bin/pip install -q -c constraints-oldest.txt --no-build-isolation -e '.[hf]' pytest pytest-xdist hypothesis
	echo '$(OLDEST)' >$@
FORCE:
