#!/usr/bin/env bash
# The comparison of docs/comparison.md with all that it needs, for whoever has a GPU: bash benchmarks/comparison.sh [FOLDER [OPTIONS]]
# Records FOLDER/dataset, trains FOLDER/encoder on it, then every policy with three seeds, and measures each with its
# controls. The same command goes on where it was stopped; FOLDER/comparison/table.md grows policy by policy. OPTIONS are
# those of `python -m benchmarks.comparison`, such as --policies mono points-base; SIZE is lab, demo or tiny.
set -euo pipefail
cd "$(dirname "$0")/.."
folder="${1:-comparison}" size="${SIZE:-lab}" python="${PYTHON:-.venv/bin/python}"
[ -x "$python" ] || make install
export PYTHONWARNINGS=ignore TRANSFORMERS_VERBOSITY=error
# heights must be found out, and the camera stands elsewhere in every episode
world='{"preset": "easy", "fovy_deg": 40, "workspace_extent": [0.22, 0.26], "support_share": 0.8,
        "support_height_m": [0.0, 0.08], "table_height_m": [-0.03, 0.03], "distinct_colors": true}'
"$python" -m stereovla data build --preset "$size" --camera_range medium --world "$world" --processes "$(nproc)" \
    --out "$folder/dataset"
"$python" -m stereovla pretrain stereo --preset "$size" --dataset "$folder/dataset" --output_dir "$folder/encoder"
device="$("$python" -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")')"
exec "$python" -m benchmarks.comparison --dataset "$folder/dataset" --stereo_encoder "$folder/encoder/model" \
    --size "$size" --seeds 3 --episodes 200 --device "$device" --out "$folder/comparison" "${@:2}"
