# Two commands do everything: `make demo` (the main job, end to end) and `make test`.
PYTHON ?= python3
BIN := .venv/bin
CONFIG := training/configs/turbulence_tiny_cpu.yaml
LAUNCH := $(BIN)/accelerate launch --config_file training/configs/single_process.yaml -m training.train --config $(CONFIG)

# Eddies about as large as a patch, moving by a pixel or so between snapshots: so the vorticity of a patch tells most of
# the velocity that carries it. At PDEBench's scales and spacing a patch does not determine its own future.
FLOW := --num-grid 64 --num-snapshots 21 --k-tot 8 --viscosity 1e-3 --warm-up-time 0.05 --dt-save 0.016

# accelerate launch gives a process one thread unless told otherwise.
demo demo-short text turbulence: export OMP_NUM_THREADS ?= $(shell getconf _NPROCESSORS_ONLN)

.PHONY: demo demo-short text text-study turbulence turbulence-data turbulence-card heads speed card text-card khronos khronos-card vsna-study vsna-card span-study span-card janus janus-study janus-card scaling app docs test lint

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

# Text: TEXT is a folder with train, validation and test files (.jsonl, .jsonl.zst, .jsonl.gz, .parquet or .txt). For other
# text or another vocabulary, start with `rm -rf runs/text`: what is there is taken as it is.
TEXT ?= runs/text/data
VOCABULARY ?= 8192
TEXT_CONFIG := --config training/configs/text_tiny_cpu.yaml
TEXT_DATA := --data.train "$(TEXT)/train*" --data.validation "$(TEXT)/validation*" --data.test "$(TEXT)/test*"

text: runs/text/order.safetensors
	$(BIN)/accelerate launch --config_file training/configs/single_process.yaml -m training.train $(TEXT_CONFIG) $(TEXT_DATA)
	$(BIN)/python -m eval.language --model runs/text/model --data "$(TEXT)/test*" --out runs/text/results

runs/text/tokenizer/tokenizer.json: | .venv/.installed
	$(BIN)/python -m training.tokenizer --train "$(TEXT)/train*" --vocab-size $(VOCABULARY) --out runs/text/tokenizer

runs/text/order.safetensors: runs/text/tokenizer/tokenizer.json
	$(BIN)/python -m training.token_order $(TEXT_CONFIG) $(TEXT_DATA) --out $@

runs/text/order_random.safetensors: runs/text/tokenizer/tokenizer.json
	$(BIN)/python -m training.token_order $(TEXT_CONFIG) $(TEXT_DATA) --method random --out $@

# All embeddings under one body (hours on two cores; ARMS="--only ..." trains a part of them beside another process).
STEPS ?= 240
STUDY = runs/text/study-$(VOCABULARY)-$(STEPS)
text-study: runs/text/order.safetensors runs/text/order_random.safetensors
	$(BIN)/python -m eval.study $(TEXT_CONFIG) --arms training/configs/text_arms.yaml $(ARMS) --out $(STUDY) \
		--tune training.embedding_learning_rate=2e-3,3e-2 --seeds 0 1 2 $(TEXT_DATA) \
		--training.max_steps $(STEPS) --training.warmup_steps $$(($(STEPS) / 7)) --training.eval_steps $$(($(STEPS) / 20)) \
		--training.save_steps $(STEPS) --training.logging_steps $$(($(STEPS) / 4)) --training.disable_tqdm true \
		--training.dataloader_num_workers 0 --data.num_validation_sequences 96

# The study of turbulence: models of tokens and operators, isolated patches, whole fields and patches with a margin (hours
# on two cores; ARMS="--only ..." and ARMS="--settings ..." do a part of it beside another process).
TURBULENCE := runs/turbulence
turbulence: $(TURBULENCE)/data.hdf5
	$(BIN)/python -m eval.turbulence --study training/configs/turbulence_arms_cpu.yaml --out $(TURBULENCE)/study $(ARMS)

$(TURBULENCE)/data.hdf5: | .venv/.installed
	$(BIN)/python -m training.turbulence --out $@ --num-trajectories 160 --num-grid 64 --num-snapshots 21 --k-tot 4 \
		--viscosity 5e-4 --warm-up-time 0.1 --dt-save 0.02

