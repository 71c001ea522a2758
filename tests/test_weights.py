import functools
import http.server
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, VOCAB, command, refused, save_mistral
from safetensors.torch import load_file, save_file

import cli
from cli import UserError
from model import Transformer
from weights import devices, hf
from weights import load as weights_load
from weights import save as weights_save
from weights.load import load_for_chat, load_model, load_weights
from weights.save import save_model


@pytest.fixture
def broken(base, tmp_path):
    """A copy of the base to damage."""
    return shutil.copytree(base, tmp_path / "broken")


def change(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(("edit", "expected"), [
    (lambda t: t.pop(NORM), f"{NORM} is missing"),
    (lambda t: t.update({NORM: torch.ones(3)}), r"layers.1.input_layernorm.weight is \[3\], config.json makes it \[64\]"),
    (lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.ones(3)}), "layers.2.mlp.up_proj.weight belongs to no part"),
    (lambda t: t.update({"lm_head.weight": torch.ones(VOCAB + 5, 64)}), rf"lm_head.weight is \[{VOCAB + 5}, 64\]"),
], ids=["missing", "wrong shape", "unknown", "larger vocabulary"])  # fmt: skip
def test_wrong_tensor_is_named(broken, edit, expected):
    change(broken, edit)
    with pytest.raises(UserError, match=expected):
        load_model(str(broken))


def test_chat_reads_config_and_index_once(base, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(weights_save, "MAX_FILE_BYTES", 300_000)
    save_model(load_model(str(base)), tmp_path, tokenizer)
    read, read_json = [], cli.read_json
    monkeypatch.setattr(
        cli, "read_json", lambda path, *rest: read.append(path.name) or read_json(path, *rest)
    )
    load_for_chat(str(tmp_path), None, 512, torch.device("cpu"), tokenizer, "bf16")
    assert sorted(read) == ["config.json", "model.safetensors.index.json"]


def test_unreadable_file_is_named(broken):
    whole = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="model.safetensors can't be read"):
        load_model(str(broken))
    (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickle"):
        load_model(str(broken))


@pytest.mark.parametrize(("key", "value", "expected"), [
    ("model_type", "gpt2", "gpt2"),
    ("rope_parameters", {"rope_type": "longrope", "rope_theta": 1e4}, "longrope"),
    ("quantization_config", {"bits": 4}, "quantized"),
])  # fmt: skip
def test_unsupported_models_are_refused(broken, key, value, expected):
    raw_config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(raw_config | {key: value}))
    with pytest.raises(UserError, match=expected):
        hf.read_config(broken)


def test_old_and_new_rope_keys_are_read(tmp_path):
    for name, spelling in {
        "old": {"rope_theta": 5e5, "rope_parameters": None},
        "new": {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
    }.items():
        folder = save_mistral(tmp_path / name)
        raw_config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(raw_config | spelling))
        assert hf.read_config(folder).rope_theta == 5e5


def mapped_bytes():
    """Return the bytes of memory in use that are pages of files."""
    return next(
        int(line.split()[1]) * 1024
        for line in open("/proc/self/status")
        if line.startswith("RssFile")
    )


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory is read from /proc")
@pytest.mark.parametrize("position", [0, -1])
def test_weights_are_mapped_and_all_checked_for_nan(tmp_path, position, monkeypatch):
    monkeypatch.setattr(weights_load, "SCAN_BYTES", 1 << 20)
    folder = save_mistral(tmp_path, intermediate_size=1 << 16)
    before = mapped_bytes()
    model = load_model(str(folder))
    after_load = mapped_bytes() - before
    up = model.model.layers[1].mlp.up_proj.weight
    assert up.shape == (1 << 16, 64) and after_load < up.nbytes
    assert (
        float(sum(layer.mlp.up_proj.weight.sum() for layer in model.model.layers)) != 0
        and mapped_bytes() - before - after_load > up.nbytes
    )
    change(
        folder,
        lambda t: (
            t["model.layers.1.mlp.up_proj.weight"]
            .view(-1)[position : position + 1 or None]
            .fill_(torch.inf)
        ),
    )
    with pytest.raises(UserError, match="layers.1.mlp.up_proj.weight holds NaN or infinity"):
        load_model(str(folder))


