"""Files that aren't what they seem are refused, with name and reason, before anything changes.

`make soak` damages 10,000 of them.
"""

import dataclasses
import itertools
import json
import os
import random
import shutil
import struct
import sys
from pathlib import Path

import pytest
import sentencepiece
import torch
from conftest import ROOT, V1, VOCABULARIES, command, refused
from safetensors.torch import load_file, save_file

import cli
import lora
import train
from cli import UserError
from inference import generate
from model import ModelConfig, Transformer
from training import checkpoint, distributed, optim, run
from weights import hf, shards
from weights import save as weights_save
from weights.load import fingerprint, index_tensors, load_model
from weights.merge import main
from weights.save import save_model
from weights.tokenizer import load_tokenizer, read_names

MUTANTS = int(os.environ.get("MUTANTS", 150))
ALONE = distributed.Distributed(torch.device("cpu"))
NORM = "model.layers.1.input_layernorm.weight"
QUERY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
DELTA = "base_model.model.lm_head.token_adapter.trainable_tokens_delta"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d7a2146" * 8 + b"\nsize 12\n"
PAGE = b"<!DOCTYPE html><html><head><title>404</title></head></html>" * 9


def random_model(seed=0):
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(2002, 64, 128, 2, 4, 2, 16))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0, 0.2)
    return model


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Undamaged folders: a base, the same in two files, its adapter, another base."""
    folder, tokenizer = tmp_path_factory.mktemp("whole"), load_tokenizer(ROOT / "examples" / "base")
    for name, seed, bytes_ in (("base", 0, 1 << 30), ("two", 0, 400_000), ("other", 1, 1 << 30)):
        (folder / name).mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(weights_save, "MAX_FILE_BYTES", bytes_)
            save_model(random_model(seed), folder / name, tokenizer)
        tokenizer.save(folder / name)
    model = random_model()
    stored = index_tensors(model, folder / "base")
    lora.inject(model, rank=4, rows=[2000, 2001])
    (folder / "ckpt").mkdir()
    lora.save(model, folder / "ckpt", folder / "base")
    tokenizer.save(folder / "ckpt")
    cli.write_json(folder / "ckpt" / "run.json", {"fingerprint": fingerprint(stored)})
    cli.write_json(folder / "ckpt" / "persona.json", {"me": "Ann", "contacts": []})
    return folder


@pytest.fixture
def folders(whole, tmp_path):
    """A copy of `whole` to damage."""
    copy = shutil.copytree(whole, tmp_path / "whole")
    edit("ckpt/adapter_config.json", base_model_name_or_path=str(copy / "base"))(copy)
    return copy


def load(folder, **options):
    """What chat.py and merge do: tokenizer, then model; and a few tokens through it."""
    tokenizer = load_tokenizer(folder)
    model = load_model(str(folder), tokenizer=tokenizer, **options)
    model(torch.tensor([tokenizer.encode("<|im_start|>Ann\n>>> hi<|im_end|>")[0]]))
    return model


# --- lies, as functions of the folder that holds `base` and `ckpt`


def put(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def cut(name, share):
    return lambda folder: os.truncate(folder / name, int(os.path.getsize(folder / name) * share))


def edit(name, **values):
    """Change a JSON file's keys; … takes one away."""

    def change(folder):
        content = {**json.loads((folder / name).read_text()), **values}
        (folder / name).write_text(
            json.dumps({key: value for key, value in content.items() if value is not ...})
        )

    return change


def tensors(name, act):
    """Change what a safetensors file holds, by a function of its {name: tensor}."""

    def change(folder):
        weights = load_file(folder / name)
        act(weights)
        save_file(weights, folder / name, metadata={"format": "pt"})

    return change


def moved(name, file):
    """Change the file in which an index says that a tensor is."""

    def change(folder):
        weight_map = json.loads((folder / "two" / INDEX).read_text())["weight_map"]
        edit(f"two/{INDEX}", weight_map={**weight_map, name: file})(folder)

    return change


def pickled(name):
    return lambda folder: torch.save({"x": torch.ones(3)}, folder / name)


def renamed(name, other):
    return lambda folder: (folder / name).rename(folder / other)


def made_a_folder(name):
    return lambda folder: ((folder / name).unlink(), (folder / name).mkdir())


def both(*acts):
    return lambda folder: [act(folder) for act in acts]


def retyped(name, dtype):
    return lambda weights: weights.update({name: weights[name].to(dtype)})


