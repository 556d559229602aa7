# make demo    world -> data -> training -> evaluation -> a folder that the Hub accepts, all in demo/
# make test    the tests; make test-slow: those that take minutes; make lint: the style
# make test-libero   the tests of LIBERO, in an environment of its own, .venv-libero: it needs mujoco 3
# make docs    the documentation as a site in site/; warnings are errors
# Everything is installed into .venv. Interrupt at any point: the same command goes on from there.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT := demo
REPORT := $(OUT)/training/report
# the demo's world: small camera range, 96 px views, a table of known height, and the colour tells the objects apart
WORLD := --camera_range small --image_size 96 --world \
	'{"preset": "easy", "fovy_deg": 40, "workspace_extent": [0.22, 0.26], "table_height_m": [0, 0], "distinct_colors": true}'

export MUJOCO_GL ?= egl
export PYTHONWARNINGS ?= ignore
export TRANSFORMERS_VERBOSITY ?= error
export HF_HUB_DISABLE_TELEMETRY = 1

.PHONY: demo test test-slow test-libero lint docs install clean

install: $(VENV)/.installed

$(VENV)/.installed: requirements.lock setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Python 3.11 or newer is needed, this is $$($(PYTHON) --version); choose another: make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
		echo "The venv module is missing; on Debian and Ubuntu: sudo apt-get install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

demo: install
	$(BIN)/stereovla data build --preset demo --out $(OUT)/dataset $(WORLD)
	ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1 $(BIN)/python -m torch.distributed.run --standalone --nproc_per_node 2 \
		train.py --preset demo --dataset $(OUT)/dataset --output_dir $(OUT)/training
	$(BIN)/stereovla evaluate rollout --preset demo --model $(OUT)/training/model --out $(REPORT) $(WORLD)
	$(BIN)/stereovla evaluate offline --model $(OUT)/training/model --dataset $(OUT)/dataset --out $(REPORT)
	$(BIN)/stereovla evaluate report --training $(OUT)/training --out $(REPORT)
	$(BIN)/stereovla push --folder $(OUT)/training/model --report $(REPORT) --license apache-2.0 --dry_run

# as many processes as tests/conftest.py says, one thread each
test test-slow test-libero: export OMP_NUM_THREADS = 1
# a thread that waits for another gives its core away: two tests share it
test test-slow test-libero: export OMP_WAIT_POLICY = PASSIVE

test: install
	$(BIN)/python -m pytest -q -n auto

test-slow: install
	$(BIN)/python -m pytest -q -n auto -m slow

test-libero: .venv-libero/.installed
	.venv-libero/bin/python -m pytest -q -n auto tests/*/test_libero_*.py tests/simulation/test_simulation_*.py

.venv-libero/.installed: requirements.lock requirements-libero.lock setup.py
	$(PYTHON) -m venv .venv-libero
	grep -v '^mujoco' requirements.lock > .venv-libero/requirements.lock
	.venv-libero/bin/python -m pip install --quiet --disable-pip-version-check \
		-r .venv-libero/requirements.lock -r requirements-libero.lock
	.venv-libero/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(VENV)/.docs: $(VENV)/.installed docs/requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r docs/requirements.lock -c requirements.lock
	@touch $@

clean:
	rm -rf $(OUT)
