"""The C++ kernels compute what model.py's formulas do, and nothing needs them."""

import itertools
import sys

import numpy as np
import pytest
import torch

import fused
import model
import train
from training import distributed

needs_compiler = pytest.mark.skipif(fused.library() is None, reason="needs g++ or clang++")
DTYPES = pytest.mark.parametrize("dtype", fused.DTYPES, ids=fused.DTYPES.values())


@pytest.fixture
def plain(monkeypatch):
    """Call a function without the kernels."""

    def call(function, *arguments):
        with monkeypatch.context() as patch:
            patch.setattr(fused, "serves", lambda x: False)
            return function(*arguments)

    return call


def assert_same(ours, expected, dtype):
    """As close as the last bit of a bfloat16, or of a sum in float32."""
    tolerance = 2e-2 if dtype == torch.bfloat16 else 2e-5
    for one, other in zip(ours, expected, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


def with_gradients(function, inputs, grad):
    """Return what a function makes of copies of `inputs`, and their gradients."""
    inputs = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    out = function(*inputs)
    wanted = [x for x in inputs if x.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, wanted, grad)]


@needs_compiler
@DTYPES
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 37, 3, 10), (3, 64, 2, 64)])
def test_norms_products_and_rotations_equal_the_formulas(shape, dtype, plain):
    torch.manual_seed(0)
    x, up, grad = (torch.randn(shape).to(dtype) for _ in range(3))
    weight = torch.randn(shape[-1])
    angles = torch.randn(shape[0], shape[1], 1, shape[3])
    functions = [
        (lambda x, w: model.RMSNormFunction.apply(x, w, 1e-5), (x, weight)),
        (model.SwiGLU.apply, (x, up)),
        (lambda x: model.ApplyRotary.apply(x, angles.cos(), angles.sin()), (x,)),
    ]
    for function, inputs in functions:
        ours = with_gradients(function, inputs, grad)
        assert_same(ours, plain(with_gradients, function, inputs, grad), dtype)


@needs_compiler
@DTYPES
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("lengths", [[1], [17], [5, 100, 3, 130], [64, 64, 64, 9]])
def test_attention_equals_torchs(lengths, window, dtype, plain):
    torch.manual_seed(0)
    count, borders = sum(lengths), [0, *itertools.accumulate(lengths)]
    q, k, v, grad = (torch.randn(count, heads, 32).to(dtype) for heads in (6, 2, 2, 6))

    def attend(q, k, v):
        return model.DocumentAttention.apply(q, k, v, model.query_blocks(borders, window))

    ours = with_gradients(attend, (q, k, v), grad)
    assert_same(ours, plain(with_gradients, attend, (q, k, v), grad), dtype)


def test_plain_attention_equals_masked_sdpa(plain):
    """Where there is no compiler; with one, test_model.py compares."""
    q, k, v = (torch.randn(2, 90, heads, 16) for heads in (4, 2, 2))
    positions = torch.cat([torch.arange(60), torch.arange(30)]).expand(2, -1)
    layout = model.attention_layout(positions, 40, None, torch.float32)
    document = (positions == 0).cumsum(-1)
    distance = torch.arange(90)[:, None] - torch.arange(90)
    mask = (document[:, :, None] == document[:, None]) & (distance >= 0) & (distance < 40)
    expected = model.attend(q, k, v, mask[:, None])
    actual = plain(model.attend, q, k, v, layout)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


@needs_compiler
def test_nan_and_infinity_pass_through():
    """Else a run that went wrong would not stop."""
    for bad in (torch.nan, torch.inf):
        x = torch.randn(1, 4, 2, 16)
        x[0, 1, 0, 3] = bad
        assert not fused.rms_norm(x.view(4, 32), torch.ones(32), 1e-5)[0][1].isfinite().all()
        assert not fused.swiglu(x, x)[0, 1].isfinite().all()
        ones = torch.ones(1, 4, 1, 16)
        assert not fused.rotate(x, ones, ones).isfinite().all()
        scores = x.view(1, 8, 16).clone()
        fused.softmax_(scores, np.zeros((1, 8), np.int32))
        assert scores[0, 2].isnan().any()


def test_no_compiler_and_a_broken_one_are_told(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(fused.BuildError, match="that needs g"):
        fused.load_library(fused.SOURCE)
    (tmp_path / "g++").write_text("#!/bin/sh\necho out of order >&2\nexit 1\n")
    (tmp_path / "g++").chmod(0o755)
    with pytest.raises(fused.BuildError, match="out of order"):
        fused.load_library(fused.SOURCE)
    (tmp_path / "g++").write_text("#!/bin/sh\necho >&2\nexit 1\n")
    with pytest.raises(fused.BuildError, match="Command"):
        fused.load_library(fused.SOURCE)
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(fused.BuildError, match="Windows"):
        fused.load_library(fused.SOURCE)
    assert not [*tmp_path.glob("cache/**/*.so")]


@needs_compiler
def test_without_a_home_folder_nothing_is_built(monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(fused.Path, "home", home)
    with pytest.raises(fused.BuildError, match="home directory"):
        fused.load_library(fused.SOURCE)


@needs_compiler
def test_kernels_run_on_as_many_threads_as_torch(monkeypatch):
    """Also where OpenMP isn't the library that torch sets: rms_norm_backward sums by thread."""
    kernels = fused.library()
    before = kernels.omp_get_max_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: before + 1)
    fused.swiglu(torch.ones(4), torch.ones(4))
    after = kernels.omp_get_max_threads()
    kernels.omp_set_num_threads(before)
    assert after == before + 1


@needs_compiler
def test_a_library_is_built_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "one.cpp"
    source.write_text('extern "C" int one() { return 1; }')
    assert fused.load_library(source).one() == 1
    (library,) = tmp_path.glob("doppelganger/one-*.so")
    built = library.stat().st_mtime_ns
    assert fused.load_library(source).one() == 1 and library.stat().st_mtime_ns == built
    source.write_text('extern "C" int one() { return 2; }')
    assert fused.load_library(source).one() == 2


def test_training_says_that_there_is_no_compiler(monkeypatch, capsys):
    monkeypatch.setattr(fused, "library", lambda: None)
    ranks = distributed.Distributed(torch.device("cpu"))
    train.check_compiler(None, ranks)
    assert "apt install g++" in capsys.readouterr().out
