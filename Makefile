# Two commands do everything: `make demo` (the main job, end to end) and `make test`.
PYTHON ?= python3
BIN := .venv/bin
CONFIG := training/configs/turbulence_tiny_cpu.yaml
LAUNCH := $(BIN)/accelerate launch --config_file training/configs/single_process.yaml -m training.train --config $(CONFIG)

# Eddies about as large as a patch, moving by a pixel or so between snapshots: so the vorticity of a patch tells most of
# the velocity that carries it. At PDEBench's scales and spacing a patch does not determine its own future.
FLOW := --num-grid 64 --num-snapshots 21 --k-tot 8 --viscosity 1e-3 --warm-up-time 0.05 --dt-save 0.016

# accelerate launch gives a process one thread unless told otherwise.
demo demo-short: export OMP_NUM_THREADS ?= $(shell getconf _NPROCESSORS_ONLN)

.PHONY: demo demo-short card test lint

demo: .venv/.installed
	$(BIN)/python -m training.turbulence --out runs/demo/data.hdf5 --num-trajectories 96 $(FLOW)
	$(LAUNCH)
	$(BIN)/python -m eval.rollout --model runs/demo/model --data runs/demo/data.hdf5 --out runs/demo/results \
		--num-trajectories 3 --band 12 21 --samplings expectation sample --seeds 0 1 2

# The same path, made to run through rather than to learn.
demo-short: .venv/.installed
	rm -rf runs/demo-short
	$(BIN)/python -m training.turbulence --out runs/demo-short/data.hdf5 --num-trajectories 10 $(FLOW)
	$(LAUNCH) --data.path runs/demo-short/data.hdf5 --data.num_validation_items 64 --training.max_steps 20 \
		--training.eval_steps 10 --training.output_dir runs/demo-short/model
	$(BIN)/python -m eval.rollout --model runs/demo-short/model --data runs/demo-short/data.hdf5 \
		--out runs/demo-short/results --num-trajectories 1 --num-steps 2 --samplings expectation

# The model card and README's picture, from the demo's results.
card: .venv/.installed
	mkdir -p model_cards/leviathan
	cp runs/demo/results/results.json runs/demo/results/contact_sheet.png runs/demo/model/training.json model_cards/leviathan/
	$(BIN)/python -m eval.card --results model_cards/leviathan/results.json \
		--training model_cards/leviathan/training.json --out model_cards/leviathan.md

test: .venv/.installed
	$(BIN)/python -m pytest --numprocesses 2

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mlinter --no-cache leviathan

# One stamp for the environment: made on demand, remade when the requirements change.
.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[train,test,dev]"
	touch $@
