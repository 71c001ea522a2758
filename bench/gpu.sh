#!/usr/bin/env bash
# One CUDA machine, eight minutes, no downloads: LoRA, full, QLoRA and pure bf16 of a random 7B, beside transformers + PEFT.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTORCH_ALLOC_CONF=expandable_segments:True TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
exec "${PYTHON:-python3}" -m bench.step --gpu "$@"
