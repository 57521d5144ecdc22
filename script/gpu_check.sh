#!/usr/bin/env bash
# Does the project work on this machine's GPU, and how fast: bash script/gpu_check.sh OUT [SECONDS] [flags of gpu_check.py]
# Needs no network and installs nothing. Leaves OUT/gpu.json, table.txt and, after failures, tracebacks.txt.
set -u
cd "$(dirname "$0")/.."
out=${1:?where to: bash script/gpu_check.sh OUT [SECONDS]} seconds=${2:-440}
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONDONTWRITEBYTECODE=1
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader 2>/dev/null
exec "$python" script/gpu_check.py "$out" --seconds "$seconds" "${@:3}"