def test_new_rows_are_the_mean_of_the_old(base):
    config = hf.with_vocab_size(hf.read_config(base), VOCAB + 2)
    model = Transformer(config)
    load_weights(model, base)
    old = load_file(base / "model.safetensors")["lm_head.weight"]
    assert model.lm_head.weight.shape == (VOCAB + 2, 64) and torch.equal(
        model.lm_head.weight[:VOCAB], old
    )
    torch.testing.assert_close(model.lm_head.weight[VOCAB + 1], old.mean(0))


def test_save_model_splits_files_and_writes_an_index(base, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(weights_save, "MAX_FILE_BYTES", 300_000)
    model = load_model(str(base))
    save_model(model, tmp_path, tokenizer, torch.float32)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert (
        len(files) > 1
        and files == sorted(set(index["weight_map"].values()))
        and not list(tmp_path.glob("new-*"))
    )
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in model.parameters())
    again = load_model(str(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))


def unless_spent(left, act, *args, **kwargs):
    """Call `act`, or raise KeyboardInterrupt when the iterator is used up."""
    if next(left, None) is None:
        raise KeyboardInterrupt
    return act(*args, **kwargs)


def test_killed_save_leaves_a_whole_model(base, tmp_path, tokenizer, monkeypatch):
    """A kill at any write or rename leaves the old model, or the whole new one."""
    monkeypatch.setattr(weights_save, "MAX_FILE_BYTES", 300_000)
    model, norms = load_model(str(base)), []
    for number in range(3):
        with torch.no_grad():
            model.model.norm.weight.fill_(number)
        for limit in itertools.count():
            left = iter(range(limit))
            with monkeypatch.context() as patch:
                for module, name in (
                    (weights_save.os, "replace"),
                    (weights_save, "write_json"),
                    (weights_save, "save_file"),
                ):
                    patch.setattr(
                        module, name, functools.partial(unless_spent, left, getattr(module, name))
                    )
                try:
                    save_model(model, tmp_path, tokenizer, torch.float32)
                    ended = True
                except KeyboardInterrupt:
                    ended = False
            if number or ended:
                norms.append(float(load_model(str(tmp_path)).model.norm.weight[0]))
            if ended:
                break
        assert limit > 5 and norms == sorted(norms) and norms[-1] == number
        assert len([*tmp_path.glob("model*.safetensors")]) == len(
            {
                *json.loads((tmp_path / "model.safetensors.index.json").read_text())[
                    "weight_map"
                ].values()
            }
        )


