#!/usr/bin/env bash
# Full fine-tuning on all GPUs of this host:  ./fsdp_launch.sh [flags of train.py]
set -euo pipefail
cd "$(dirname "$0")"
gpus=${GPUS:-$(python -c 'import torch; print(torch.cuda.device_count() or 1)')}
exec torchrun --standalone --nproc_per_node "$gpus" train.py "$@"
