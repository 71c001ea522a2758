"""A rented box: a real sshd on loopback, with a home, a PATH and keys of its own. Nothing else is talked to."""

import getpass
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, refused

from exports.command import find_our_files
from weights.load import load_model

SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
TOOLS = "bash sh cat sed grep flock date mkdir mv rm cp ls cmp sort tee sleep id setsid nohup tail timeout true tar gzip cksum dirname wc".split()
QUICK = ("--seq-len", 160, "--device", "cpu", "--dtype", "fp32", "--samples", 0, "--micro-batch", 4)
needs_sshd = pytest.mark.skipif(
    SSHD is None or shutil.which("ssh") is None,
    reason="there is no sshd to be the box (openssh-server)",
)


STARTED = []


def provide(folder, *tools):
    """A PATH of few tools: no nvidia-smi, no apt-get."""
    folder.mkdir(parents=True)
    for name in {*TOOLS, *tools}:
        (folder / name).symlink_to(shutil.which(name))


def tool(folder, name, text):
    (folder / name).unlink(missing_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{text}\n")
    (folder / name).chmod(0o755)


# pip comes with torch: to make another takes seconds
WITH_TORCH = f"""[ "$1 $2" != "-m venv" ] || set -- "$@" --without-pip
exec {sys.executable} "$@\""""


@pytest.fixture(scope="module")
def venv(tmp_path_factory):
    """The .venv that a box has after its first run."""
    folder = tmp_path_factory.mktemp("prepared")
    provide(folder / "bin")
    tool(folder / "bin", "python3", WITH_TORCH)
    done = on_box(folder, "prepare", PATH=str(folder / "bin"))
    assert done.returncode == 0 and "torch works and is kept" in done.stdout, done.stderr
    return folder / ".venv"


def on_box(folder, name, **env):
    shutil.copy(ROOT / "requirements.txt", folder)
    words = [shutil.which("bash"), ROOT / "remote.sh", "--on-box", folder, name]
    return subprocess.run(words, env={**os.environ, **env}, capture_output=True, text=True)


class Box:
    """A machine for rent: an sshd whose sessions see only `tools`, and a python3 that has torch. `venv`: what a run before has left."""

    def __init__(self, folder, *tools, venv=None):
        self.home, self.bin = folder / "home", folder / "bin"
        for path in (self.home, folder / "tmux"):
            path.mkdir(parents=True)
        provide(self.bin, *tools)
        tool(self.bin, "python3", WITH_TORCH)
        tool(
            self.bin,
            "enter",
            f"export HOME='{self.home}' PATH='{self.bin}' TMUX_TMPDIR='{folder / 'tmux'}' OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1\n"
            'cd "$HOME" && exec bash -c "$SSH_ORIGINAL_COMMAND"',
        )
        for name in ("host", "mine"):
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True
            )
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        (folder / "sshd_config").write_text(
            f'ListenAddress 127.0.0.1\nPort {self.port}\nHostKey "{folder}/host"\nAuthorizedKeysFile "{folder}/mine.pub"\nPidFile none\n'
            f'ForceCommand "{self.bin}/enter"\nUsePAM no\nStrictModes no\nPasswordAuthentication no\nPermitRootLogin prohibit-password\n'
        )
        if os.getuid() == 0:  # sshd wants it, and only root can be refused for it
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        self.sshd = subprocess.Popen(
            [SSHD, "-D", "-e", "-f", folder / "sshd_config"], stderr=open(folder / "sshd.txt", "w")
        )
        self.line = f"ssh -p {self.port} -i '{folder}/mine' {getpass.getuser()}@127.0.0.1 -L 8080:localhost:8080"
        self.line += f" -o UserKnownHostsFile='{folder}/known'"
        self.code = self.home / "doppelganger"
        if venv:
            shutil.copytree(venv, self.code / ".venv", symlinks=True)
        until(self.answers)

    def answers(self):
        with socket.socket() as trial:
            return trial.connect_ex(("127.0.0.1", self.port)) == 0

    def drop(self):
        """End the connections, and nothing else."""
        for pid in subprocess.run(
            ["pgrep", "-P", str(self.sshd.pid)], capture_output=True, text=True
        ).stdout.split():
            os.kill(int(pid), signal.SIGKILL)

    def train(self, sign):
        for pid in self.processes("train.py\0--"):
            os.kill(pid, sign)

    def processes(self, named=""):
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if (
                    Path(os.readlink(path / "cwd")).is_relative_to(self.home)
                    and named in (path / "cmdline").read_text()
                ):
                    yield int(path.name)
            except OSError:
                pass

    def vanish(self):
        while pids := [*self.processes()]:
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            time.sleep(0.1)
        shutil.rmtree(self.code, ignore_errors=True)

    def log(self):
        with open(self.code / ".run" / "log", newline="") as file:
            return file.read()

    def files(self):
        """What came there, and what was made of it but the run's own files and the tools'."""
        found = {
            str(path.relative_to(self.home)) for path in self.home.rglob("*") if path.is_file()
        }
        return {
            name
            for name in found
            if not re.search(r"/(\.venv|\.run|__pycache__|ckpt|cache)/|^\.cache/", name)
        }


