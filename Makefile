# Each target does all the set-up that it needs, once. By default that happens in a virtual environment of the project;
# `make test PYTHON=python3 VENV=` uses that interpreter and its torch as they are and installs nothing.
TORCH  = torch==2.13.0
VENV   = .venv
PYTHON = python3
ARGS   =
QUICK  =
FAMILY =
RESULTS  = cpu-epyc-genoa-2-cores
SECONDS  = 60
SEED     =
CASES    =
SANITIZE =
# `make census`, `make models` and `make finetune` have public models in an environment of their own, which sees the torch of the one above.
CENSUS_VENV = $(if $(VENV),.venv-census)
# `make docs` has Sphinx in an environment of its own, likewise.
DOCS_VENV = $(if $(VENV),.venv-docs)
# `make cuda` has an environment and a library of its own, so that the ones above stay for the CPU.
CUDA_TORCH = torch==2.11.0
CUDA_VENV  = $(if $(VENV),.venv-cuda)
CUDA_BUILD = build/cuda
TORCH_CUDA_ARCH_LIST ?= 8.0 9.0+PTX
REPORT =
DIST   = dist

PY     := $(if $(VENV),$(VENV)/bin/python,$(PYTHON))
BIN    := $(if $(VENV),$(VENV)/bin/)
CENSUS_PY = $(if $(VENV),$(CENSUS_VENV)/bin/python,$(PYTHON))
DOCS_PY   = $(if $(VENV),$(DOCS_VENV)/bin/python,$(PYTHON))
TOOLS  := $(if $(VENV),$(VENV)/.tools-installed,interpreter)
# Named after the request, so that another TORCH= installs another torch.
TORCH_INSTALLED := $(VENV)/.torch-installed-$(shell printf %s '$(TORCH)' | cksum | cut -d' ' -f1)
CODE    := -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh'
SOURCES := setup.py $(shell find csrc $(CODE))

# Without these glibc returns every large block to the kernel, and page faults then dominate the times of all providers.
TIMED := GLIBC_TUNABLES=glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=17179869184
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

# Tests run in several processes. They must agree on the order of sets, and threads that wait must not spin beside others
# at work. Each takes a gigabyte.
WORKERS := $(shell cores=$$(nproc 2>/dev/null || echo 2); [ $$cores -lt 4 ] && echo $$cores || echo 4)
SPREAD  := PYTHONHASHSEED=0 OMP_WAIT_POLICY=passive

# V=1 shows all that compilers and pip say.
QUIET = V='$(V)' $(PYTHON) tools/quiet.py
say  = @echo "==> $(1)"
# $(call need,MODULES): stops with one sentence if the interpreter lacks one of them.
need = @$(PY) -c "import sys, importlib.util as u; no = [m for m in '$(1)'.split() if not u.find_spec(m)]; \
	no and sys.exit('$(PY) lacks ' + ', '.join(no) + ': install that, or leave VENV at its default.')"

.PHONY: help examples docs docs-test pictures wheel wheels index sdist packages clean-dist demo test fuzz sanitized bench readme rivals census models finetune gpu build cuda cuda-library lint lint-style lint-figures lint-types format clean interpreter
help:
	@echo "make demo | examples | test | wheel | wheels | index | sdist | packages | fuzz [SECONDS= SEED= CASES= SANITIZE=1] | bench [QUICK=1 FAMILY=orders|census] | readme | docs | docs-test | pictures | rivals | census | models | finetune | gpu OUT=dir | build | cuda | lint | format | clean     variables: TORCH VENV PYTHON DIST ARGS V=1"

demo: build
	$(call say,Running the demo)
	@$(TIMED) $(PY) examples/demo.py $(ARGS)

# Those that need nothing else; `make finetune` is the other one. Committed pictures: ARGS='--out examples/gallery'.
examples: build
	@for name in uncertainty tabular graph padded two_processes; do \
		echo "==> examples/$$name.py"; $(PY) examples/$$name.py --out build/examples $(ARGS) || exit 1; done

test: build
	$(call need,pytest)
	$(call say,Running the tests)
	@$(SPREAD) $(PY) -m pytest -q tests $(if $(VENV),-n $(WORKERS) --dist worksteal) $(ARGS)

# Random calls against the reference; with SANITIZE=1 under AddressSanitizer and UndefinedBehaviorSanitizer.
FUZZ := tests/fuzz.py --seconds $(SECONDS) $(if $(SEED),--seed $(SEED)) $(if $(CASES),--cases $(CASES))
fuzz: $(if $(filter-out 0,$(SANITIZE)),sanitized,build)
	$(call say,Random calls for $(SECONDS) seconds)
