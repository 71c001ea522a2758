"""The ranks of a run: torch.distributed, FSDP2, and the collectives that training needs."""

import dataclasses
import datetime
import functools
import os

import torch
import torch.distributed as dist

from cli import UserError
from weights import devices, quantize

SHARDS_UINT8 = tuple(map(int, torch.__version__.split(".")[:2])) > (
    2,
    11,
)  # 2.11's FSDP2 wants a gradient of every parameter


@dataclasses.dataclass(frozen=True)
class Distributed:
    """Who computes: this process's device and number, how many there are, and how many hosts hold the whole model each."""

    device: torch.device
    rank: int = 0
    world: int = 1
    replicas: int = 1
    progress: list = dataclasses.field(
        default_factory=lambda: [0], compare=False
    )  # how often this rank got on with its work

    def advance(self):
        self.progress[0] += 1

    @property
    def shards(self):
        """How many ranks share one copy of what is trained."""
        return self.world // self.replicas

    @functools.cached_property
    def mesh(self):
        """Sharded in a host, replicated over hosts: between them travels one sum of gradients a step."""
        dims = (
            {"replicate": self.replicas, "shard": self.shards}
            if self.replicas > 1
            else {"shard": self.world}
        )
        device = self.device.type  # the default would take a GPU whatever --device says
        return dist.device_mesh.init_device_mesh(
            device, tuple(dims.values()), mesh_dim_names=tuple(dims)
        )

    @property
    def is_main(self):
        return self.rank == 0

    def all_reduce(self, tensor):
        """`tensor` summed over all ranks, in place."""
        self.advance()
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast(self, number):
        """Rank 0's int, on every rank."""
        self.advance()
        if self.world == 1:
            return number
        tensor = torch.tensor([number], device=self.device)
        dist.broadcast(tensor, 0)
        return int(tensor)

    def all_reduce_max(self, number):
        """The largest of all ranks' ints."""
        if self.world == 1:
            return number
        tensor = torch.tensor([number], device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)

    def barrier(self):
        if self.world > 1:
            self.all_reduce(
                torch.zeros((), device=self.device)
            ).item()  # dist.barrier() guesses a device; .item() waits for the GPU


def init_distributed(device=None):
    """Join the other ranks when torchrun started us: nccl on CUDA, gloo elsewhere. UserError for hosts of unlike size. → Ranks"""
    device = devices.pick_device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "WORLD_SIZE" not in os.environ:
        return Distributed(device)
    world, local = (
        int(os.environ["WORLD_SIZE"]),
        int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])),
    )
    if world % local or int(os.environ.get("GROUP_WORLD_SIZE", world // local)) != world // local:
        raise UserError(
            f"this host has {local} of {world} ranks",
            "Start as many on each host: GPUS=… ./fsdp_launch.sh",
        )
    cuda = device.type == "cuda"
    patience = datetime.timedelta(hours=1)  # the other ranks wait while rank 0 downloads
    given = {}
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        given = {"store": open_store("group"), "rank": int(os.environ["RANK"]), "world_size": world}
    dist.init_process_group(
        "nccl" if cuda else "gloo", device_id=device if cuda else None, timeout=patience, **given
    )
    replicas = (
        world // local if local > 1 else 1
    )  # with one GPU a host the model is sharded over all
    return Distributed(device, dist.get_rank(), world, replicas)


def open_store(name):
    """A connection of its own to the ranks' store, under a prefix of its own in each start of the job.

    torchrun --max-restarts hands the same store to every start: without the prefix ranks find the addresses of those before them.
    """
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
    )
    return dist.PrefixStore(f"{name}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def shard_model(model, ranks, dtype):
    """FSDP2, a unit per block, as `Ranks.mesh` says: parameters gathered in `dtype`, gradients reduced in fp32."""
    from torch.distributed.fsdp import (  # half a second, for several ranks alone
        MixedPrecisionPolicy,
        fully_shard,
    )

    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )  # cos and sin stay fp32
    blocks, whole = list(model.model.layers), set()
    if not SHARDS_UINT8:  # then each rank holds the 4-bit base whole
        whole = {
            part
            for module in model.modules()
            if isinstance(module, quantize.PackedLinear)
            for part in module.stored()
        }
    for unit in (*blocks, model):
        fully_shard(unit, mesh=ranks.mesh, mp_policy=policy, ignored_params=whole)
    for one, following in zip(
        blocks, blocks[1:]
    ):  # the next block is gathered while this one computes
        one.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([one])


def local_rank():
    return int(os.environ.get("LOCAL_RANK", 0))


def host_index():
    """torchrun's number of this host: rented ones may all have the same name."""
    return int(os.environ.get("GROUP_RANK", 0))
