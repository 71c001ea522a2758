#!/usr/bin/env bash
# train.py on all GPUs of this host, or of several:  ./fsdp_launch.sh [flags of train.py]
#   on each of two hosts:  NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 ./fsdp_launch.sh …   (NODE_RANK=1 on the other)
#   under Slurm:           srun ./fsdp_launch.sh …   (examples/slurm.sbatch)
# Of a host the first GPUs if GPUS=2. When a rank dies, hangs or has no room, all start again from the last save, RESTARTS times at most.
set -euo pipefail
cd "$(dirname "$0")"
gpus=${GPUS:-$(python -c 'import torch; print(torch.cuda.device_count() or 1)')}
nodes=${NNODES:-${SLURM_NNODES:-1}} node=${NODE_RANK:-${SLURM_NODEID:-0}} first=${MASTER_ADDR:-}
where=(--standalone)
if [ "$nodes" -gt 1 ]; then
    if [ -z "$first" ] && [ -n "${SLURM_JOB_NODELIST:-}" ]; then
        first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    fi
    if [ -z "$first" ]; then
        printf '%s\n' "NNODES=$nodes: which of the hosts is the first?" "Say so on each: MASTER_ADDR=its address, and NODE_RANK=0 there, 1 … elsewhere." >&2
        exit 2
    fi
    # torchrun numbers hosts by the order of their names: the first one's is its address, the others' come behind any
    name=$first
    [ "$node" -eq 0 ] || name=$(printf '~%04d' "$node")
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # a store of its own for each start: hosts don't agree how often there was one
    where=(--nnodes "$nodes" --rdzv-backend c10d --rdzv-endpoint "$first:${MASTER_PORT:-29500}" --rdzv-id "${SLURM_JOB_ID:-doppelganger}"
        --rdzv-conf "is_host=$([ "$node" -eq 0 ] && echo 1 || echo 0)" --local-addr "$name")
fi
exec python -m torch.distributed.run "${where[@]}" --nproc_per_node "$gpus" --max-restarts "${RESTARTS:-3}" train.py "$@"
