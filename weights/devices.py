"""Which device to compute on, in which dtype, and how much memory it has free."""

import ctypes
import os
import sys
from pathlib import Path

import torch

from cli import UserError

# --- devices


def pick_device(name=None):
    """`name`, else cuda, then mps, then cpu. UserError for an NVIDIA card that this torch can't use: never silently the CPU."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    if name not in (None, "cuda", "mps", "cpu"):
        raise UserError(
            f"--device {name} is not known",
            "It is cuda, mps or cpu; choose one of several GPUs with CUDA_VISIBLE_DEVICES.",
        )
    if torch.cuda.is_available() and name in (None, "cuda"):
        if local >= torch.cuda.device_count():
            raise UserError(
                f"There are {torch.cuda.device_count()} GPUs for more processes",
                "Start one a GPU: torchrun --nproc_per_node.",
            )
        return torch.device("cuda", local)
    if name == "cpu" or name == "mps" and torch.backends.mps.is_available():
        return torch.device(name)
    driver = Path("/proc/driver/nvidia/version")
    if driver.exists():
        version = next(
            (w for w in driver.read_text(encoding="utf-8").split() if w[0].isdigit() and "." in w),
            "unknown",
        )
        if torch.version.cuda is None:
            raise UserError(
                f"This machine has an NVIDIA card (driver {version}), but this torch ({torch.__version__}) is built for the CPU.",
                "Install torch with CUDA (pytorch.org, 'Get started'), or say --device cpu.",
            )
        raise UserError(
            f"The NVIDIA driver {version} is too old for this torch ({torch.__version__}, CUDA {torch.version.cuda}).",
            "Update the driver, or install a torch built for an older CUDA (pytorch.org), or say --device cpu.",
        )
    if name:
        raise UserError(
            f"--device {name}: there is no such device here, or this torch ({torch.__version__}) can't use it",
            "Leave it out.",
        )
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def default_dtype(device):
    """bf16, except on CPUs without instructions for it: there its matmul takes seven times as long as float32's."""
    if device.type != "cpu":
        return torch.bfloat16
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


GIB = 1 << 30


def free_memory():
    """Bytes of memory that this machine can give now."""
    if sys.platform == "win32":
        status = (ctypes.c_uint64 * 8)(
            64
        )  # a MEMORYSTATUSEX: its size in bytes, then the memory in all and what is free of it
        ctypes.windll.kernel32.GlobalMemoryStatusEx(status)
        return status[2]
    try:
        lines = dict(
            line.split(":")
            for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        )
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
