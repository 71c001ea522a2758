"""remote.sh against a rented box: a real sshd on loopback, with its own home, PATH and keys."""

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

from weights.load import load_model

RENT = ROOT / "docs" / "RENT.md"
SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
TOOLS = "bash sh cat sed grep date mkdir mv rm cp ls cmp sort tee sleep id tail timeout true dirname wc".split()
QUICK = ("--seq-len", 160, "--device", "cpu", "--dtype", "fp32", "--samples", 0, "--micro-batch", 4)
needs_box = pytest.mark.skipif(
    SSHD is None or not all(map(shutil.which, ("ssh", "rsync", "tmux"))),
    reason="a box needs sshd (openssh-server), ssh, rsync and tmux",
)


STARTED = []


def provide(folder, *tools):
    """Make a PATH of few tools: no nvidia-smi, no apt-get."""
    folder.mkdir(parents=True)
    for name in {*TOOLS, *tools}:
        (folder / name).symlink_to(shutil.which(name))


def tool(folder, name, text):
    (folder / name).unlink(missing_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{text}\n")
    (folder / name).chmod(0o755)


# A python3 of an image with torch. Its venvs take the image's pip: to install another takes seconds.
WITH_TORCH = f"""[ "$1 $2" != "-m venv" ] || set -- "$@" --without-pip
exec {sys.executable} "$@\""""


@pytest.fixture(scope="module")
def venv(tmp_path_factory):
    """Make the .venv that a box has after its first run."""
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
    """A machine for rent: an sshd whose sessions see only `tools`, and a python3 that has torch.

    `venv` is what an earlier run has left.
    """

    def __init__(self, folder, venv=None, tools=("rsync", "tmux")):
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
        if os.getuid() == 0:  # as root, sshd doesn't start without it
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
        children = ["pgrep", "-P", str(self.sshd.pid)]
        for pid in subprocess.run(children, capture_output=True, text=True).stdout.split():
            os.kill(int(pid), signal.SIGKILL)

    def signal_training(self, number):
        for pid in self.processes("train.py\0--"):
            os.kill(pid, number)

    def processes(self, command=""):
        """Yield the pids of processes on the box whose command line has `command`."""
        for path in Path("/proc").glob("[0-9]*"):
            try:
                here = Path(os.readlink(path / "cwd")).is_relative_to(self.home)
                if here and command in (path / "cmdline").read_text():
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
        """List what was copied there, without what the run and the tools make of it."""
        made = re.compile(r"/(\.venv|\.run|__pycache__|ckpt|cache)/|^\.cache/")
        paths = [path for path in self.home.rglob("*") if path.is_file()]
        names = {str(path.relative_to(self.home)) for path in paths}
        return {name for name in names if not made.search(name)}


@pytest.fixture
def box(tmp_path):
    """box(name, venv=, tools=) → a Box"""
    boxes = []

    def make(name, **options):
        boxes.append(Box(tmp_path / name, **options))
        return boxes[-1]

    yield make
    for process in STARTED:
        if process.poll() is None:
            process.kill()
    for each in boxes:
        each.vanish()
        each.sshd.terminate()
        each.drop()
        each.sshd.wait(10)


@pytest.fixture
def home(tmp_path, chats):
    """Make the user's folder: names with spaces, and an export that must not be copied."""
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


def start(home, line, *flags, on_done=None):
    """Start remote.sh in the background; what it prints goes to output.txt."""
    command = ["nice", "-n", "5", "bash", ROOT / "remote.sh", line]
    command += ["--on-done", on_done] if on_done else []
    with open(home / "output.txt", "w") as out:
        process = subprocess.Popen(
            [*map(str, command), "--", *map(str, flags)],
            cwd=home,
            env={**os.environ, "HOME": str(home), "FETCH_SECONDS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
            # A suite in the background of a script ignores Ctrl-C, and bash can't trap it then
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    STARTED.append(process)
    return process


def run(home, *args, code=0, **options):
    """Run remote.sh as `start`, to the end. → what it prints"""
    process = start(home, *args, **options)
    assert process.wait(timeout=600) == code, output(home)
    return output(home)


def invoke(home, *args, **env):
    """Run remote.sh with these arguments. → its CompletedProcess"""
    return subprocess.run(
        [shutil.which("bash"), ROOT / "remote.sh", *map(str, args)],
        cwd=home,
        env={**os.environ, "HOME": str(home), **env},
        capture_output=True,
        text=True,
        timeout=240,
    )


def output(home):
    with open(home / "output.txt", newline="") as file:
        return file.read()


def flip(path):
    """Change a file's last byte, but not its time."""
    times, text = path.stat(), path.read_bytes()
    path.write_bytes(text[:-1] + bytes([text[-1] ^ 1]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def until(condition, process=None, seconds=300):
    for _ in range(seconds * 20):
        if condition():
            return
        assert process is None or process.poll() is None, "it ended too early"
        time.sleep(0.05)
    raise AssertionError("it never happened")


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
        *ROOT.glob("*.cpp"),
        *ROOT.glob("exports/*.py"),
        *ROOT.glob("exports/*.toml"),
        *ROOT.glob("weights/*.py"),
        *ROOT.glob("weights/*.toml"),
        *ROOT.glob("training/*.py"),
        *ROOT.glob("training/*.toml"),
        *ROOT.glob("inference/*.py"),
        *ROOT.glob("inference/*.cpp"),
    )
}
SENT |= {f"doppelganger/{name}" for name in ("remote.sh", "fsdp_launch.sh", "requirements.txt")}
SENT |= {f"doppelganger/data/{name}" for name in ("train.jsonl", "val.jsonl", "persona.json")}


@needs_box
def test_whole_run_brings_home_a_loadable_model(box, home, base):
    machine, out = box("box"), home / "my ckpt"
    flags = ("--lora", "--model", base, "--lr", 1e-2, "--max-steps", 6, *FLAGS)
    text = run(home, machine.line, *flags, on_done="echo 'well done' >> done.txt")
    assert "copying the code and my data/" in text and "torch works and is kept" in text
    assert text.splitlines()[-1] == "remote: The box is still billing: destroy it."
    assert machine.files() == SENT and machine.code.stat().st_mode & 0o777 == 0o700
    assert out.stat().st_mode & 0o777 == 0o700 and (home / "done.txt").read_text() == "well done\n"
    assert not (out / ".incoming").exists() and steps(out) == [1, 2, 3, 4, 5, 6]
    assert load_model(str(out), torch.float32).lora["rank"] == 32
    merge = re.search(r"(HF_HOME=\$PWD/\.hub \S+ lora\.py merge ckpt clone) ", RENT.read_text())
    done = subprocess.run(
        ["bash", "-c", f"{machine.line} 'cd doppelganger && {merge[1]}'"],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert (machine.code / "clone" / "model.safetensors").exists()
    # The connection was lost on the last way home; adapters of before lie in the right one's place.
    (out / "run.json").unlink()
    adapter = (out / "adapter_model.safetensors").read_bytes()
    flip(out / "adapter_model.safetensors")
    (out / ".incoming").mkdir()
    shutil.copy2(out / "adapter_model.safetensors", out / ".incoming")
    run(home, machine.line, *flags)
    assert (out / "adapter_model.safetensors").read_bytes() == adapter
    assert (out / "run.json").exists()
    again = invoke(home, machine.line, "--", *flags)
    assert again.returncode == 0 and "my ckpt is finished" in again.stdout


@needs_box
def test_killed_full_finetune_resumes_and_only_its_result_comes_home(box, home, base, venv):
    machine, out = box("box", venv=venv), home / "my ckpt"
    flags = ("--model", base, *"--max-steps 40 --batch 1 --lr 3e-3 --save-every 4".split(), *FLAGS)
    process = start(home, machine.line, *flags)
    until(lambda: saves(machine.code / "ckpt"), process)
    assert not [path for path in out.rglob("*") if path.name not in (".remote", ".incoming")]
    machine.signal_training(signal.SIGKILL)
    assert process.wait(timeout=240) == 137
    assert "Training is not finished (exit code 137)" in output(home)
    text = run(home, machine.line, *flags, on_done="exit 3", code=3)
    assert "after step" in text and "--on-done ended with exit code 3" in text
    assert machine.files() == SENT and saves(machine.code / "ckpt")
    assert not (out / "resume").exists() and steps(out) == [*range(1, 41)]
    load_model(str(out))


@needs_box
def test_max_minutes_ends_a_run_that_can_be_resumed(box, home, base, venv):
    machine = box("box", venv=venv)
    flags = (
        "--lora",
        "--model",
        base,
        *"--lr 1e-3 --max-steps 9999 --batch 1 --max-minutes 0.05".split(),
        *FLAGS,
    )
    text = run(home, machine.line, *flags)
    assert "Training is not finished (exit code 0): see above. The same command resumes" in text
    # A busy machine has no step done by then.
    assert bool(saves(home / "my ckpt")) != ("stopped before the first step" in text)


@needs_box
def test_lost_connection_and_lost_box_lose_only_what_no_checkpoint_holds(box, home, base, venv):
    machine, out = box("box", venv=venv), home / "my ckpt"
    flags = (
        "--lora",
        "--model",
        base,
        *"--lr 1e-3 --max-steps 60 --batch 1 --save-every 5".split(),
        *FLAGS,
    )
    on_done = "echo done >> done.txt"
    process = start(home, machine.line, *flags, on_done=on_done)
    until(lambda: saves(machine.code / "ckpt"), process)
    machine.signal_training(signal.SIGSTOP)  # or a fast machine would finish before we look
    until(lambda: saves(out), process)
    until(lambda: machine.drop() or "no connection" in output(home), process)
    machine.signal_training(signal.SIGCONT)
    size = len(machine.log())
    until(lambda: len(machine.log()) > size, process)
    machine.signal_training(signal.SIGSTOP)
    until(lambda: NOTICE.sub("", output(home)) == NOTICE.sub("", machine.log()), process)

    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=240) == 130
    assert "Training goes on there, and the box is still billing" in output(home)
    other = invoke(home, machine.line, "--", *flags, "--seed", 1, "--out", "other")
    refused(other, "busy with another run")
    process = start(home, machine.line, *flags, on_done=on_done)
    until(lambda: "back to the run that is there" in output(home), process)
    before = saves(machine.code / "ckpt")[-1]
    machine.signal_training(signal.SIGCONT)
    until(lambda: saves(machine.code / "ckpt")[-1] > before, process)
    machine.signal_training(signal.SIGSTOP)
    until(lambda: saves(out) and saves(out)[-1] > before, process)
    machine.vanish()
    assert process.wait(timeout=240) == 2
    assert "Nothing of this run is there any more" in output(home)
    (save,) = saves(out)
    names = {path.name for path in (out / "resume" / save).iterdir()}
    assert names == {"rank-00000.json", "rank-00000.safetensors"}
    assert not (home / "done.txt").exists()

    text = run(home, box("new", venv=venv).line, *flags, on_done=on_done)
    assert f"after step {int(save[5:])}" in text and steps(out) == [*range(1, 61)]
    assert (home / "done.txt").read_text() == "done\n" and load_model(str(out)).lora


@needs_box
def test_user_errors_are_two_lines_and_nothing_is_copied(box, home, tmp_path):
    machine = box("box", tools=())
    data = ("--", "--data", "my data")
    assert subprocess.run(["bash", "-n", ROOT / "remote.sh"]).returncode == 0
    refused(invoke(home, "--", "--lora"), "The line that the provider shows", "./remote.sh 'ssh -p")
    refused(invoke(home, machine.line, "--lora"), "The line that the provider shows")
    refused(invoke(home, machine.line, "--", "--lora"), "data/train.jsonl is missing", "data.py")
    refused(invoke(home, machine.line, "--", "--data=no data"), "no data/train.jsonl is missing")
    (home / "held").mkdir()
    (home / "held" / "run.json").write_text("{}")
    for flags in (("--out", "held"), ("--out=held/",)):
        refused(invoke(home, machine.line, *data, *flags), "held already holds something", "--out")
    provide(home / "bin")
    refused(
        invoke(home, machine.line, *data, PATH=str(home / "bin")), "rsync is not installed here"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = re.sub(r"-p \d+", f"-p {free.getsockname()[1]}", machine.line)
        refused(invoke(home, closed, *data), "Connection refused", "the whole line")
    tool(
        machine.bin,
        "nvidia-smi",
        "echo '| NVIDIA-SMI 470.82    Driver Version: 470.82    CUDA Version: 11.4     |'",
    )
    refused(invoke(home, machine.line, *data), "too old", "CUDA 12.6")
    (machine.bin / "nvidia-smi").unlink()
    refused(invoke(home, machine.line, *data), "no rsync or no tmux", "apt-get install rsync tmux")
    tool(machine.bin, "python3", "exit 1")
    refused(invoke(home, machine.line, *data), "no Python 3.11 or newer")
    other = (tmp_path / "box" / "mine.pub").read_text()
    (tmp_path / "box" / "known").write_text(f"[127.0.0.1]:{machine.port} {other}")
    refused(invoke(home, machine.line, *data), "Host key verification failed", "ssh-keygen -R")
    assert machine.files() == set()


PYTHON = """case "$*" in
*torch.ones*) [ -e wheel ] && [ "$BAD" != all ] && [ "$(cat wheel)" != "$BAD" ] ;;
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
def test_torch_wheel_is_the_one_for_the_driver(driver, wheel, tmp_path):
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