# Fields at the paper's size, for training/configs/turbulence_arms_64.yaml: on a GPU. Decaying at PDEBench's spacing and at
# a tenth of it, and forced. A thousand flows are 44 GB a file.
DEVICE ?= cuda
FLOWS ?= 1000
SIZE := --num-grid 512 --num-snapshots 21 --num-trajectories $(FLOWS) --hyperviscosity 3e-22 --hyperviscosity-order 4
turbulence-data: .venv/.installed
	$(BIN)/python -m training.turbulence --device $(DEVICE) --out runs/turbulence_512/decaying.hdf5 $(SIZE) \
		--viscosity 1e-5 --dt-save 0.05
	$(BIN)/python -m training.turbulence --device $(DEVICE) --out runs/turbulence_512/decaying_fine.hdf5 $(SIZE) \
		--viscosity 1e-5 --dt-save 0.005
	$(BIN)/python -m training.turbulence --device $(DEVICE) --out runs/turbulence_512/forced.hdf5 $(SIZE) \
		--viscosity 1e-5 --dt-save 0.05 --forcing band --forcing-wavenumber 4 --forcing-amplitude 2 --drag 0.1 \
		--warm-up-time 5

# A dense head against one of digits, at 65,536 levels (an hour on two cores).
heads: .venv/.installed
	$(BIN)/python -m training.turbulence --out runs/demo/data.hdf5 --num-trajectories 96 $(FLOW)
	$(BIN)/python -m eval.study --config $(CONFIG) --compare model.output_head=digits,dense \
		--tune training.learning_rate=1e-3,2e-3,4e-3,8e-3 --seeds 0 1 2 --out runs/head \
		--tokenizer.num_bits 16 --tokenizer.base 256 --model.loss_chunk_size 512 --data.context_noise 1024 \
		--data.num_validation_items 256 --training.max_steps 400 --training.eval_steps 100 --training.save_steps 400 \
		--training.logging_steps 50 --training.disable_tqdm true
	cp runs/head/study.json model_cards/leviathan/heads.json

# Every fast path against its twin; on a machine that does nothing else.
speed: .venv/.installed
	$(BIN)/python -m eval.speed --out model_cards/leviathan/speed.json

# The model card and README's picture, from the demo's results and the records that `heads` and `speed` left.
card: .venv/.installed
	mkdir -p model_cards/leviathan
	cp runs/demo/results/results.json runs/demo/results/contact_sheet.png runs/demo/model/training.json model_cards/leviathan/
	$(BIN)/python -m eval.card --results model_cards/leviathan/results.json \
		--training model_cards/leviathan/training.json --heads model_cards/leviathan/heads.json \
		--speed model_cards/leviathan/speed.json --out model_cards/leviathan.md

# The same for text, from the arms that text-study has trained so far.
text-card: .venv/.installed
	$(MAKE) text-study ARMS=--finished
	$(BIN)/python -m eval.language_study --study $(STUDY) --data "$(TEXT)/test*" --num-sequences 1024 \
		--draw separable_all separable_ordered separable_permuted lookup_untied lookup_tied lookup_untied_started \
		--out model_cards/leviathan_text
	$(BIN)/python -m eval.text_card --study model_cards/leviathan_text/language.json --out model_cards/leviathan_text.md

