"""Several hosts: fsdp_launch.sh twice on this machine.

With KILLS=… (`make soak`) also in two network namespaces whose link can be cut.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from test_resume import KINDS, QUICK, assert_same_run, has_checkpoint, run, wait_until

import cli
from training import checkpoint

SOAK = "KILLS" in os.environ
AREA = f"dg{os.getpid() % 10000}"


def launch(out, base, chats, *flags, within=(), **env):
    """Start fsdp_launch.sh on one "host", its output in OUT.NODE_RANK.txt."""
    command_line = (
        *within,
        "./fsdp_launch.sh",
        "--model",
        base,
        "--data",
        chats,
        "--out",
        out,
        *QUICK,
        *flags,
    )
    path = f"{Path(sys.executable).parent}:{env.pop('PATH', '')}:{os.environ['PATH']}"
    env = {
        **os.environ,
        "PATH": path,
        "OMP_NUM_THREADS": "1",
        "RESTARTS": "0",
        **{key: str(value) for key, value in env.items()},
    }
    with open(f"{out}.{env.get('NODE_RANK', env.get('SLURM_NODEID'))}.txt", "a") as log:
        return subprocess.Popen(
            [*map(str, command_line)],
            cwd=ROOT,
            env=env,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def log(out, node):
    return Path(f"{out}.{node}.txt").read_text()


def wait_for_exit(processes, *codes):
    """Wait until all processes end, with these exit codes if any are given."""
    try:
        ended = tuple(process.wait(timeout=600) for process in processes)
        assert not codes or ended == codes
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def test_two_hosts_of_two_ranks_equal_one_process(base, chats, tmp_path):
    """Started like Slurm does, saved by both hosts, resumed on one. Sharded inside a host,
    replicated over hosts."""
    flags, out = (*KINDS["lora"], "--lora-dropout", 0, "--micro-batch", 1), tmp_path / "ckpt"
    (tmp_path / "scontrol").write_text(
        '[ "$*" = "show hostnames box-[7,9]" ] && printf "127.0.0.1\\nbox-9\\n"'
    )
    (tmp_path / "scontrol").chmod(0o700)
    slurm = {
        "SLURM_NNODES": 2,
        "SLURM_JOB_NODELIST": "box-[7,9]",
        "SLURM_JOB_ID": os.getpid(),
        "MASTER_PORT": 20000 + os.getpid() % 9000,
    }
    kwargs = {"GPUS": 2, "PATH": tmp_path, **slurm}
    processes = [
        launch(out, base, chats, *flags, "--save-every", 1, SLURM_NODEID=node, **kwargs)
        for node in (1, 0)
    ]
    wait_until(has_checkpoint(out, 4), processes[0])
    processes[0].terminate()
    wait_for_exit(processes)
    assert "SIGTERM: stopped after step" in log(out, 0) and "stopped after" not in log(
        out, 1
    )  # the first host's first rank speaks
    notes = [
        cli.read_json(path)
        for path in sorted(checkpoint.list_checkpoints(out / "resume")[-1].glob("*.json"))
    ]
    places = [note["tensors"]["model.layers.0.mlp.up_proj.lora_A"] for note in notes]
    assert [place["first"] for place in places] == [0, 16, 0, 16] and all(
        place["rows"] == 16 for place in places
    )
    run(out, base, chats, *flags, "--resume")
    run(tmp_path / "alone", base, chats, *flags)
    assert_same_run(tmp_path / "alone", out, exactly=False)


def test_missing_master_addr_is_an_error(base, chats, tmp_path):
    wait_for_exit([launch(tmp_path / "ckpt", base, chats, NNODES=2, NODE_RANK=1, GPUS=1)], 2)
    assert log(tmp_path / "ckpt", 1).count("\n") == 2 and "MASTER_ADDR" in log(tmp_path / "ckpt", 1)


@pytest.fixture
def two_namespaces():
    """Two network namespaces with a link. Yield (the command prefix of each, set_link(state))."""
    if not SOAK:
        pytest.skip("two network namespaces are for `make soak`")
    one, other = f"{AREA}a", f"{AREA}b"
    address = {one: "10.99.0.1", other: "10.99.0.2"}
    ip = lambda *command_line: subprocess.run(
        ["ip", *command_line], check=True, capture_output=True
    )
    try:
        for name in address:
            ip("netns", "add", name)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no right to make network namespaces: {error}")
    try:
        ip("link", "add", one, "type", "veth", "peer", "name", other)
        for name, number in address.items():
            ip("link", "set", name, "netns", name)
            ip("-n", name, "addr", "add", f"{number}/24", "dev", name)
            for link in ("lo", name):
                ip("-n", name, "link", "set", link, "up")
        yield (
            {name: ("ip", "netns", "exec", name) for name in address},
            lambda state: ip("-n", other, "link", "set", other, state),
        )
    finally:
        for name in address:
            ip("netns", "del", name)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_cut_off_host_ends_the_job_and_resumes(kind, two_namespaces, base, chats, tmp_path):
    flags, out = (
        (*KINDS[kind], "--lora-dropout", 0, "--save-every", 1, "--timeout", 6),
        tmp_path / "ckpt",
    )
    within, set_link = two_namespaces

    def both(*extra, **kwargs):
        kwargs |= {"NNODES": 2, "MASTER_ADDR": "10.99.0.1", "GPUS": 2 if kind == "lora" else 1}
        nodes = list(enumerate(within))[::-1]
        return [
            launch(
                out,
                base,
                chats,
                *flags,
                *extra,
                within=within[name],
                NODE_RANK=node,
                GLOO_SOCKET_IFNAME=name,
                **kwargs,
            )
            for node, name in nodes
        ]

    run(tmp_path / "alone", base, chats, *flags)
    processes = both()
    wait_until(has_checkpoint(out, 3), processes[0])
    set_link("down")
    assert processes[1].wait(timeout=240) == 1
    assert "gave no sign for 6 s" in log(out, 0)
    wait_until(
        lambda: "the first rank, or its host, gave no answer for 6 s" in log(out, 1), seconds=240
    )
    set_link("up")
    wait_for_exit(processes, 1, 1)
    wait_for_exit(both("--resume"), 0, 0)
    assert "resuming after step" in log(out, 0)
    assert_same_run(tmp_path / "alone", out, exactly=False)

    out = tmp_path / "again"  # a line that comes back within torchrun's patience needs nobody
    processes = both(RESTARTS=2)
    wait_until(has_checkpoint(out, 3), processes[0])
    set_link("down")
    wait_until(lambda: "gave no sign for 6 s" in log(out, 0), processes[1], seconds=240)
    set_link("up")
    wait_for_exit(processes, 0, 0)
    assert_same_run(tmp_path / "alone", out, exactly=False)
