"""Fused kernels for a CPU: fused.cpp, built at first use where a C++ compiler is found.

Elsewhere model.py's own formulas serve, a fifth slower in training. Built libraries are kept in
~/.cache/doppelganger.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = "-std=c++17 -O3 -march=native -fopenmp -fno-math-errno -fno-trapping-math".split()
BUILD_SECONDS = 120
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
Argument = Tensor | np.ndarray | int | float | None


class BuildError(Exception):
    """Why there is no library, or it can't serve."""


# --- the kernels; see model.py for what they compute


def serves(x: Tensor) -> bool:
    """Whether the kernels take this tensor: a real one on a CPU, outside torch.compile."""
    if type(x) is not Tensor or x.device.type != "cpu" or x.dtype not in DTYPES:
        return False
    return not torch.compiler.is_compiling() and library() is not None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x (N, E), weight (E,) → x / rms(x) * weight in the dtype of x, 1 / rms (N,) float32."""
    x, weight = x.contiguous(), weight.float().contiguous()
    out, inv_rms = torch.empty_like(x), torch.empty(len(x), dtype=torch.float32)
    call("rms_norm", x.dtype, x, weight, out, inv_rms, *x.shape, eps)
    return out, inv_rms


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, inv_rms: Tensor, train_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """grad, x (N, E) → gradients of x, in its dtype, and of the weight (E,) in float32, or None."""
    grad, x, weight = grad.contiguous(), x.contiguous(), weight.float().contiguous()
    out, sums = torch.empty_like(x), None
    if train_weight:
        sums = torch.zeros(torch.get_num_threads(), x.shape[1], dtype=torch.float32)
    call("rms_norm_backward", x.dtype, grad, x, weight, inv_rms, out, sums, *x.shape)
    return out, None if sums is None else sums.sum(0)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of one shape and dtype."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    call("swiglu", gate.dtype, gate, up, out, gate.numel())
    return out


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of gate and up."""
    grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
    call("swiglu_backward", gate.dtype, grad, gate, up, grad_gate, grad_up, gate.numel())
    return grad_gate, grad_up


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, T, H, D), cos and signed sin (B or 1, T, 1, D) float32 → x rotated, as `rope` says."""
    x, (B, T, H, D) = x.contiguous(), x.shape
    cos, sin = (angle.expand(B, T, 1, D).contiguous() for angle in (cos, sin))
    out = torch.empty_like(x)
    call("rotate", x.dtype, x, cos, sin, out, B * T, H, D)
    return out


def softmax_(scores: Tensor, first_seen: np.ndarray) -> Tensor:
    """Scores (blocks * G, size * heads, columns) → probabilities, in place.

    Query q of a block sees the columns from `first_seen` (blocks, size) int32 to its own; the last
    query's is the last column.
    """
    call("softmax", scores.dtype, scores, first_seen, *score_shape(scores, first_seen))
    return scores


def softmax_backward_(grad: Tensor, probabilities: Tensor, first_seen: np.ndarray) -> Tensor:
    """The gradient of `softmax_`'s probabilities → that of the scores, in place."""
    shape = score_shape(grad, first_seen)
    call("softmax_backward", grad.dtype, grad, probabilities, first_seen, *shape)
    return grad


def score_shape(scores: Tensor, first_seen: np.ndarray) -> tuple[int, ...]:
    """Return blocks, G, size, heads, columns."""
    (blocks, size), (products, rows, columns) = first_seen.shape, scores.shape
    return blocks, products // blocks, size, rows // size, columns


def gather_blocks(x: Tensor, firsts: np.ndarray, length: int, groups: int, scale: float) -> Tensor:
    """x (N, heads, D) → (blocks * G, length * heads / G, D); `firsts` (blocks,) int64."""
    x, (N, heads, D), blocks = x.contiguous(), x.shape, len(firsts)
    out = x.new_empty(blocks * groups, length * heads // groups, D)
    shape = blocks, groups, length, heads // groups, D, N
    call("gather_blocks", x.dtype, x, firsts, out, *shape, scale)
    return out


def add_blocks_(total: Tensor, x: Tensor, firsts: np.ndarray, length: int) -> None:
    """Add x (blocks * G, length * heads / G, D) to total (N, heads, D), of its dtype or float32."""
    (N, heads, D), blocks, groups = total.shape, len(firsts), len(x) // len(firsts)
    name = "add_blocks" if total.dtype == x.dtype else "add_blocks_to_float32"
    shape = blocks, groups, length, heads // groups, D, N
    call(name, x.dtype, x.contiguous(), firsts, total, *shape)


def call(name: str, dtype: torch.dtype, *arguments: Argument) -> None:
    """Call a kernel with tensors and arrays, as pointers, and numbers, on torch's threads."""
    kernels = library()
    assert kernels is not None
    # clang's OpenMP isn't the one that torch sets
    kernels.omp_set_num_threads(torch.get_num_threads())
    kernel = getattr(kernels, f"{name}_{DTYPES[dtype]}")
    kernel(*map(as_c, arguments))


def as_c(value: Argument) -> object:
    if isinstance(value, Tensor):
        assert value.is_contiguous()
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, np.ndarray):
        assert value.flags.c_contiguous
        return ctypes.c_void_p(value.ctypes.data)
    if isinstance(value, int):
        return ctypes.c_long(value)
    return ctypes.c_float(value) if isinstance(value, float) else None


# --- the library


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the kernels, built if need be; None where that fails."""
    try:
        return load_library(SOURCE)
    except BuildError:
        return None


def load_library(source: Path) -> ctypes.CDLL:
    """Load a C++ file's library, building it first if it isn't cached. BuildError if that fails."""
    if sys.platform == "win32":  # untried; torch's OpenMP is Microsoft's there
        raise BuildError("C++ is not built on Windows")
    compiler = next(filter(None, map(shutil.which, ("g++", "clang++"))), None)
    if compiler is None:
        raise BuildError("that needs g++ or clang++")
    try:
        path = cache_folder() / f"{source.stem}-{build_key(compiler, source)}.so"
        if not path.exists():
            build(compiler, source, path)
        return ctypes.CDLL(str(path))
    except subprocess.TimeoutExpired:
        raise BuildError(f"{compiler} takes longer than {BUILD_SECONDS} s") from None
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: no home
        text = (getattr(error, "stderr", None) or "").strip() or str(error)
        raise BuildError(f"{compiler}: {text.splitlines()[0]:.200}") from None


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "doppelganger"


def build_key(compiler: str, source: Path) -> str:
    """Hash all that decides the library: source, flags, compiler, and this machine's processor."""
    macros = [compiler, *FLAGS, "-dM", "-E", "-x", "c++", os.devnull]
    done = subprocess.run(macros, check=True, capture_output=True, text=True, timeout=BUILD_SECONDS)
    sources = SOURCE.read_bytes() + source.read_bytes()  # decode_step.cpp includes fused.cpp
    parts = [sources, " ".join([compiler, *FLAGS]).encode(), done.stdout.encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def build(compiler: str, source: Path, path: Path) -> None:
    """Compile beside `path`, then rename: another process may be doing the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        new = Path(folder) / path.name
        command = [compiler, *FLAGS, "-shared", "-fPIC", str(source), "-o", str(new)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=BUILD_SECONDS)
        new.replace(path)