# The same for turbulence, with the studies of samplings and of embeddings of its models.
CARD := model_cards/leviathan_turbulence
MODELS := $(TURBULENCE)/study
turbulence-card: .venv/.installed
	$(BIN)/python -m eval.turbulence --study training/configs/turbulence_arms_cpu.yaml --out $(TURBULENCE)/study --finished
	$(BIN)/python -m eval.sampling --model $(MODELS)/patches/leviathan/model --data $(TURBULENCE)/data.hdf5 \
		--out $(TURBULENCE)/sampling
	$(BIN)/python -m eval.embeddings --out $(TURBULENCE)/embeddings --models separable=$(MODELS)/patches/leviathan/model \
		reflected=$(MODELS)/patches/reflected/model \
		lookup=$(MODELS)/patches/lookup/model low_rank=$(MODELS)/patches/low_rank/model
	mkdir -p $(CARD)
	cp $(MODELS)/turbulence.json $(MODELS)/*.png $(MODELS)/*.gif $(TURBULENCE)/sampling/* $(TURBULENCE)/embeddings/* $(CARD)/
	$(BIN)/python -m eval.turbulence_card --study $(CARD)/turbulence.json --sampling $(CARD)/sampling.json \
		--embeddings $(CARD)/embeddings.json --remarks $(CARD)/remarks.md --out $(CARD).md

# KHRONOS against its peers, and on the Inconel 718 data in INCONEL (xiaoyuxie-vico/DL_AM_Data): about half an hour on two cores.
INCONEL ?= runs/inconel718
khronos: .venv/.installed
	$(BIN)/python -m training.khronos_inconel --data "$(INCONEL)" --out runs/khronos/inconel
	$(BIN)/python -m eval.khronos --out runs/khronos

khronos-card: .venv/.installed
	mkdir -p model_cards/khronos
	cp runs/khronos/khronos.json runs/khronos/inconel/inconel.json model_cards/khronos/
	$(BIN)/python -m eval.khronos_card --study model_cards/khronos/khronos.json --inconel model_cards/khronos/inconel.json \
		--inversion runs/khronos/inconel/inversion.safetensors --remarks model_cards/khronos/remarks.md --out model_cards/khronos.md

# VSNA: its sizes, peers and the laser, whose model may be one that is there (LASER="--laser-model runs/vsna/laser"); about
# half an hour on a core.
VSNA := runs/vsna/study
vsna-study: .venv/.installed
	$(BIN)/python -m eval.vsna --out $(VSNA) $(LASER)

vsna-card: .venv/.installed
	mkdir -p model_cards/vsna
	cp $(VSNA)/vsna.json $(VSNA)/plume.safetensors $(VSNA)/laser.safetensors model_cards/vsna/
	$(BIN)/python -m eval.vsna_card --study model_cards/vsna/vsna.json --remarks model_cards/vsna/remarks.md \
		--out model_cards/vsna.md

# SPAN beside MLPs and KANs of its size (hours on two cores; resumable); PROCESSES runs at one time.
SPAN := runs/span
PROCESSES ?= 2
span-study: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m eval.span --out $(SPAN) --processes $(PROCESSES)

span-card: .venv/.installed
	mkdir -p model_cards/span
	cp $(SPAN)/study/* model_cards/span/
	$(BIN)/python -m eval.span_card --study model_cards/span/span.json --remarks model_cards/span/remarks.md \
		--out model_cards/span.md

# Janus: cells labelled by homogenisation, a model of them, and the beam (half an hour on two cores); what is there is kept.
JANUS := runs/janus
janus: .venv/.installed
	$(BIN)/python -m training.microstructures --out $(JANUS)/cells --num-cells 6000 --seed 0 --processes $(PROCESSES)
	test -f $(JANUS)/model/record.json || \
		$(BIN)/python -m training.janus --config training/configs/janus_cpu.yaml --out $(JANUS)/model
	test -f $(JANUS)/beam/beam.json || \
		$(BIN)/python -m training.janus_beam --model $(JANUS)/model --out $(JANUS)/beam --refine physics

# Its separable head against an MLP, five trainings each, and all that its card tells (hours on two cores; resumable).
janus-study: janus
	OMP_NUM_THREADS=1 $(BIN)/python -m eval.janus --out $(JANUS)/study --data $(JANUS)/cells --beam $(JANUS)/beam \
		--processes $(PROCESSES)

janus-card: .venv/.installed
	mkdir -p model_cards/janus
	cp $(JANUS)/study/janus.json $(JANUS)/study/arrays.safetensors $(JANUS)/beam/*.png model_cards/janus/
	$(BIN)/python -m eval.janus_card --study model_cards/janus/janus.json --remarks model_cards/janus/remarks.md \
		--out model_cards/janus.md

# What training takes past one machine: counted, planned, and checked on this one.
scaling: .venv/.installed
	$(BIN)/python -m eval.scaling --out model_cards/scaling --card model_cards/scaling.md

# All of them in a browser, those that are trained.
app: .venv/.installed
	$(BIN)/python -m eval.app

# The site: README, guides, cards and the reference, in runs/docs.
docs: .venv/.installed
	$(BIN)/python -m mkdocs build --quiet

test: .venv/.installed
	$(BIN)/python -m pytest --numprocesses 2

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mlinter --no-cache leviathan
	$(BIN)/mypy

# One stamp for the environment: made on demand, remade when the requirements change.
.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[train,test,dev]"
	touch $@