def poisoned(name, value):
    return lambda weights: weights[name].view(-1)[5:6].fill_(value)


INDEX = "model.safetensors.index.json"
MODEL, ADAPTER, CONFIG, SETTINGS = (
    "base/model.safetensors",
    "ckpt/adapter_model.safetensors",
    "base/config.json",
    "ckpt/adapter_config.json",
)
FIRST, SECOND = "two/model-00001-of-00002.safetensors", "two/model-00002-of-00002.safetensors"
LIES = {
    # a file that is something else
    "a pickle named model.safetensors": ("base", pickled(MODEL), "model.safetensors can't be read: it is a pickle"),
    "an old pickle": ("base", put(MODEL, b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." * 5), "it is a pickle"),
    "a web page": ("base", put(MODEL, PAGE), "it is a web page"),
    "git-LFS's pointer": ("base", put(MODEL, LFS), r"git-LFS's pointer.*git lfs pull"),
    "GGUF": ("base", put(MODEL, b"GGUF\3" + bytes(99)), "it is a GGUF file"),
    "an empty file": ("base", put(MODEL, b""), "it is empty"),
    "a file of zeros": ("base", put(MODEL, bytes(9999)), "it holds only zeros"),
    "a folder": ("base", made_a_folder(MODEL), "it is a folder"),
    "cut off": ("base", cut(MODEL, 0.9), "model.safetensors can't be read"),
    "only pytorch_model.bin": ("base", renamed(MODEL, "base/pytorch_model.bin"), r"only pytorch_model.bin.*a pickle"),
    "an adapter that is a pickle": ("ckpt", pickled(ADAPTER), "adapter_model.safetensors can't be read: it is a pickle"),
    "only adapter_model.bin": ("ckpt", renamed(ADAPTER, "ckpt/adapter_model.bin"), "only adapter_model.bin is there, which is a pickle"),
    "an adapter cut off": ("ckpt", cut(ADAPTER, 0.5), "adapter_model.safetensors can't be read"),
    "an adapter that git-LFS has": ("ckpt", put(ADAPTER, LFS), "git-LFS's pointer"),
    "config.json that git-LFS has": ("base", put(CONFIG, LFS), "config.json is not JSON: it is git-LFS's pointer"),
    "config.json cut off": ("base", cut(CONFIG, 0.5), "config.json is not JSON"),
    "config.json too deep": ("base", put(CONFIG, b"[" * 99999), "config.json is not JSON"),
    "config.json as a list": ("base", put(CONFIG, b"[]"), "holds no JSON object"),
    # tensors
    "int8 weights": ("base", tensors(MODEL, retyped(NORM, torch.int8)), f"{NORM} is of I8"),
    "fp8 weights": ("base", tensors(MODEL, retyped(NORM, torch.float8_e4m3fn)), f"{NORM} is of F8_E4M3"),
    "bool weights": ("base", tensors(MODEL, retyped(NORM, torch.bool)), f"{NORM} is of BOOL"),
    "int64 weights": ("base", tensors(MODEL, retyped(NORM, torch.int64)), f"{NORM} is of I64"),
    "NaN in weights": ("base", tensors(MODEL, poisoned(NORM, torch.nan)), f"{NORM} holds NaN"),
    "infinity in weights": ("base", tensors(MODEL, poisoned("lm_head.weight", -torch.inf)), "lm_head.weight holds NaN or inf"),
    "a renamed tensor": ("base", tensors(MODEL, lambda t: t.update(x=t.pop(NORM))), f"{NORM} is missing.*1 unknown"),
    "an adapter in int8": ("ckpt", tensors(ADAPTER, retyped(QUERY, torch.int8)), f"{QUERY} is of I8"),
    "NaN in an adapter": ("ckpt", tensors(ADAPTER, poisoned(DELTA, torch.nan)), f"{DELTA} holds NaN"),
    "an adapter's tensor that is missing": ("ckpt", tensors(ADAPTER, lambda t: t.pop(QUERY)), f"{QUERY} is missing"),
    # the index
    "an index that names a missing file": ("two", lambda f: (f / SECOND).unlink(), "00002.safetensors can't be read: it is missing"),
    "an index that leaves the folder": ("two", moved(NORM, "../base/model.safetensors"), r"'\.\./base/model.*not a safetensors file of this"),
    "an index with an absolute path": ("two", moved(NORM, "/etc/x.safetensors"), "'/etc/x.safetensors'"),
    "an index that names a pickle": ("two", moved(NORM, "pytorch_model.bin"), "pytorch_model.bin"),
    "an index that names no file": ("two", edit(f"two/{INDEX}", weight_map=[1]), "weight_map names"),
    "an index without a map": ("two", edit(f"two/{INDEX}", weight_map=...), "weight_map names None"),
    "a tensor in another file": ("two", moved("lm_head.weight", Path(FIRST).name), "lm_head.weight is in .*should be in"),
    "a tensor in two files": ("two", tensors(FIRST, lambda t: t.update({"lm_head.weight": torch.ones(2002, 64)})), "lm_head.weight is in"),
    # config.json
    "no hidden_size": ("base", edit(CONFIG, hidden_size=...), "hidden_size is None, it must be a whole number"),
    "hidden_size as text": ("base", edit(CONFIG, hidden_size="64"), "hidden_size is '64'"),
    "no layers": ("base", edit(CONFIG, num_hidden_layers=0), "num_hidden_layers is 0"),
    "a billion layers": ("base", edit(CONFIG, num_hidden_layers=10**9), "num_hidden_layers is 1000000000"),
    "negative heads": ("base", edit(CONFIG, num_attention_heads=-4), "num_attention_heads is -4"),
    "heads that don't divide": ("base", edit(CONFIG, num_key_value_heads=3), "4 heads of size 16 with 3"),
    "an odd head": ("base", edit(CONFIG, head_dim=15), "4 heads of size 15"),
    "a size that is true": ("base", edit(CONFIG, vocab_size=True), "vocab_size is True"),
    "an epsilon that is none": ("base", edit(CONFIG, rms_norm_eps=float("nan")), "rms_norm_eps is nan"),
    "RoPE as a list": ("base", edit(CONFIG, rope_parameters=[1]), "RoPE"),
    "RoPE to nowhere": ("base", edit(CONFIG, rope_theta="1e4", rope_parameters=None), "rope_theta is '1e4'"),
    "another activation": ("base", edit(CONFIG, hidden_act="gelu"), "hidden_act 'gelu'"),
    "code of its own": ("base", edit(CONFIG, auto_map={"AutoModel": "code.Model"}), "auto_map.*never run"),
    "a dtype that is none": ("base", edit(CONFIG, dtype="nn"), "dtype 'nn'"),
    # adapter_config.json
    "rank as text": ("ckpt", edit(SETTINGS, r="4"), "r is '4'"),
    "another rank": ("ckpt", edit(SETTINGS, r=8), r"lora_A.weight is \[4, 64\], the base makes it \[8, 64\]"),
    "an endless rank": ("ckpt", edit(SETTINGS, r=10**12), "r is 1000000000000"),
    "no alpha": ("ckpt", edit(SETTINGS, lora_alpha=...), "lora_alpha is None"),
    "unknown targets": ("ckpt", edit(SETTINGS, target_modules=["q_proj", "c_attn"]), "target_modules c_attn"),
    "rows that are none": ("ckpt", edit(SETTINGS, trainable_token_indices={"embed_tokens": ["x"], "lm_head": ["x"]}), "indices is 'x'"),
    "rows that differ": ("ckpt", edit(SETTINGS, trainable_token_indices={"embed_tokens": [1], "lm_head": [2]}), "the same for"),
    "no base": ("ckpt", edit(SETTINGS, base_model_name_or_path=None), "names no base"),
    "a base that is a number": ("ckpt", edit(SETTINGS, base_model_name_or_path=7), "base_model_name_or_path is 7"),
    # the tokenizer
    "tokenizer.json cut off": ("base", cut("base/tokenizer.json", 0.7), "tokenizer.json can't be read"),
    "tokenizer.json that git-LFS has": ("ckpt", put("ckpt/tokenizer.json", LFS), "tokenizer.json can't be read.*git-LFS"),
    "tokenizer.model that git-LFS has": ("base", both(lambda f: (f / "base/tokenizer.json").unlink(), put("base/tokenizer.model", LFS)), "git-LFS"),
    "an empty tokenizer.model": ("base", both(lambda f: (f / "base/tokenizer.json").unlink(), put("base/tokenizer.model", b"")), "it is empty"),
    "a BOS that is a number": ("base", edit("base/tokenizer_config.json", bos_token=1), "tokenizer.json can't be read, with the .json"),
    "another BOS": ("base", edit(CONFIG, bos_token_id=2), "begins with its id 1, by config.json with 2"),
    "turned ChatML tokens": ("base", edit(CONFIG, eos_token_id=2001), "id 2001 ends a text, which is its '<|im_start|>'"),
    "an end that is a word": ("base", edit(CONFIG, eos_token_id=[2000, 700]), "id 700 ends a text"),
    "other spellings": ("base", edit("base/tokenizer_config.json", added_tokens_decoder={"300": {"content": "[INST]"}}), "makes it '.INST.'"),
    "run.json cut off": ("ckpt", put("ckpt/run.json", b'{"fing'), "run.json is not JSON"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_lie_is_refused_with_file_and_reason(lie, folders):
    which, act, expected = LIES[lie]
    load(folders / which)
    act(folders)
    with pytest.raises(UserError, match=expected.replace("|im_start|", r"\|im_start\|")) as caught:
        load(folders / which)
    assert len(str(caught.value).splitlines()) == 2


def test_adapter_loads_over_its_own_base_only(folders):
    with pytest.raises(UserError, match="same shapes, but other weights\n.*--model.*To insist"):
        load(folders / "ckpt", base=str(folders / "other"))
    (folders / "base").rename(folders / "moved")
    with pytest.raises(UserError, match="not there"):
        load(folders / "ckpt")
    load(folders / "ckpt", base=str(folders / "moved"))
    tensors(
        "moved/model.safetensors",
        lambda t: t.update({name: value.float() for name, value in t.items()}),
    )(folders)
    load(folders / "ckpt", base=str(folders / "moved"))
    load(folders / "ckpt", base=str(folders / "two"))
    for name in ("run.json", "persona.json"):  # as PEFT leaves an adapter
        (folders / "ckpt" / name).unlink()
    load(folders / "ckpt", base=str(folders / "other"))


@pytest.mark.parametrize(("model", "rows", "fits"), [("v1", 32000, True), ("v1", 32002, True), ("v1", 32064, True), ("v1", 32768, False), ("v3", 32768, True), ("v3", 32000, False)])  # fmt: skip
def test_tokenizer_must_fit_the_models_rows(model, rows, fits, folders):
    name = {"v1": V1, "v3": VOCABULARIES / "mistral_instruct_tokenizer_240323.model.v3"}[model]
    edit(CONFIG, vocab_size=rows, eos_token_id=2)(folders)
    for old in ("tokenizer.json", "tokenizer_config.json"):
        (folders / "base" / old).unlink()
    shutil.copyfile(name, folders / "base" / "tokenizer.model")
    tokenizer = load_tokenizer(folders / "base")
    if fits:
        assert hf.config_for_tokenizer(folders / "base", tokenizer).vocab_size == max(
            rows, len(tokenizer)
        )
        return
    with pytest.raises(UserError, match="tokenizer in .* is not that of"):
        hf.config_for_tokenizer(folders / "base", tokenizer)


def test_tokenizer_files_of_different_bases_are_refused(folders):
    for old in ("tokenizer.json", "tokenizer_config.json"):
        (folders / "base" / old).unlink()
    shutil.copyfile(V1, folders / "base" / "tokenizer.model")
    for i, spelling in (
        (3, "[INST]"),
        (32000, "<|im_start|>"),
    ):  # v3's third; ChatML tokens the other way round, without added_tokens.json
        (folders / "base" / "tokenizer_config.json").write_text(
            json.dumps({"added_tokens_decoder": {i: {"content": spelling}}})
        )
        with pytest.raises(
            UserError, match=f"tokenizer.model: id {i} is .*tokenizer_config.json makes it"
        ):
            load_tokenizer(folders / "base")


def test_unigram_sentencepiece_model_is_refused(tmp_path):
    text = [
        "The quick brown fox jumps over the lazy dog, don't you know? 12345 >>> yes and no"
    ] * 50
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="unigram",
        vocab_size=300,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        minloglevel=2,
        remove_extra_whitespaces=False,
    )
    with pytest.raises(UserError, match="is not a BPE model"):
        load_tokenizer(tmp_path)


def test_special_token_without_a_row_is_never_generated(folders):
    """Some bases' tokenizers have a pad token after the last row."""
    engine = load_tokenizer(folders / "base").engine
    engine.add_special_tokens(["<pad>"])
    engine.save(str(folders / "base" / "tokenizer.json"))
    tokenizer, model = load_tokenizer(folders / "base"), load(folders / "base")
    assert tokenizer.engine.token_to_id("<pad>") == model.config.vocab_size == 2002
    assert max(generate.Decoder(model, tokenizer, 64).generate(tokenizer.encode("hi")[0], 9)) < 2002
    engine.add_tokens(["typed"])
    engine.save(str(folders / "base" / "tokenizer.json"))
    with pytest.raises(UserError, match="gives 'typed' the id 2003, the model has 2002"):
        load(folders / "base")


# --- nothing is changed


def state_of(folder):
    return {
        path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes())
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize("program", ["train", "merge"])
@pytest.mark.parametrize(
    "lie", ["cut off", "int8 weights", "NaN in weights", "turned ChatML tokens", "code of its own"]
)
def test_refused_program_changes_nothing(
    program, lie, folders, chats, tmp_path, monkeypatch, capsys
):
    LIES[lie][1](folders)
    out = shutil.copytree(folders / "other", tmp_path / "out")
    for file in (
        "metrics.jsonl",
        "resume/step-00000003/rank-00000.json",
        "adapter_model.safetensors",
    ):
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        (out / file).write_text("precious")
    before = state_of(out)
    own = shutil.copytree(chats, tmp_path / "chats")
    arguments = {
        "train": [
            "--model",
            folders / "base",
            "--data",
            own,
            "--device",
            "cpu",
            "--seq-len",
            160,
            "--max-steps",
            1,
            "--out",
            out,
        ],
        "merge": ["merge", folders / "ckpt", out],
    }[program]
    monkeypatch.setattr(sys, "argv", [program, *map(str, arguments), "--overwrite"])
    with pytest.raises(SystemExit) as end:
        cli.run(train.main if program == "train" else main)
    last = [line for line in capsys.readouterr().err.splitlines() if line.strip()][-2:]
    assert end.value.code == 2 and str(folders) in last[0] and state_of(out) == before


def test_commands_refuse_in_two_lines(folders, chats, tmp_path):
    pickled(MODEL)(folders)
    refused(command("chat.py", folders / "ckpt", "-p", "hi", "--device", "cpu"), MODEL, "pickle")
    refused(command("lora.py", "merge", folders / "ckpt", tmp_path / "out"), MODEL, "pickle")
    refused(
        command(
            "train.py",
            "--model",
            folders / "base",
            "--data",
            chats,
            "--device",
            "cpu",
            "--out",
            tmp_path / "out",
        ),
        MODEL,
        "pickle",
    )
    (folders / "other" / "persona.json").write_text('{"contacts": [1]}')
    with pytest.raises(UserError, match="persona.json holds no names"):
        read_names(folders / "other")
    assert not (tmp_path / "out").exists()


# --- saves of a run


@pytest.fixture
def save(tmp_path, monkeypatch):
    """Two ranks' saves of an adapter after steps 2 and 3."""
    model, optimizer = adapted()
    for number, rank in itertools.product((2, 3), (0, 1)):
        halves = lambda tensor, rank=rank: (
            tensor.detach().chunk(2)[rank],
            rank * -(-len(tensor) // 2),
        )
        monkeypatch.setattr(shards, "local_shard", halves)
        ranks, note = (
            distributed.Distributed(ALONE.device, rank, 2),
            {"step": number, "updates": number},
        )
        writer = checkpoint.CheckpointWriter(
            tmp_path / f"step-{number:08}", checkpoint.training_state(model, optimizer), ranks, note
        )
        writer.join()
        assert writer.error is None
    monkeypatch.undo()
    return tmp_path / "step-00000003"


def adapted():
    model = random_model()
    lora.inject(model, rank=4)
    return model, optim.make_optimizer(model, 0.0, 0.0)


def rewritten(name, act):
    """Other tensors under the same metadata."""

    def change(folder):
        with cli.open_safetensors(folder / name) as file:
            metadata = file.metadata()
        weights = load_file(folder / name)
        act(weights)
        save_file(weights, folder / name, metadata=metadata)

    return change


TENSORS, NOTE, NAME = (
    "rank-00001.safetensors",
    "rank-00001.json",
    "model.layers.0.mlp.up_proj.lora_B",
)


@pytest.mark.parametrize(("act", "expected"), [
    (cut(TENSORS, 0.5), "rank-00001.safetensors can't be read"),
    (pickled(TENSORS), "it is a pickle"),
    (lambda f: (f / TENSORS).unlink(), "it is missing"),
    (edit(NOTE, world=...), "damaged, or of two different checkpoints"),
    (cut(NOTE, 0.5), "damaged, or of two different checkpoints"),
    (lambda f: shutil.copyfile(f.parent / "step-00000002" / TENSORS, f / TENSORS), "damaged, or of two different checkpoints"),
    (lambda f: [shutil.copyfile(f.parent / "step-00000002" / n, f / n) for n in (TENSORS, NOTE)], "rank 1 at step 2"),
    (lambda f: [shutil.copyfile(f / n.replace("1", "0"), f / n) for n in (TENSORS, NOTE)], "rank 0 at step 3"),
    (rewritten(TENSORS, lambda t: t.pop(NAME)), f"{NAME} is missing"),
    (rewritten(TENSORS, lambda t: t.update({NAME: torch.ones(3)})), r"lora_B is \[3\], rank-00001.json makes it"),
    (rewritten(TENSORS, retyped(NAME, torch.int8)), "lora_B is of I8"),
    (rewritten(TENSORS, retyped(NAME, torch.float16)), "lora_B is torch.float16, this run"),
    (lambda f: [path.unlink() for path in f.glob("*")], "is empty"),
], ids=["cut off", "a pickle", "missing", "a key less", "half a note", "another step's tensors", "another step's", "another rank's", "a tensor less", "another shape", "int8", "another dtype", "empty"])  # fmt: skip
def test_damaged_checkpoint_is_refused(act, expected, save):
    checkpoint.restore(*adapted(), save, ALONE)
    act(save)
    with pytest.raises(UserError, match=expected):
        checkpoint.restore(*adapted(), save, ALONE)


def test_adapter_run_resumes_over_its_own_base_only(save):
    options = train.Options(lora=True)
    own = {"data": "rows", "fingerprint": "its own"}
    note = {"step": 3, "updates": 3, "config": dataclasses.asdict(options), **own}
    shutil.rmtree(save)
    checkpoint.CheckpointWriter(save, {}, ALONE, note).join()
    assert run.validate_metadata(save, options, ALONE, own)["step"] == 3
    with pytest.raises(UserError, match="has other weights than when the run"):
        run.validate_metadata(save, options, ALONE, own | {"fingerprint": "another's"})


# --- damage at random


ODD = (
    None,
    True,
    -1,
    0,
    1,
    3,
    10**30,
    1e300,
    "x",
    "",
    "\0",
    "../x",
    [],
    [[]],
    [1, "x"],
    {},
    {"a": 1},
    {"content": 1},
)


def damaged(content, rng):
    """A JSON file, or the header of a safetensors file, cut, overwritten, or well-formed with another value somewhere."""
    head = content[:8] if content[:1] != b"{" else b""
    size = struct.unpack("<Q", head)[0] if head else len(content)
    text, rest = content[len(head) : len(head) + size], content[len(head) + size :]
    kind = rng.choice(("cut", "flip", "hole", "value", "value", "value"))
    at = rng.randrange(len(text))
    if kind == "cut":
        return content[: rng.randrange(len(content))]
    if kind == "flip":
        return head + text[:at] + bytes([rng.randrange(256)]) + text[at + 1 :] + rest
    if kind == "hole":
        return head + text[:at] + bytes(len(text[at : at + 64])) + text[at + 64 :] + rest
    value = json.loads(text)
    places = list(places_in(value))
    within, key = rng.choice(places[:40] if rng.random() < 0.5 else places)
    if rng.random() < 0.3:
        del within[key]
    else:
        within[key] = rng.choice(ODD)
    text = json.dumps(value).encode()
    return (struct.pack("<Q", len(text)) if head else b"") + text + rest


def places_in(value):
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from places_in(value[key])


TARGETS = {
    "base": ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"),
    "two": (INDEX, "model-00002-of-00002.safetensors"),
    "ckpt": ("adapter_model.safetensors", "adapter_config.json", "run.json"),
}


def test_damaged_files_are_refused_or_load(folders):
    targets, loaded = [(which, name) for which, names in TARGETS.items() for name in names], 0
    content = {target: (folders / Path(*target)).read_bytes() for target in targets}
    for number in range(MUTANTS):
        rng = random.Random(number)
        target = which, name = rng.choice(targets)
        (folders / which / name).write_bytes(damaged(content[target], rng))
        try:
            load(folders / which)
            loaded += 1
        except UserError as error:
            assert len(str(error).splitlines()) == 2, f"mutant {number}: {error}"
        except BaseException as error:
            raise AssertionError(f"mutant {number}: {which}/{name}") from error
        (folders / which / name).write_bytes(content[target])
    print(f"{MUTANTS:,} damaged files, {loaded:,} of them load")
    assert 0 < loaded < MUTANTS / 2
