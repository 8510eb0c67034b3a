# `make bench` and `make test` do everything from a bare clone. VENV=PATH uses an environment of yours,
# TORCH_SPEC chooses the torch, and ARGS is passed to the benchmark or to pytest.
PYTHON ?= python3
VENV ?= .venv
TORCH_SPEC ?= torch==2.13.0
ABI_TORCH_SPEC ?= torch==2.11.0
# The oldest and the newest Triton with which the kernels are tested.
TRITON_SPECS ?= triton==3.6.0 triton==3.9.0
ARGS ?=
DIST ?= dist

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
# Each torch has a stamp of its own, so that another TORCH_SPEC is installed.
SPEC := $(subst >,-,$(subst <,-,$(subst =,-,$(subst /,-,$(TORCH_SPEC)))))
ENV_STAMP := $(VENV)/.dlkernels-$(SPEC)
DEV_STAMP := $(VENV)/.dlkernels-dev
CXX_FILES = $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu')
O0_NATIVE := build/O0/_C.so

.PHONY: help venv dev build build-O0 test test-O0 test-integrations test-thirdparty test-install test-wheel bench lint \
	format native-test native-asan native-tsan cuda-test abi-check gpuless gpu-check mutants wheel sdist docs clean

help:
	@echo "make bench        the main job: our layers against torch.nn, as a table, JSON and pictures"
	@echo "make test         the tests; ARGS='-k lstm' narrows them"
	@echo "make build        compile csrc/ in place, incrementally"
	@echo "make lint         ruff, mypy, clang-format; make format puts right what can be"
	@echo "make native-test  the kernels without torch, under the address, undefined-behaviour and thread sanitizers"
	@echo "make cuda-test    the CUDA kernels without a GPU: emulation, sanitizers, nvcc"
	@echo "make mutants      plants bugs one at a time: the tests have to notice (hours; ARGS='--only gru' narrows it)"
	@echo "make test-O0      what the optimiser can change, on an -O0 build of the kernels"
	@echo "make test-integrations  the tests that need transformers, onnxscript, onnxruntime and openvino, which it installs"
	@echo "make test-thirdparty  programs of ten other projects with dlkernels.enable() on: installs them, minutes"
	@echo "make test-install pip install, plain, editable and on top of another environment (minutes)"
	@echo "make abi-check    the same compiled module under $(ABI_TORCH_SPEC) (gigabytes)"
	@echo "make gpuless      Triton kernels interpreted and compiled, and cuda-test: GPU code without a GPU (minutes)"
	@echo "make gpu-check    on a machine with an NVIDIA GPU: build, measure, test; ARGS='--out DIR --part NAME --resume'"
	@echo "make wheel        dist/*.whl, built against the torch of $(VENV)"
	@echo "make sdist        dist/*.tar.gz, from which pip builds"
	@echo "make test-wheel   wheel and sdist, and the wheel installed where there is no compiler (minutes)"
	@echo "make docs         the documentation as a site in build/site"

venv: $(ENV_STAMP)

# torch is installed first, so that the other packages do not choose another. `build` compiles the module, because it
# shows its progress.
$(ENV_STAMP): pyproject.toml setup.py
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) install '$(TORCH_SPEC)'
	$(PIP) install 'setuptools>=77' ninja 'pybind11>=2.13'
	DLKERNELS_NO_NATIVE=1 $(PIP) install --no-build-isolation -e '.[bench,test]'
	rm -f $(VENV)/.dlkernels-torch* && touch $@

dev: $(DEV_STAMP)

# What `docs` needs is installed here too, because pip must not exchange the package while .ci/run tests it.
$(DEV_STAMP): $(ENV_STAMP)
	DLKERNELS_NO_NATIVE=1 $(PIP) install --no-build-isolation -e '.[dev,docs]'
	touch $@

build: $(ENV_STAMP)
	@$(PY) csrc/setup/native.py

build-O0: $(ENV_STAMP)
	@$(PY) csrc/setup/native.py --opt 0 --out $(O0_NATIVE)

test: build
	$(PY) -m pytest $(ARGS)

# Only tests of the kernels' values: the Python code around the kernels is the same in both builds.
O0_TESTS ?= tests/rnn tests/attention tests/package/test_isa.py
test-O0: build-O0
	DLKERNELS_NATIVE=$(O0_NATIVE) $(PY) -m pytest $(O0_TESTS) $(ARGS)

test-integrations: build
	$(PIP) install transformers onnx onnxscript onnxruntime openvino
	$(PY) -m pytest tests/integrations/test_transformers.py tests/integrations/test_onnx.py tests/bench/test_peers.py \
	  $(ARGS)

# ARGS='timm espnet' selects users, ARGS='--write docs/thirdparty.md' renews the page.
test-thirdparty: build
	$(PY) -m tests.thirdparty.run $(ARGS)

test-install: $(ENV_STAMP)
	$(PY) -m tests.install.check '$(TORCH_SPEC)'

test-wheel: $(ENV_STAMP)
	$(PY) -m tests.install.check_wheel '$(TORCH_SPEC)'

bench: build
	$(PY) -m benchmarks $(ARGS)

lint: $(DEV_STAMP)
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)

format: $(DEV_STAMP)
	$(PY) -m ruff check --fix
	$(PY) -m ruff format
	$(VENV)/bin/clang-format -i $(CXX_FILES)

# The thread sanitizer detects a missing barrier even if no result is wrong.
native-test: native-asan native-tsan
native-asan:
	sh tests/native/headers.sh
	bash tests/native/run.sh asan
native-tsan:
	ISAS=scalar bash tests/native/run.sh tsan

# All of them take hours. ARGS='--only gru' selects some, ARGS=--list prints them.
mutants: build
	$(PY) tests/mutants/run.py $(ARGS)

cuda-test: build
	$(PY) tests/cuda/run.py $(ARGS)

abi-check: build
	$(PY) tests/abi/check.py '$(ABI_TORCH_SPEC)'

# Only the rung `boundary` of the CUDA layers needs the compiled module: Triton's interpreter runs on CPU tensors.
gpuless: build
	$(PY) tests/gpuless/run.py $(TRITON_SPECS) $(ARGS)

# PYTHON must have the CUDA build of torch: make gpu-check PYTHON=/path/to/python ARGS='--out DIR'. ARGS=--rehearse needs
# no GPU and shows only that the check itself works.
gpu-check:
	$(PYTHON) tests/gpu/check.py $(ARGS)

# The wheel is for the Python of $(VENV) and for every torch >= 2.11 (docs/install.md).
wheel: $(ENV_STAMP)
	$(PIP) wheel --no-build-isolation --no-deps --wheel-dir $(DIST) .

sdist: $(ENV_STAMP)
	PYTHONPATH=csrc/setup $(PY) -c "import backend; print('$(DIST)/' + backend.build_sdist('$(DIST)'))"

# With --quiet, --strict would not see the warnings.
docs: $(DEV_STAMP)
	$(PY) -m mkdocs build --strict --config-file .mkdocs.yml

clean:
	rm -rf build dist *.egg-info dlkernels/_C.*.so