ifneq ($(filter-out 0,$(SANITIZE)),)
	@LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH="$(CURDIR)/build/sanitized" $(PY) $(FUZZ)
else
	@$(PY) $(FUZZ)
endif

# A package of its own in build/sanitized, compiled again only when a source has changed.
sanitized: $(TOOLS)
	$(call say,Compiling the operators with sanitizers (some minutes the first time))
	@FUSEDNORM_CUDA=0 FUSEDNORM_SANITIZE=1 $(QUIET) $(PY) setup.py --quiet build \
		--build-lib build/sanitized --build-temp build/sanitized-objects

BENCH_FAMILY := $(if $(FAMILY),$(or $(and $(filter orders,$(FAMILY)),--family),$(and $(filter census,$(FAMILY)),--census),\
	$(error FAMILY: orders or census)))
bench: build
	$(call say,Running the benchmarks)
	@$(TIMED) $(PY) benchmarks/run.py $(if $(filter-out 0,$(QUICK)),--quick) $(BENCH_FAMILY) $(ARGS)

# The figures, tables and picture of the README and of its like, from benchmarks/results; `make lint` checks them.
readme: $(TOOLS)
	@$(PY) benchmarks/publish.py $(RESULTS) $(ARGS)

# Which layers public models run: writes benchmarks/census.json, the rows of `make bench FAMILY=census`.
census: build $(if $(VENV),$(CENSUS_VENV)/.models-installed)
	$(call say,Counting the layers of public models (minutes))
	@$(CENSUS_PY) benchmarks/census.py $(ARGS)

# Whole public models, stock against fused.
models: build $(if $(VENV),$(CENSUS_VENV)/.models-installed)
	$(call say,Training whole models)
	@$(TIMED) $(CENSUS_PY) benchmarks/models.py $(ARGS)

# A torchvision model converted, trained, converted back and exported.
finetune: build $(if $(VENV),$(CENSUS_VENV)/.models-installed)
	@$(TIMED) $(CENSUS_PY) examples/finetune.py $(ARGS)

# $(call environment,VENV): an environment of its own, which sees the packages of the project's.
environment = @[ -x $(1)/bin/pip ] || $(PYTHON) -m venv $(1); \
	$(PY) -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> "$$($(1)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/project.pth"

# Without their dependencies, which would bring another torch: the list is complete.
$(CENSUS_VENV)/.models-installed: benchmarks/requirements-census.txt $(TOOLS)
	$(call say,Installing public models into $(CENSUS_VENV))
	$(call environment,$(CENSUS_VENV))
	@$(QUIET) $(CENSUS_PY) -m pip install --no-deps -r benchmarks/requirements-census.txt
	@touch $@

# The site, into build/docs; a public name without a place in it, a broken link or a missing picture is an error.
docs: build $(if $(VENV),$(DOCS_VENV)/.docs-installed)
	$(if $(VENV),@:,$(call need,sphinx furo myst_parser))
	$(call say,Building the documentation)
	@$(DOCS_PY) -m sphinx -W --keep-going -n -q -b html docs build/docs $(ARGS)
	@echo "build/docs/index.html"

# Builds it anew and looks at every page in headless Chromium (Debian: chromium chromium-driver), where that is there.
docs-test: build $(if $(VENV),$(DOCS_VENV)/.docs-installed)
	$(call say,Looking at the documentation)
	@$(DOCS_PY) -m pytest -q -rs tests/test_site.py $(ARGS)

# Of the site, from benchmarks/results.
pictures: build
	@$(PY) docs/_site/draw.py $(ARGS)

$(DOCS_VENV)/.docs-installed: requirements-docs.txt $(TOOLS)
	$(call say,Installing Sphinx into $(DOCS_VENV))
	$(call environment,$(DOCS_VENV))
	@$(QUIET) $(DOCS_PY) -m pip install -r requirements-docs.txt
	@touch $@