@pytest.fixture
def box(tmp_path):
    """box(name, *tools) → a Box"""
    boxes = []

    def make(name, *tools, **ways):
        boxes.append(Box(tmp_path / name, *tools, **ways))
        return boxes[-1]

    yield make
    for process in STARTED:
        if process.poll() is None:
            process.kill()
    for one in boxes:
        one.vanish()
        one.sshd.terminate()
        one.drop()
        one.sshd.wait(10)


@pytest.fixture
def home(tmp_path, chats):
    """Where a person works: names have spaces, and there is an export that must stay."""
    folder = tmp_path / "at home"
    shutil.copytree(chats, folder / "my data")
    (folder / "my data" / "cache").mkdir(exist_ok=True)
    for name in (
        "result.json",
        "my data/result.json",
        "my data/export.zip",
        "my data/cache/train-1.safetensors",
        "my data/report.json",
    ):
        (folder / name).write_text("secret")
    return folder


def start(home, line, *flags, on_done=None, env=None):
    """remote.sh in the background, what it says in said.txt."""
    words = [
        "nice",
        "-n",
        "5",
        "bash",
        ROOT / "remote.sh",
        line,
        *(["--on-done", on_done] if on_done else []),
        "--",
        *flags,
    ]
    env = {**os.environ, "HOME": str(home), "FETCH_SECONDS": "1", **(env or {})}
    with open(home / "said.txt", "w") as out:
        STARTED.append(
            subprocess.Popen(
                [*map(str, words)],
                cwd=home,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        )
    return STARTED[-1]


def run(home, *given, code=0, **ways):
    """→ what it said"""
    process = start(home, *given, **ways)
    assert process.wait(timeout=600) == code, said(home)
    return said(home)


def ask(home, *words):
    env = {**os.environ, "HOME": str(home)}
    return subprocess.run(
        ["bash", ROOT / "remote.sh", *map(str, words)],
        cwd=home,
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
    )


def said(home):
    with open(home / "said.txt", newline="") as file:
        return file.read()


def flip(path):
    """Its last byte, at its old time."""
    times, text = path.stat(), path.read_bytes()
    path.write_bytes(text[:-1] + bytes([text[-1] ^ 1]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def until(condition, process=None, seconds=300):
    for _ in range(seconds * 20):
        if condition():
            return
        assert process is None or process.poll() is None, "it ended too early"
        time.sleep(0.05)
    raise AssertionError("it never came about")


NOTICE = re.compile(r"remote: [^\n]*\n")


def steps(out):
    return [
        line["step"]
        for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        if "loss" in line
    ]


def saves(out):
    return sorted(path.name for path in out.glob("resume/step-????????"))


FLAGS = ("--data", "my data", "--out", "my ckpt", *QUICK)
SENT = {
    f"doppelganger/{path.relative_to(ROOT)}"
    for path in (
        *ROOT.glob("*.py"),
        *ROOT.glob("exports/*.py"),
        *ROOT.glob("exports/*.toml"),
        *ROOT.glob("weights/*.py"),
        *ROOT.glob("weights/*.toml"),
        *ROOT.glob("training/*.py"),
        *ROOT.glob("inference/*.py"),
    )
}
SENT |= {f"doppelganger/{name}" for name in ("remote.sh", "fsdp_launch.sh", "requirements.txt")}
SENT |= {f"doppelganger/data/{name}" for name in ("train.jsonl", "val.jsonl", "persona.json")}


@needs_sshd
@pytest.mark.skipif(
    not (shutil.which("rsync") and shutil.which("tmux")), reason="there is no rsync or no tmux"
)
def test_a_whole_run_brings_home_a_model_that_loads(box, home, base):
    there = box("box", "tmux", "rsync")
    flags = ("--lora", "--model", base, "--lr", 1e-2, "--max-steps", 6, *FLAGS)
    heard = run(home, there.line, *flags, on_done="echo 'well done' >> done.txt")
    assert "with rsync" in heard and "torch works and is kept" in heard
    assert heard.splitlines()[-1] == "remote: The box is still billing: destroy it."
    out = home / "my ckpt"
    assert there.files() == SENT and there.code.stat().st_mode & 0o777 == 0o700
    assert out.stat().st_mode & 0o777 == 0o700 and (home / "done.txt").read_text() == "well done\n"
    assert not (out / ".incoming").exists() and steps(out) == [1, 2, 3, 4, 5, 6]
    assert load_model(str(out), torch.float32).lora["rank"] == 32
    merge = re.search(
        r"with the base that is there: (.* 'cd doppelganger && HF_HOME=\$PWD/\.hub .*')$",
        heard,
        re.MULTILINE,
    )[1]
    done = subprocess.run(
        ["bash", "-c", merge], capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=240
    )
    assert done.returncode == 0 and (there.code / "clone" / "model.safetensors").exists(), (
        done.stderr
    )
    (
        out / "run.json"
    ).unlink()  # as if it had been lost while it came home, an adapter of before left in its place
    adapter = (out / "adapter_model.safetensors").read_bytes()
    (out / ".incoming").mkdir()
    shutil.copy2(there.code / "ckpt" / "adapter_model.safetensors", out / ".incoming")
    flip(out / ".incoming" / "adapter_model.safetensors")
    run(home, there.line, *flags)
    assert (out / "adapter_model.safetensors").read_bytes() == adapter and (
        out / "run.json"
    ).exists()
    again = ask(home, there.line, "--", *flags)
    assert again.returncode == 0 and "is finished: nothing is left to do" in again.stdout


@needs_sshd
def test_without_rsync_and_tmux_a_full_fine_tune_is_resumed_and_brings_only_the_end(
    box, home, base, venv
):
    """tar and nohup in their place; killed there, the same command goes on."""
    there, out = box("box", venv=venv), home / "my ckpt"
    flags = (
        "--model",
        base,
        "--max-steps",
        40,
        "--batch",
        1,
        "--lr",
        3e-3,
        "--save-every",
        4,
        *FLAGS,
    )
    process = start(home, there.line, *flags)
    until(lambda: saves(there.code / "ckpt"), process)
    assert not [path for path in out.rglob("*") if path.name not in (".remote", ".incoming")]
    assert find_our_files(out) and find_our_files(there.code / ".run")  # --wipe knows them
    there.train(signal.SIGKILL)
    assert (
        process.wait(timeout=240) == 137
        and "with tar" in said(home)
        and "Training ended before its time (exit code 137)" in said(home)
    )
    heard = run(home, there.line, *flags, on_done="exit 3", code=3)
    assert "going on after step" in heard and "--on-done ended with exit code 3" in heard
    assert there.files() == SENT and saves(there.code / "ckpt")
    assert not (out / "resume").exists() and steps(out) == [*range(1, 41)]
    load_model(str(out))


@needs_sshd
def test_a_planned_end_is_told_as_one(box, home, base, venv):
    there = box("box", venv=venv)
    flags = (
        "--lora",
        "--model",
        base,
        "--lr",
        1e-3,
        "--max-steps",
        9999,
        "--batch",
        1,
        "--max-minutes",
        0.05,
        *FLAGS,
    )
    heard = run(home, there.line, *flags)
    assert (
        "Training ended when --max-minutes were over, as planned. The same command goes on" in heard
        and "before its time" not in heard
    )
    assert bool(saves(home / "my ckpt")) != (
        "stopped before the first step" in heard
    )  # a busy machine has no step done by then


@needs_sshd
@pytest.mark.skipif(
    not (shutil.which("rsync") and shutil.which("tmux")), reason="there is no rsync or no tmux"
)
def test_lost_connections_and_lost_boxes_lose_no_more_than_what_no_save_holds(
    box, home, base, venv
):
    there, out = box("box", "tmux", "rsync", venv=venv), home / "my ckpt"
    flags = (
        "--lora",
        "--model",
        base,
        "--lr",
        1e-3,
        "--max-steps",
        60,
        "--batch",
        1,
        "--save-every",
        5,
        *FLAGS,
    )
    process = start(home, there.line, *flags, on_done="echo done >> done.txt")
    until(lambda: saves(there.code / "ckpt"), process)
    there.train(signal.SIGSTOP)  # a fast machine shall not be done before we are
    until(lambda: saves(out), process)
    until(lambda: there.drop() or "no connection" in said(home), process)
    there.train(signal.SIGCONT)
    at = len(there.log())
    until(lambda: len(there.log()) > at, process)
    there.train(signal.SIGSTOP)
    until(lambda: NOTICE.sub("", said(home)) == NOTICE.sub("", there.log()), process)

    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(
        timeout=240
    ) == 130 and "Training goes on there, and the box is still billing" in said(home)
    refused(
        ask(home, there.line, "--", *flags, "--seed", 1, "--out", "other"), "busy with another run"
    )
    process = start(home, there.line, *flags, on_done="echo done >> done.txt")
    until(lambda: "back to the run that is there" in said(home), process)
    before = saves(there.code / "ckpt")[-1]
    there.train(signal.SIGCONT)
    until(lambda: saves(there.code / "ckpt")[-1] > before, process)
    there.train(signal.SIGSTOP)
    until(lambda: saves(out) and saves(out)[-1] > before, process)
    there.vanish()
    assert process.wait(timeout=240) == 2 and "Nothing of this run is there any more" in said(home)
    (save,) = saves(out)
    assert not (home / "done.txt").exists() and {
        path.name for path in (out / "resume" / save).iterdir()
    } == {
        "rank-00000.json",
        "rank-00000.safetensors",
    }

    heard = run(
        home, box("new", "tmux", "rsync", venv=venv).line, *flags, on_done="echo done >> done.txt"
    )
    assert f"going on after step {int(save[5:])}" in heard and steps(out) == [*range(1, 61)]
    assert (home / "done.txt").read_text() == "done\n" and load_model(str(out)).lora


@needs_sshd
def test_what_a_person_can_mend_is_said_in_two_lines_before_anything_goes_there(
    box, home, tmp_path
):
    there = box("box")
    assert subprocess.run(["bash", "-n", ROOT / "remote.sh"]).returncode == 0
    refused(ask(home, "--", "--lora"), "The line that the provider shows", "./remote.sh 'ssh -p")
    refused(ask(home, there.line, "--lora"), "The line that the provider shows")
    refused(ask(home, there.line, "--", "--lora"), "data/train.jsonl is missing", "data.py")
    refused(ask(home, there.line, "--", "--data=my data"), "two words are needed", "--data my data")
    (home / "held").mkdir()
    (home / "held" / "run.json").write_text("{}")
    refused(
        ask(home, there.line, "--", "--data", "my data", "--out", "held"),
        "held already holds something",
        "--out",
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = re.sub(r"-p \d+", f"-p {free.getsockname()[1]}", there.line)
        refused(
            ask(home, closed, "--", "--data", "my data"), "Connection refused", "the whole line"
        )
    tool(
        there.bin,
        "nvidia-smi",
        "echo '| NVIDIA-SMI 470.82    Driver Version: 470.82    CUDA Version: 11.4     |'",
    )
    refused(ask(home, there.line, "--", "--data", "my data"), "too old", "CUDA 12.6")
    (there.bin / "nvidia-smi").unlink()
    tool(there.bin, "python3", "exit 1")
    refused(ask(home, there.line, "--", "--data", "my data"), "no Python 3.11 or newer")
    other = (tmp_path / "box" / "mine.pub").read_text()
    (tmp_path / "box" / "known").write_text(f"[127.0.0.1]:{there.port} {other}")
    refused(
        ask(home, there.line, "--", "--data", "my data"),
        "Host key verification failed",
        "ssh-keygen -R",
    )
    assert there.files() == set()


PYTHON = """case "$*" in
*torch.ones*) [ -e wheel ] && [ "$BAD" != all ] && [ "$(cat wheel)" != "$BAD" ] && echo "$PWD/torch" ;;
"-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
*install*torch==*) echo "$*" > pip && last=${!#} && echo "${last##*/}" > wheel ;;
*install*) cat > others ;;
esac"""


@pytest.mark.parametrize(
    "driver, wheel",
    [
        ("12.0", "cu126"),
        ("12.7", "cu126"),
        ("12.8", "cu128"),
        ("12.9", "cu128"),
        ("13.0", "cu130"),
        ("13.1", "cu130"),
        ("", "cpu"),
    ],
)
def test_the_wheel_is_the_one_for_the_driver(driver, wheel, tmp_path):
    provide(tmp_path / "bin")
    tool(tmp_path / "bin", "python3", PYTHON)
    if driver:
        tool(
            tmp_path / "bin",
            "nvidia-smi",
            f"echo '| Driver Version: 580.1   CUDA Version: {driver} |'",
        )
    done = on_box(tmp_path, "prepare", PATH=str(tmp_path / "bin"), BAD="")
    assert done.returncode == 0, done.stderr
    assert (
        f"torch==2.13.0+{wheel} --index-url" in (tmp_path / "pip").read_text()
        and (tmp_path / "wheel").read_text() == f"{wheel}\n"
    )
    assert (
        "safetensors==" in (tmp_path / "others").read_text()
        and "torch==" not in (tmp_path / "others").read_text()
    )
    shutil.rmtree(tmp_path / ".venv")
    refused(
        on_box(tmp_path, "prepare", PATH=str(tmp_path / "bin"), BAD="all"),
        "torch==2.13.0 doesn't compute there",
        "newer driver",
    )
    if wheel in ("cu128", "cu130"):
        (tmp_path / "wheel").unlink()
        assert on_box(tmp_path, "prepare", PATH=str(tmp_path / "bin"), BAD=wheel).returncode == 0
        assert (tmp_path / "wheel").read_text() != f"{wheel}\n"
