#!/usr/bin/env bash
# One CUDA machine, no downloads: the first eight minutes, then `bench/gpu.sh 2`.
# bench/gpu.py says what they show.
set -euo pipefail
cd "$(dirname "$0")/.."
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
exec "${PYTHON:-python3}" -m bench.gpu "$@"
