#!/usr/bin/env bash
# All that docs/inference.md wants to know of a GPU, in 8 minutes: bash benchmarks/on_gpu.sh [FOLDER]
# FOLDER/rows.jsonl and FOLDER/table.md grow row by row, so a run that is killed leaves what it has measured.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-.venv/bin/python}"
export PYTHONWARNINGS=ignore TRANSFORMERS_VERBOSITY=error
exec timeout --kill-after 10 "${ON_GPU_SECONDS:-500}" "$python" -m benchmarks.on_gpu --out "${1:-on_gpu}" --minutes 8 "${@:2}"