# oneDNN's batch normalisation as a library that `make bench ARGS=--rivals` times beside ours. Installs Debian's oneDNN
# if its header is missing and this is root; says how otherwise.
RIVAL := build/rivals/libonednn_rival.so
rivals:
	@command -v $${CXX:-c++} >/dev/null || { echo "A C++ compiler is needed: apt-get install g++"; exit 1; }
	@header() { echo '#include <dnnl.hpp>' | $${CXX:-c++} -std=c++17 -fsyntax-only -x c++ - 2>/dev/null; }; \
	header || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
		&& echo "==> Installing oneDNN: apt-get install -y libdnnl-dev" && apt-get install -y libdnnl-dev; } || true; \
	header || { echo "oneDNN's header dnnl.hpp is missing: apt-get install libdnnl-dev"; exit 1; }
	@$(MAKE) -s $(RIVAL)

$(RIVAL): benchmarks/rivals/onednn.cpp
	$(call say,Compiling $@)
	@mkdir -p $(@D)
	@$${CXX:-c++} -std=c++17 -O2 -Wall -Wextra -fPIC -shared -fopenmp $< -ldnnl -o $@

# Needs a GPU, and no network with `PYTHON=python3 VENV=`; builds only if no library is here that runs on that GPU.
gpu: $(TOOLS)
	@[ -n "$(OUT)" ] || { echo "make gpu OUT=dir: name a folder for the results"; exit 1; }
	$(call say,Testing and measuring on the GPU: minutes)
	@$(PY) benchmarks/gpu.py --out '$(OUT)' $(ARGS)