def test_clear_output_deletes_only_our_files(tmp_path):
    """An adapter beside a whole model would be loaded instead of the model."""
    old = "adapter_config.json adapter_model.safetensors config.json model.safetensors "
    old += "model-00001-of-00002.safetensors model.safetensors.index.json new-1.safetensors "
    old += "metrics.jsonl loss.png Modelfile resume/step-00000001"
    mine = {"notes.txt", "facts.md", "model.txt"}
    (tmp_path / "resume").mkdir()
    for name in (*old.split(), *mine):
        (tmp_path / name).write_text("x")
    hf.clear_output(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == mine


def test_unusable_gpu_is_an_error_never_the_cpu(tmp_path, monkeypatch):
    driver = tmp_path / "version"
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.82.01  Wed Oct 27\n")
    real = devices.Path
    monkeypatch.setattr(
        devices, "Path", lambda *a: driver if a == ("/proc/driver/nvidia/version",) else real(*a)
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for cuda, expected in ((None, "built for the CPU"), ("13.0", "too old")):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        with pytest.raises(UserError, match=f"470.82.01.*{expected}|{expected}.*") as caught:
            devices.pick_device()
        assert "--device cpu" in str(caught.value) and len(str(caught.value).splitlines()) == 2
    assert devices.pick_device("cpu").type == "cpu"


def test_a_gpu_without_bf16_is_told_from_one_with_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    properties = SimpleNamespace(major=7)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert devices.lacks_bf16(torch.device("cuda", 0))
    assert not devices.lacks_bf16(torch.device("cpu"))
    properties.major = 8
    assert not devices.lacks_bf16(torch.device("cuda", 0))


# --- the hub, as a small server that speaks its protocol


class Hub(http.server.BaseHTTPRequestHandler):
    """Serves one model folder under any repository name.

    `refuse`: (status, error code) of every answer, if set.
    """

    folder, refuse, asked = None, None, []

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        Hub.asked.append(self.path)
        if Hub.refuse:
            status, code = Hub.refuse
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", code)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        files = {p.name: p for p in Hub.folder.iterdir()}
        name = self.path.split("?")[0].rpartition("/")[2]
        if "/resolve/" in self.path and name in files:
            content, headers = (
                files[name].read_bytes(),
                {"ETag": f'"{name}-{files[name].stat().st_size}"', "X-Repo-Commit": "a" * 40},
            )
        else:
            siblings = [
                {"rfilename": n, "size": p.stat().st_size, "blobId": n} for n, p in files.items()
            ]
            tree = [
                {"type": "file", "path": n, "size": p.stat().st_size, "oid": n}
                for n, p in files.items()
            ]
            answer = (
                tree
                if "/tree/" in self.path
                else {
                    "_id": "1",
                    "id": "some/base",
                    "sha": "a" * 40,
                    "private": False,
                    "gated": False,
                    "downloads": 0,
                    "likes": 0,
                    "tags": [],
                    "siblings": siblings,
                }
            )
            content, headers = json.dumps(answer).encode(), {"Content-Type": "application/json"}
        first = int(self.headers["Range"][6:].split("-")[0]) if "Range" in self.headers else 0
        self.send_response(206 if first else 200)
        for key, value in {
            **headers,
            "Content-Length": str(len(content) - first),
            "Accept-Ranges": "bytes",
        }.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content[first:])

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "repo")
    for extra in ("consolidated.safetensors", "pytorch_model.bin", "README.md"):
        (folder / extra).write_text("unwanted")
    Hub.folder, Hub.refuse, Hub.asked = folder, None, []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
        "HF_HUB_DISABLE_XET": "1",
    }
    yield environment
    server.shutdown()


def test_hub_downloads_config_tokenizer_and_weights_only(hub):
    done = command("train.py", "--download-only", "--model", "some/base", env=hub)
    assert done.returncode == 0, done.stderr
    folder = done.stdout.strip().rpartition(" ")[2]
    assert sorted(os.listdir(folder)) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.model",
    ]
    Hub.asked.clear()
    again = command(
        "train.py", "--download-only", "--model", "some/base", env={**hub, "HF_HUB_OFFLINE": "1"}
    )
    assert again.returncode == 0 and Hub.asked == []  # what is there needs no network


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (403, "GatedRepo", "accept"),
        (401, "RepoNotFound", "hf auth login"),
        (404, "RepoNotFound", "no such"),
        (500, "", "500"),
    ],
)
def test_hub_error_says_what_to_do(hub, status, code, expected):
    Hub.refuse = status, code
    refused(
        command("train.py", "--download-only", "--model", "some/base", env=hub),
        "some/base",
        expected,
    )


def test_hub_checks_the_disk_before_a_download(hub, tmp_path):
    code = """if True:
        import collections, shutil, cli, train
        usage = collections.namedtuple("Usage", "free")(1000)
        shutil.disk_usage = lambda path: usage
        cli.run(train.main)
    """
    done = subprocess.run(
        [sys.executable, "-c", code, "--download-only", "--model", "some/base"],
        cwd=ROOT,
        env={**os.environ, **hub},
        capture_output=True,
        text=True,
    )
    done.stderr = "\n".join(
        done.stderr.splitlines()[-2:]
    )  # the hub's own warning of the little room, and its bar, stand before
    refused(done, "GB free", "HF_HOME")
    assert not any("model.safetensors" in path and "index" not in path for path in Hub.asked)
