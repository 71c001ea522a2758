"""Train and decode on GPUs that aren't there: `make cuda-fake`.

driver.c stands for NVIDIA's driver. Everything above it is the real thing, torch's allocator and
compiler included, so this shows whether a step compiles, in how many graphs, whether its kernels
fit the card, how much memory torch takes, and when the CPU waits. It can't show numbers, speed,
NCCL. It needs Linux, a C compiler, and PyPI's torch for CUDA.

    python -m bench.cuda_fake             all checks
    python -m bench.cuda_fake lora        those whose names begin so
"""

import concurrent.futures
import os
import subprocess
import sys
from pathlib import Path

import torch
import triton

from bench.cuda_fake import checks
from training import cost
from weights import devices

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
BUILD = ROOT / "build" / "cuda-fake"
CAPABILITIES = {"3060": 86, "3090": 86, "a100-80": 80}


def main() -> None:
    if not torch.version.cuda or sys.platform != "linux":
        sys.exit(f"torch {torch.__version__} can't use CUDA: make cuda-fake installs one that can")
    prefix = sys.argv[1] if len(sys.argv) > 1 else ""
    names = [name for name in checks.CHECKS if name.startswith(prefix)]
    driver = build_driver()
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(lambda name: run(name, driver), names)
        failed = [name for name, passed in zip(names, results) if not passed]
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


def build_driver() -> Path:
    """Compile driver.c. The headers are those of CUDA's packages; Triton has the others."""
    site = Path(torch.__file__).parent.parent
    headers = [site / "nvidia" / f"cu{torch.version.cuda.split('.')[0]}" / "include"]
    headers.append(Path(triton.__file__).parent / "backends" / "nvidia" / "include")
    driver = BUILD / "libcuda.so.1"
    driver.parent.mkdir(parents=True, exist_ok=True)
    command = ["cc", "-shared", "-fPIC", "-O1", "-Wall", f"-Wl,-soname,{driver.name}"]
    command += [*(f"-I{folder}" for folder in headers), "-o", driver, HERE / "driver.c"]
    subprocess.run(command, check=True)
    nvml = driver.with_name("libnvidia-ml.so.1")
    nvml.unlink(missing_ok=True)
    nvml.symlink_to(driver.name)
    return driver


def run(name: str, driver: Path) -> bool:
    """Run a check in a process of its own, where the card is there. Print its line."""
    gpu = cost.GPUS[checks.CHECKS[name].card]
    environment = {
        "LD_PRELOAD": str(driver),
        "LD_LIBRARY_PATH": str(driver.parent),
        "TRITON_LIBCUDA_PATH": str(driver.parent),
        "GPU_NAME": f"NVIDIA GeForce {gpu.name}",
        "GPU_CC": str(CAPABILITIES[checks.CHECKS[name].card]),
        "GPU_BYTES": str(int(gpu.gib * devices.GIB)),
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",  # as train.py sets it
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "bench.cuda_fake.checks", name]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )
    print(done.stdout, end="", flush=True)
    if done.returncode:
        print(f"{name}: failed\n{done.stderr[-4000:]}", flush=True)
    return done.returncode == 0


if __name__ == "__main__":
    main()
