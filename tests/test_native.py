"""Decoding in C++: the logits of the model, each row as alone, and torch where it can't be built."""

import concurrent.futures
import ctypes
import os
import shutil
import stat

import pytest
import torch
from conftest import command, save_mistral
from test_families import FAMILIES, close, random_model, tokens

import fused
import lora
from inference import generate, native
from model import ModelConfig, Transformer
from weights import quantize
from weights.load import load_model
from weights.tokenizer import load_tokenizer

COMPILER = next(filter(None, map(shutil.which, ("g++", "clang++"))), None)
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler here")


@pytest.fixture(scope="module")
def library():
    return fused.load_library(native.SOURCE)


def cache_with(model, prompts):
    """A cache whose rows hold these prompts."""
    norm = model.model.norm.weight
    cache = generate.BatchCache(model.config, 64, len(prompts), norm.dtype, norm.device)
    for row, prompt in zip(cache.rows, prompts):
        model(prompt[None], cache=row)
    return cache


@torch.inference_mode()
def step_logits(model, library, prompts, new):
    """The logits (B, V) after two more tokens `new` (B, 2) of each row."""
    step, lengths = native.NativeStep(model, library), [len(prompt) for prompt in prompts]
    cache = cache_with(model, prompts)
    step(new[:, :1], lengths, cache)
    return step(new[:, 1:], [length + 1 for length in lengths], cache)


def drawn(lengths):
    return [tokens(length + 1)[1:] for length in lengths], tokens(len(lengths), 2)


@torch.inference_mode()
def plain_logits(model, prompts, new):
    return torch.stack(
        [model(torch.cat([prompt, row])[None])[0, -1] for prompt, row in zip(prompts, new)]
    )


# --- the same numbers


@pytest.mark.parametrize("weights", ["plain", "int8", "int4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_step_equals_the_model_in_every_family(family, weights, library, tmp_path):
    random_model(family).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), torch.float32, weights=weights)
    batch = drawn([5, 30, 1, 12, 20, 40])
    expected = plain_logits(model, *batch)  # before the step takes over unpacking
    logits = step_logits(model, library, *batch)
    if weights == "int4":  # its activations have 16 bits; bf16's have 8
        assert (logits - expected).norm() < 2e-4 * expected.norm()
    else:
        close(logits, expected)


