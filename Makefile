# make demo       world -> data -> training -> evaluation -> a folder that the Hub accepts, in demo/
# make test       lint-free unit and integration tests; make test-slow: the long ones
# Everything is installed into .venv; interrupt at any point and the same command goes on.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT := demo

export MUJOCO_GL ?= egl
export PYTHONWARNINGS ?= ignore
export TRANSFORMERS_VERBOSITY ?= error
export TOKENIZERS_PARALLELISM = false
export HF_HUB_DISABLE_TELEMETRY = 1
export LP_NUM_THREADS ?= 0

.PHONY: demo test test-slow lint install clean

install: $(VENV)/.installed

$(VENV)/.installed: requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed, $$($(PYTHON) --version) was found; choose one with: make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
		|| { echo "The venv module is missing; on Debian or Ubuntu: sudo apt-get install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@touch $@

demo: install
	@$(BIN)/python -m simulation.display
	$(BIN)/python -m dataset_builder build --preset demo --out $(OUT)/dataset
	$(BIN)/python train.py --preset demo --dataset $(OUT)/dataset --output_dir $(OUT)/training
	$(BIN)/python -m evaluation rollout --preset demo --model $(OUT)/training/model --out $(OUT)/report
	$(BIN)/python -m evaluation offline --model $(OUT)/training/model --dataset $(OUT)/dataset --out $(OUT)/report
	$(BIN)/python -m evaluation report --training $(OUT)/training --out $(OUT)/report
	$(BIN)/python push_to_hub.py --folder $(OUT)/training/model --report $(OUT)/report --license apache-2.0 --dry_run

test: install
	$(BIN)/python -m pytest -q

test-slow: install
	$(BIN)/python -m pytest -q -m slow

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(OUT)
