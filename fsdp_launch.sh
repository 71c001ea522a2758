#!/usr/bin/env bash
# Run train.py on all GPUs of this host, or of several:  ./fsdp_launch.sh [flags of train.py]
#   on two hosts:  NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 ./fsdp_launch.sh …  (NODE_RANK=1 on the other)
#   under Slurm:   srun ./fsdp_launch.sh …  (examples/slurm.sbatch)
# GPUS=2 takes the first two of a host. When a rank dies, hangs or runs out of memory, all ranks start
# again from the last checkpoint, at most RESTARTS times (default: 3).
set -euo pipefail
cd "$(dirname "$0")"
gpus=${GPUS:-$(python -c 'import torch; print(torch.cuda.device_count() or 1)')}
nodes=${NNODES:-${SLURM_NNODES:-1}}
node=${NODE_RANK:-${SLURM_NODEID:-0}}
master=${MASTER_ADDR:-}
rendezvous=(--standalone)
if [ "$nodes" -gt 1 ]; then
    if [ -z "$master" ] && [ -n "${SLURM_JOB_NODELIST:-}" ]; then
        master=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    fi
    if [ -z "$master" ]; then
        printf '%s\n' "NNODES=$nodes: which of the hosts is the first?" \
            "Set MASTER_ADDR to its address on every host, and NODE_RANK: 0 there, 1 and up elsewhere." >&2
        exit 2
    fi
    # torchrun numbers hosts by the order of their names. The first host's name is its address; the
    # others' begin with ~, which sorts last.
    is_host=0 name=$(printf '~%04d' "$node")
    if [ "$node" -eq 0 ]; then is_host=1 name=$master; fi
    # A new store for each start: hosts don't agree on how often they have started.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    rendezvous=(--nnodes "$nodes" --local-addr "$name" --rdzv-id "${SLURM_JOB_ID:-doppelganger}"
        --rdzv-backend c10d --rdzv-endpoint "$master:${MASTER_PORT:-29500}" --rdzv-conf "is_host=$is_host")
fi
exec python -m torch.distributed.run "${rendezvous[@]}" --nproc_per_node "$gpus" \
    --max-restarts "${RESTARTS:-3}" train.py "$@"
