"""The ranks of a run: torch.distributed, FSDP2, and the collectives that training needs."""

import dataclasses
import datetime
import functools
import os
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from cli import UserError
from weights import devices, quantize

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

# FSDP2 of torch 2.11 needs a gradient of every parameter, and packed 4-bit weights have none.
SHARDS_UINT8 = tuple(map(int, torch.__version__.split(".")[:2])) > (2, 11)


@dataclasses.dataclass(frozen=True)
class Distributed:
    """This process among the ranks: its device, its rank, how many ranks and model replicas.

    `progress`: a counter that the watchdog reads to see that this rank gets on.
    """

    device: torch.device
    rank: int = 0
    world: int = 1
    replicas: int = 1
    progress: list[int] = dataclasses.field(default_factory=lambda: [0], compare=False)

    def advance(self) -> None:
        self.progress[0] += 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def shards(self) -> int:
        """The number of ranks that share one copy of the parameters."""
        return self.world // self.replicas

    @functools.cached_property
    def mesh(self):
        """Shard inside a host, replicate over hosts: one all-reduce a step between them."""
        dims = {"shard": self.shards}
        if self.replicas > 1:
            dims = {"replicate": self.replicas, **dims}
        return dist.device_mesh.init_device_mesh(
            self.device.type, tuple(dims.values()), mesh_dim_names=tuple(dims)
        )

    def print(self, text: str) -> None:
        """Print above the progress bar, on the main rank only."""
        if self.is_main:
            tqdm.write(text)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor` over all ranks, in place."""
        self.advance()
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast(self, number: int) -> int:
        """Return rank 0's number on every rank."""
        self.advance()
        if self.world == 1:
            return number
        tensor = torch.tensor([number], device=self.device)
        dist.broadcast(tensor, 0)
        return int(tensor)

    def all_reduce_max(self, number: int) -> int:
        """Return the largest number of all ranks."""
        if self.world == 1:
            return number
        tensor = torch.tensor([number], device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)

    def barrier(self) -> None:
        # dist.barrier() guesses a device; .item() waits for the GPU.
        if self.world > 1:
            self.all_reduce(torch.zeros((), device=self.device)).item()


def init_distributed(device_name: str | None = None) -> Distributed:
    """Join the other ranks if torchrun started this process: NCCL on CUDA, else Gloo.

    UserError if the hosts have different numbers of ranks.
    """
    device = devices.pick_device(device_name)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    if "WORLD_SIZE" not in os.environ:
        return Distributed(device)
    world = int(os.environ["WORLD_SIZE"])
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    hosts = int(os.environ.get("GROUP_WORLD_SIZE", world // local_world))
    if hosts * local_world != world:
        raise UserError(
            f"this host has {local_world} of {world} ranks",
            "Start the same number on each host: GPUS=… ./fsdp_launch.sh",
        )
    store_options: dict = {}
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        rank = int(os.environ["RANK"])
        store_options = {"store": open_store("group"), "rank": rank, "world_size": world}
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        device_id=device if cuda else None,
        timeout=datetime.timedelta(hours=1),  # the other ranks wait while rank 0 downloads
        **store_options,
    )
    # With one GPU a host the model is sharded over all hosts.
    return Distributed(device, dist.get_rank(), world, hosts if local_world > 1 else 1)


def open_store(name: str) -> dist.Store:
    """Open another connection to torchrun's store, with a prefix for this start of the job.

    torchrun --max-restarts gives every start the same store: without the prefix, ranks would find
    the addresses of the ranks before them.
    """
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(*address, is_master=False, wait_for_workers=False)
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
    return dist.PrefixStore(f"{name}/{restarts}", store)


def shard_model(model, ranks: Distributed, dtype: torch.dtype) -> None:
    """Shard with FSDP2, a unit per block: gather in `dtype`, reduce gradients in fp32."""
    # Imported here: it takes half a second, and only several ranks need it.
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # Inputs are not cast: cos and sin stay fp32.
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    ignored = set()
    if not SHARDS_UINT8:  # each rank holds the whole 4-bit base
        for module in model.modules():
            if isinstance(module, quantize.PackedLinear):
                ignored.update(module.stored())
    blocks = list(model.model.layers)
    for unit in (*blocks, model):
        fully_shard(unit, mesh=ranks.mesh, mp_policy=policy, ignored_params=ignored)
    # Gather the next block while this one computes.
    for block, next_block in zip(blocks, blocks[1:]):
        block.set_modules_to_forward_prefetch([next_block])
        next_block.set_modules_to_backward_prefetch([block])


def fsdp_module(model: nn.Module) -> "FSDPModule":
    """Return a sharded model as the class that `shard_model` made it an object of."""
    from torch.distributed.fsdp import FSDPModule

    assert isinstance(model, FSDPModule), type(model)
    return model


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def host_index() -> int:
    """Return torchrun's number of this host: rented hosts may all have the same name."""
    return int(os.environ.get("GROUP_RANK", 0))
