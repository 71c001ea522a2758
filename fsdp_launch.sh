#!/usr/bin/env bash
# Full fine-tuning on all GPUs of this host:  ./fsdp_launch.sh [flags of train.py]
# When a rank dies, hangs or has no room, all start again from the last save, RESTARTS times at most.
set -euo pipefail
cd "$(dirname "$0")"
gpus=${GPUS:-$(python -c 'import torch; print(torch.cuda.device_count() or 1)')}
exec python -m torch.distributed.run --standalone --nproc_per_node "$gpus" --max-restarts "${RESTARTS:-3}" train.py "$@"
