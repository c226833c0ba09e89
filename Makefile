# Set-up and the commands of every day. `make` alone lists them.

PYTHON ?= python3
HOST ?= 127.0.0.1
PORT ?= 8000
MODEL ?= demo/target
SPECULATE ?= --speculate draft=demo/draft --speculate ngram --speculate prediction
ARGS ?=
CLIENTS ?=
FAMILY ?= demo
# a family under build/ is inflated to the shape that its name says
INFLATED = $(patsubst %,%/inflate.json,$(filter build/%,$(FAMILY)))
RESULTS ?= $(wildcard $(foreach kind,matrix offline compare gpu,benchmarks/results/$(kind)*.json) benchmarks/results/*.txt)
PYTEST_ARGS ?= -n 2 --dist worksteal
GUESSERS := ngram suffix:max_cache_mb=16 retrieval=build/stdlib.store recycling lookahead

VENV := .venv
BIN := $(VENV)/bin
RAY := build/ray
LLAMA := build/llama.cpp
LLAMA_VERSION := 0.3.36
LLAMA_SOURCES := build/llama-source
KERNEL_SOURCES := $(wildcard models/kernels/*.cpp models/kernels/*.h models/kernels/*.py)

.DEFAULT_GOAL := help
.PHONY: help setup serve test test-schemas rehearse-image lint faults soak overload bench-quick bench-matrix bench-offline bench-compare \
    bench-drafters bench-structured bench-gpu bench-first-token bench-http bench-http-cost bench-report clients check-dashboard \
    serve-ray test-ray llama-cpp clean

help:
	@echo "make setup         create $(VENV), install everything, build the CPU kernels"
	@echo "make serve         set up, then serve the demo model on http://$(HOST):$(PORT)"
	@echo "                   (HOST, PORT, MODEL, SPECULATE and ARGS change what is served)"
	@echo "make test          set up, then lint, types and all tests; this is what CI runs"
	@echo "make test-schemas  set up, then hold the demo model to 300 JSON schemas, 20 texts each (CI: 2)"
	@echo "make lint          set up, then lint and types only"
	@echo "make clients       set up, then run real clients of OpenAI's API, each in an environment of its own (CLIENTS=\"NAME ...\")"
	@echo "make serve-ray     serve two replicas of the demo model with Ray Serve, in an environment of its own (ARGS)"
	@echo "make test-ray      the same environment, then start replicas and kill them: minutes"
	@echo "make check-dashboard  set up, then ask a Prometheus all that the dashboard asks, of the demo model under load (ARGS=\"--prometheus PROGRAM\")"
	@echo "make rehearse-image  set up, then go through docker/Dockerfile without Docker, in a folder (ARGS=\"--build-arg NAME=VALUE\")"
	@echo "make faults        set up, then the fault tests at full size, on the demo model as well"
	@echo "make soak          set up, then half an hour of mixed load; memory and descriptors must stay flat (ARGS=--minutes 2)"
	@echo "make overload      set up, then four times the load that the server can take (ARGS=--seconds 20)"
	@echo "make bench-quick   set up, then measure the demo model against plain decoding and transformers"
	@echo "make bench-matrix  set up, then compare auto with plain decoding and fixed trees (FAMILY=demo)"
	@echo "make bench-offline set up, then measure one request at a time, and what its step is made of (FAMILY=demo)"
	@echo "make bench-compare set up, then compare with transformers and llama.cpp (FAMILY=demo)"
	@echo "make bench-drafters set up, then measure drafters without training, and write their page (FAMILY=demo)"
	@echo "make bench-structured set up, then measure tokens per step under JSON schemas, and write their page (FAMILY=demo)"
	@echo "make bench-gpu     set up, then measure an 8B-shaped target on a CUDA device, in under 8 minutes"
	@echo "make bench-first-token set up, then measure how long first tokens wait under drafting (FAMILY=demo)"
	@echo "make bench-http    set up, then measure how many tokens a second the HTTP process streams on one core"
	@echo "make bench-http-cost set up, then measure what serving over HTTP costs against in-process use (FAMILY=demo)"
	@echo "make bench-report  set up, then write docs/benchmarks.md from benchmarks/results"
	@echo "make llama-cpp     set up, then build llama.cpp's server, which benchmarks compare with"
	@echo "make clean         remove $(VENV) and everything that was built"

setup: $(VENV)/.kernels

# Each stamp is newer than what it was made from; a step that failed leaves none and runs again.
$(VENV)/.venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "Saccade needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>/dev/null || echo 'not there')."; \
	    echo "Name another one: make PYTHON=/path/to/python3.12 $(or $(MAKECMDGOALS),setup)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "'$(PYTHON)' has no venv module; on Debian and Ubuntu it is the package python3-venv."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.packages: $(VENV)/.venv pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

$(VENV)/.kernels: $(VENV)/.packages $(KERNEL_SOURCES)
	$(BIN)/python -m models.kernels.build
	@touch $@

serve: setup
	exec $(BIN)/saccade serve $(MODEL) $(SPECULATE) --host $(HOST) --port $(PORT) $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# One thread a worker: the tests' tensors are tiny, and threads of several workers only fight over the cores.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

test-schemas: setup
	OMP_NUM_THREADS=1 SACCADE_SCHEMA_SEEDS=20 $(BIN)/python -m pytest tests/schemas

clients: setup
	$(BIN)/python -m tests.clients.run $(CLIENTS)

# Ray brings some thirty packages, so it has an environment of its own.
$(RAY)/.kernels: $(VENV)/.venv pyproject.toml constraints.txt $(KERNEL_SOURCES)
	$(PYTHON) -m venv $(RAY)
	$(RAY)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[ray]' pytest openai
	$(RAY)/bin/python -m models.kernels.build
	@touch $@

serve-ray: $(RAY)/.kernels
	exec $(RAY)/bin/saccade ray docker/ray/serve.yaml $(ARGS)

test-ray: $(RAY)/.kernels
	$(RAY)/bin/python -m pytest $(wildcard tests/ray/check_*.py) $(ARGS)

rehearse-image: setup
	$(BIN)/python -m tests.image.rehearse $(ARGS)

check-dashboard: setup
	$(BIN)/python -m tests.dashboard.ask_prometheus $(ARGS)

faults: setup
	FAULTS=10 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/process/test_faults.py $(ARGS)

soak: setup
	$(BIN)/python -m benchmarks.soak $(ARGS)

overload: setup
	$(BIN)/python -m benchmarks.overload $(ARGS)

bench-quick: setup
	$(BIN)/python -m benchmarks.quick $(ARGS)

bench-matrix bench-offline: bench-%: setup $(INFLATED)
	$(BIN)/python -m benchmarks.$* --family $(FAMILY) $(ARGS)

bench-first-token: setup $(INFLATED)
	$(BIN)/python -m benchmarks.first_token --family $(FAMILY) $(ARGS)

bench-compare: setup llama-cpp $(INFLATED)
	$(BIN)/python -m benchmarks.compare --family $(FAMILY) --tune $(ARGS)

# a corpus that every machine has, and that the workloads were not made of
build/stdlib.store: | setup
	stdlib=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))') && \
	    $(BIN)/saccade datastore build $$stdlib/asyncio $$stdlib/email $$stdlib/http $$stdlib/json $$stdlib/logging $$stdlib/unittest \
	    $$stdlib/*.py --include '*.py' --tokenizer demo/target --out $@

# results of an earlier run make way: the page tells of one
bench-drafters bench-structured: result = benchmarks/results/$(1)-$(notdir $(FAMILY)).json
bench-drafters: setup llama-cpp $(INFLATED) build/stdlib.store
	$(BIN)/python -m benchmarks.drafters --family $(FAMILY) --peers transformers llama --tune --out $(call result,drafters) \
	    --drafters $(GUESSERS) early-exit prediction draft ngram+suffix+recycling+prediction ngram+suffix+prediction+draft $(ARGS)
	$(BIN)/python -m benchmarks.idle_cost --family $(FAMILY) --drafters $(GUESSERS) prediction ngram+suffix+recycling+prediction \
	    --out $(call result,idle-cost)
	$(BIN)/python -m benchmarks.store_bounds --family $(FAMILY) --drafters $(GUESSERS) --bound 64MiB --out $(call result,store-bounds)
	$(BIN)/python -m benchmarks.drafters_page $(foreach kind,drafters idle-cost store-bounds,$(call result,$(kind)))

bench-structured: setup $(INFLATED)
	$(BIN)/python -m benchmarks.structured --family $(FAMILY) --out $(call result,structured) $(ARGS)
	$(BIN)/python -m benchmarks.structured_page $(call result,structured)

build/%/inflate.json: | setup
	$(BIN)/python -m benchmarks.inflate demo/target build/$* --shape $*

bench-gpu: setup
	$(BIN)/python -m benchmarks.gpu $(ARGS)

bench-http: setup
	$(BIN)/python -m benchmarks.http_stream --out benchmarks/results/http-stream.json $(ARGS)

bench-http-cost: setup $(INFLATED)
	$(BIN)/python -m benchmarks.http_cost --family $(FAMILY) $(ARGS)

bench-report: setup
	$(BIN)/python -m benchmarks.speed_report $(RESULTS) $(ARGS)

# llama.cpp's releases are on no package index; its whole source lies in the source package of its Python binding.
llama-cpp: $(LLAMA)/bin/llama-server

$(LLAMA)/bin/llama-server: | $(VENV)/.packages
	mkdir -p $(LLAMA_SOURCES)
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --no-binary llama-cpp-python \
	    --dest $(LLAMA_SOURCES) llama-cpp-python==$(LLAMA_VERSION)
	tar -xzf $(LLAMA_SOURCES)/llama_cpp_python-$(LLAMA_VERSION).tar.gz -C $(LLAMA_SOURCES) --strip-components 1
	$(BIN)/cmake -S $(LLAMA_SOURCES)/vendor/llama.cpp -B $(LLAMA) -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
	    -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_UI=OFF \
	    -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF
	$(BIN)/cmake --build $(LLAMA) --target llama-server

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