# With the torch of the environment: a wheel's name says which. Not in isolation, where pip would fetch another. What an
# earlier build left in build/lib would be packed too. torch brings what is not ours, the OpenMP runtime among it, of which
# a process must have one alone.
NOT_OURS := libtorch*.so* libc10*.so* libgomp.so.1 libcudart.so.*
SCRIPTS   = $$($(PY) -c 'import sysconfig; print(sysconfig.get_path("scripts"))')
wheel: $(TOOLS)
	$(call need,build auditwheel)
	$(call say,Building a wheel (some minutes the first time))
	@rm -rf build/wheel build/lib.*
	@$(QUIET) $(PY) -m build --wheel --no-isolation --outdir build/wheel $(ARGS) .
	@PATH="$(SCRIPTS):$$PATH" $(QUIET) $(PY) -m auditwheel repair $(NOT_OURS:%=--exclude '%') \
		--wheel-dir $(DIST) build/wheel/*.whl
	@ls -t $(DIST)/*.whl | head -n 1
sdist: $(TOOLS)
	$(call need,build)
	$(call say,Building a source distribution)
	@$(QUIET) $(PY) -m build --sdist --no-isolation --outdir $(DIST) $(ARGS) .
	@ls -t $(DIST)/*.tar.gz | head -n 1

# A wheel for each torch of pip's index, each tested; ARGS=--dry-run says what that would be.
wheels: $(TOOLS)
	$(call need,packaging rich)
	@$(PY) tools/matrix.py --dist $(DIST) $(ARGS)
index: $(TOOLS)
	@$(PY) tools/index.py $(DIST)

# Both, installed into fresh environments as users would; the source distribution is compiled there: minutes.
packages: clean-dist
	@$(MAKE) -s wheel sdist
	$(call say,Installing the wheel and the source distribution)
	@$(PY) tests/check_packages.py $(DIST)
clean-dist:
	@rm -f "$(DIST)"/fusednorm-*.whl "$(DIST)"/fusednorm-*.tar.gz

# The library is also stale when it was built for another torch than the one at hand.
build: $(TOOLS)
	@$(PY) -c "import importlib.util as u, pathlib as p, runpy, sys; built = runpy.run_path('fusednorm/_built_for.py'); \
	torch = runpy.run_path(str(p.Path(u.find_spec('torch').origin).with_name('version.py')))['__version__']; \
	sys.exit(built['TORCH'] != torch)" 2>/dev/null \
	|| rm -f fusednorm/_ops.so
	@$(MAKE) -s fusednorm/_ops.so fusednorm.egg-info/entry_points.txt

# By these torch finds the backend of torch.compile, in a checkout as in an installed package.
fusednorm.egg-info/entry_points.txt: pyproject.toml
	@$(QUIET) $(PY) setup.py --quiet egg_info
	@touch $@

fusednorm/_ops.so: $(SOURCES)
	@command -v $${CXX:-c++} >/dev/null || { echo "A C++ compiler is needed: apt-get install g++"; exit 1; }
	$(call say,Compiling the operators (some minutes the first time))
	@$(QUIET) $(PY) setup.py --quiet build_ext --inplace
	@touch $@

# Compiles the CUDA kernels and checks what can be checked without a GPU. The package in $(CUDA_BUILD) is complete.
cuda:
	@command -v nvcc >/dev/null || [ -x "$${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ] \
	|| { echo "nvcc is needed, of the CUDA that $(CUDA_TORCH) is built with: put it on the PATH or set CUDA_HOME"; exit 1; }
	@$(MAKE) -s VENV=$(CUDA_VENV) TORCH='$(CUDA_TORCH)' cuda-library

cuda-library: $(TOOLS) $(if $(VENV),$(VENV)/.cuda-tools-installed)
	$(call say,Compiling the operators with their CUDA kernels for $(TORCH_CUDA_ARCH_LIST))
	@start=$$(date +%s); \
	FUSEDNORM_CUDA=1 TORCH_CUDA_ARCH_LIST='$(TORCH_CUDA_ARCH_LIST)' $(QUIET) $(PY) setup.py --quiet build \
		--build-lib $(CUDA_BUILD) --build-temp $(CUDA_BUILD)-objects && echo "==> $$(($$(date +%s) - start)) seconds"
	$(call say,Checking that library)
	@PYTHONPATH="$(CURDIR)/$(CUDA_BUILD):$$PYTHONPATH" $(PY) tests/check_cuda_build.py \
		--architectures '$(TORCH_CUDA_ARCH_LIST)' $(if $(filter-out 0,$(REPORT)),--every)
	$(call say,Executing its machine code and counting its instructions and sectors)
	@export PYTHONPATH="$(CURDIR)/$(CUDA_BUILD):$$PYTHONPATH" FUSEDNORM_CUDA_LIBRARY=$(CUDA_BUILD)/fusednorm/_ops.so; \
	$(PY) benchmarks/cuda_counts.py --library $$FUSEDNORM_CUDA_LIBRARY $(if $(filter-out 0,$(REPORT)),--report) \
		> $(CUDA_BUILD)/counts.txt 2>&1 & counting=$$!; \
	$(PY) -P -m pytest -q tests/test_cuda_machine.py; tested=$$?; \
	wait $$counting; counted=$$?; cat $(CUDA_BUILD)/counts.txt; exit $$((tested || counted))

$(VENV)/.cuda-tools-installed: requirements-cuda.txt $(TORCH_INSTALLED)
	@$(QUIET) $(PY) -m pip install -r requirements-cuda.txt
	@touch $@

interpreter:
	$(call need,torch setuptools)

$(VENV)/bin/pip:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not there: apt-get install python3 python3-venv"; exit 1; }
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || { echo "Python 3.11 or newer is needed; name one with PYTHON=."; exit 1; }
	@$(PYTHON) -c "import venv, ensurepip" 2>/dev/null || { echo "Python's venv module is needed: apt-get install python3-venv"; exit 1; }
	$(call say,Making the virtual environment $(VENV))
	@$(PYTHON) -m venv $(VENV)

# torch before the tools and on its own, so that nothing else can choose its version.
$(TORCH_INSTALLED): | $(VENV)/bin/pip
	$(call say,Installing $(TORCH) (a large download the first time))
	@$(QUIET) $(PY) -m pip install '$(TORCH)'
	@rm -f $(VENV)/.torch-installed-*
	@touch $@

$(VENV)/.tools-installed: requirements-dev.txt $(TORCH_INSTALLED)
	$(call say,Installing the pinned tools)
	@$(QUIET) $(PY) -m pip install -r requirements-dev.txt
	@touch $@

# In parts, as .pre-commit-config.yaml runs them.
lint: lint-style lint-figures lint-types

lint-style: $(TOOLS)
	$(call say,Checking style)
	@$(BIN)ruff check .
	@$(BIN)ruff format --check .
	@find csrc tests benchmarks $(CODE) | xargs $(BIN)clang-format --dry-run -Werror

lint-figures: $(TOOLS)
	$(call say,Checking the figures of the README and its like)
	@$(PY) benchmarks/publish.py $(RESULTS) --check

lint-types: $(TOOLS)
	$(call say,Checking types)
	@$(PY) -m mypy
	@PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(PY) -m pyright --pythonpath "$$($(PY) -c 'import sys; print(sys.executable)')"

format: $(TOOLS)
	$(call say,Formatting)
	@$(BIN)ruff check --fix .
	@$(BIN)ruff format .
	@find csrc tests benchmarks $(CODE) | xargs $(BIN)clang-format -i

clean:  # all that was built; the virtual environment stays
	rm -rf build dist *.egg-info fusednorm/_ops.so fusednorm/_built_for.py
