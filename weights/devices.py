"""Which device to compute on, in which dtype, and how much memory is free."""

import ctypes
import os
import re
import sys
from pathlib import Path

import torch

from cli import UserError

GIB = 1 << 30


def pick_device(name: str | None = None) -> torch.device:
    """Return device `name`, else cuda, then mps, then cpu.

    UserError for an NVIDIA GPU that this torch can't use: never silently the CPU.
    """
    if name not in (None, "cuda", "mps", "cpu"):
        raise UserError(
            f"--device {name} is not supported",
            "Take cuda, mps or cpu; choose one of several GPUs with CUDA_VISIBLE_DEVICES.",
        )
    if torch.cuda.is_available() and name in (None, "cuda"):
        local_rank, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local_rank >= count:
            raise UserError(
                f"There are more processes than GPUs ({count})",
                f"Start one per GPU: torchrun --nproc_per_node {count}",
            )
        return torch.device("cuda", local_rank)
    has_mps = torch.backends.mps.is_available()
    if name == "cpu" or name == "mps" and has_mps:
        return torch.device(name)
    driver = Path("/proc/driver/nvidia/version")
    if driver.exists():
        raise unusable_cuda(driver.read_text(encoding="utf-8"))
    if name:
        raise UserError(
            f"--device {name}: there is no such device here, "
            f"or this torch ({torch.__version__}) can't use it",
            "Leave it out.",
        )
    return torch.device("mps" if has_mps else "cpu")


def unusable_cuda(driver: str) -> UserError:
    """Say why torch can't use the NVIDIA GPU whose driver describes itself so."""
    found = re.search(r"\s(\d[^\s]*\.\S*)", driver)
    version = found[1] if found else "unknown"
    if torch.version.cuda is None:
        return UserError(
            f"This machine has an NVIDIA GPU (driver {version}), "
            f"but this torch ({torch.__version__}) is built for the CPU.",
            "Install torch with CUDA (pytorch.org, 'Get started'), or pass --device cpu.",
        )
    return UserError(
        f"The NVIDIA driver {version} is too old for this torch "
        f"({torch.__version__}, CUDA {torch.version.cuda}).",
        "Update the driver (CUDA 13 needs 580), or install torch's cu126 build (pytorch.org), "
        "or pass --device cpu.",
    )


def default_dtype(device: torch.device) -> torch.dtype:
    """Return bf16, except on CPUs without instructions for it: there it is 7 times slower."""
    if device.type == "cpu" and not torch.cpu._is_avx512_bf16_supported():
        return torch.float32
    return torch.bfloat16


def lacks_bf16(device: torch.device) -> bool:
    """Return whether a GPU computes bf16 without its tensor cores: NVIDIA's before Ampere."""
    return device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)


def free_memory() -> int:
    """Return the bytes of memory that this machine can still give."""
    if sys.platform == "win32":
        # a MEMORYSTATUSEX: its own size in bytes, then all memory and what is free of it
        status = (ctypes.c_uint64 * 8)(64)
        ctypes.windll.kernel32.GlobalMemoryStatusEx(status)
        return status[2]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        available = re.search(r"MemAvailable: *(\d+)", meminfo.read_text(encoding="utf-8"))
        if available:
            return int(available[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