@pytest.mark.parametrize("weights", ["plain", "int8", "int4"])
def test_bf16_is_as_exact_as_torchs(weights, library, tmp_path):
    random_model("qwen3, biases").save_pretrained(tmp_path)
    batch = drawn([5, 30, 9])
    model = load_model(str(tmp_path), torch.bfloat16, weights=weights)
    exact_model = load_model(str(tmp_path), torch.bfloat16, weights=weights)
    exact_model.dtype = torch.float32
    exact = plain_logits(exact_model, *batch)
    theirs = plain_logits(model, *batch).float()
    ours = step_logits(model, library, *batch)
    assert (ours - exact).norm() < 1.1 * (theirs - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8", "int4"])
def test_a_row_is_computed_as_alone_by_any_number_of_threads(weights, library, tmp_path):
    random_model("qwen2").save_pretrained(tmp_path)
    dtype = torch.float32 if weights == "fp32" else torch.bfloat16
    kind = "plain" if weights in ("fp32", "bf16") else weights
    model = load_model(str(tmp_path), dtype, weights=kind)
    prompts, new = drawn([7, 3, 20, 33, 1, 9, 12, 28, 4])
    together = step_logits(model, library, prompts, new)
    for index in range(len(prompts)):
        alone = step_logits(model, library, prompts[index : index + 1], new[index : index + 1])
        assert torch.equal(alone[0], together[index])
    threads = torch.get_num_threads()
    try:
        for count in (2, 3, 7):
            torch.set_num_threads(count)
            cache = cache_with(model, prompts)
            step = native.NativeStep(model, library)
            lengths = [len(prompt) for prompt in prompts]
            with torch.inference_mode():
                step(new[:, :1], lengths, cache)
                again = step(new[:, 1:], [length + 1 for length in lengths], cache)
            close(again, together)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("width", [64, 576, 1536, 5632])
def test_unpacked_weights_equal_torchs(kind, width, library):
    model = Transformer(ModelConfig(32, width, 64, 1, 4, 2, 16))
    weight = torch.randn(64, width)
    layer, packed = model.model.layers[0].mlp.up_proj, quantize.PACKED_TYPES[kind]
    quantize.pack_linears(model, kind)
    for name, tensor in zip(packed.names, packed.quantize(weight)):
        getattr(layer, name).data = tensor
    native.NativeStep(model, library)
    assert torch.equal(
        layer.unpack(*layer.stored(), dtype=torch.float32),
        packed.unpack(*layer.stored(), torch.float32),
    )
    ours, theirs = (
        unpack(*layer.stored(), dtype=torch.bfloat16).float()
        for unpack in (layer.unpack, packed.unpack)
    )
    assert (ours - weight).square().mean() <= (theirs - weight).square().mean() * 1.001


def test_greedy_replies_alone_and_in_a_batch_equal_torchs(tmp_path):
    model = load_model(str(save_mistral(tmp_path, sliding_window=16)), torch.float32)
    tokenizer = load_tokenizer(tmp_path)
    prompts = [torch.randint(300, 2000, (length,)).tolist() for length in (3, 30, 11, 1, 50)]
    slow = generate.Decoder(model, tokenizer, 96)
    expected = [list(slow.generate(prompt, 20, 0)) for prompt in prompts]
    fast = generate.Decoder(model, tokenizer, 96, compile=True, slots=3)
    assert fast.native_step and not fast.not_compiled
    assert [list(fast.generate(prompt, 20, 0)) for prompt in prompts] == expected
    batch, rows = generate.DecodeBatch(fast), []
    for prompt in prompts:
        while batch.full:
            batch.step()
        rows.append(batch.add(prompt, 20, 0))
    while batch.rows:
        batch.step()
    assert [row.ids for row in rows] == expected


# --- building it, or not


def reason(**environment):
    """Why load_library fails where these variables are set."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, str(value))
        with pytest.raises(fused.BuildError) as caught:
            fused.load_library(native.SOURCE)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def fake_compiler(folder, script):
    path = folder / "bin" / "g++"
    path.parent.mkdir()
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path.parent


def test_without_a_compiler_or_with_a_broken_one_torch_decodes(tmp_path, monkeypatch):
    assert "needs g++" in reason(PATH=tmp_path)
    path = fake_compiler(tmp_path, "echo 'ld: cannot find -lgomp' >&2; exit 1")
    assert "-lgomp" in reason(PATH=path, XDG_CACHE_HOME=tmp_path)
    (path / "g++").write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(fused, "BUILD_SECONDS", 0.2)
    assert "takes longer" in reason(PATH=f"{path}:{os.environ['PATH']}", XDG_CACHE_HOME=tmp_path)


def test_a_cache_that_cannot_be_written_is_no_error_of_the_program(tmp_path):
    (tmp_path / "file").write_text("")
    assert "file" in reason(XDG_CACHE_HOME=tmp_path / "file")


def test_two_builds_at_once_end_well_and_the_next_start_builds_nothing(
    library, tmp_path, monkeypatch
):
    (library,) = fused.cache_folder().glob(
        f"decode_step-{fused.build_key(COMPILER, native.SOURCE)}.so"
    )
    count = f"echo . >> {tmp_path}/builds; sleep 0.3"
    last = "for out; do true; done"
    script = f'case "$*" in *-dM*) exit;; esac; {count}; {last}; cp {library} "$out"'
    path = fake_compiler(tmp_path, script)
    monkeypatch.setenv("PATH", f"{path}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        both = [pool.submit(fused.load_library, native.SOURCE) for _ in range(2)]
        loaded = [future.result() for future in both]
    loaded.append(fused.load_library(native.SOURCE))
    assert all(isinstance(one, ctypes.CDLL) for one in loaded)
    assert (tmp_path / "builds").read_text() == ".\n.\n"
    assert [file.suffix for file in (tmp_path / "doppelganger").iterdir()] == [".so"]


def test_chat_says_once_why_it_is_not_compiled(tmp_path):
    folder = save_mistral(tmp_path)
    bare = {"PATH": str(tmp_path)}
    done = command("chat.py", folder, "-p", "hi", "--max-tokens", 3, "--device", "cpu", env=bare)
    assert done.returncode == 0 and done.stderr.count("not compiled") == 1, done.stderr
    done = command("chat.py", folder, "-p", "hi", "--max-tokens", 3, "--device", "cpu")
    assert done.returncode == 0 and "compiled" not in done.stderr, done.stderr


def test_models_that_change_or_that_it_does_not_know_are_left_to_torch(library, tmp_path):
    model = load_model(str(save_mistral(tmp_path)), torch.float32)
    assert native.is_supported(model)
    lora.inject(model, rank=2)
    with pytest.raises(fused.BuildError):
        native.NativeStep(model, library)
    for changes in ({"head_dim": 24}, {"hidden_size": 72}):
        sizes = dict(head_dim=16, hidden_size=64) | changes
        other = Transformer(ModelConfig(100, sizes["hidden_size"], 128, 1, 4, 2, sizes["head_dim"]))
        assert not native.is_supported(other), changes
    half = Transformer(ModelConfig(100, 64, 128, 1, 4, 2, 16)).half()
    assert not native.is_supported(half)
