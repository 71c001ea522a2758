"""Several hosts: fsdp_launch.sh twice on this machine, and (KILLS=…, as `make soak` sets it) in two network namespaces that can be cut apart."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from test_resume import KINDS, QUICK, alike, run, saved, until

import cli
from training import checkpoint

SOAK = "KILLS" in os.environ
AREA = f"dg{os.getpid() % 10000}"


def launch(out, base, chats, *flags, within=(), **env):
    """fsdp_launch.sh on one "host", what it says in OUT.NODE_RANK.txt."""
    words = (
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
    with open(f"{out}.{env.get('NODE_RANK', env.get('SLURM_NODEID'))}.txt", "a") as heard:
        return subprocess.Popen(
            [*map(str, words)],
            cwd=ROOT,
            env=env,
            stdout=heard,
            stderr=heard,
            start_new_session=True,
        )


def heard(out, node):
    return Path(f"{out}.{node}.txt").read_text()


def over(processes, *codes):
    """They end, with these codes if any are given."""
    try:
        ended = tuple(process.wait(timeout=600) for process in processes)
        assert not codes or ended == codes
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def test_two_hosts_of_two_ranks_compute_what_one_process_does(base, chats, tmp_path):
    """Started as Slurm starts them, saved by both, gone on with on one host: sharded in a host, replicated over hosts."""
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
    ways = {"GPUS": 2, "PATH": tmp_path, **slurm}
    processes = [
        launch(out, base, chats, *flags, "--save-every", 1, SLURM_NODEID=node, **ways)
        for node in (1, 0)
    ]
    until(saved(out, 4), processes[0])
    processes[0].terminate()
    over(processes)
    assert "SIGTERM: stopped after step" in heard(out, 0) and "stopped after" not in heard(
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
    alike(tmp_path / "alone", out, exactly=False)


def test_without_an_address_of_the_first_host_nothing_starts(base, chats, tmp_path):
    over([launch(tmp_path / "ckpt", base, chats, NNODES=2, NODE_RANK=1, GPUS=1)], 2)
    assert heard(tmp_path / "ckpt", 1).count("\n") == 2 and "MASTER_ADDR" in heard(
        tmp_path / "ckpt", 1
    )


@pytest.fixture
def apart():
    """Two network namespaces with a line between them. → (what to start a program with in each, what turns the line "up" and "down")"""
    if not SOAK:
        pytest.skip("two network namespaces are for `make soak`")
    one, other = f"{AREA}a", f"{AREA}b"
    address = {one: "10.99.0.1", other: "10.99.0.2"}
    ip = lambda *words: subprocess.run(["ip", *words], check=True, capture_output=True)
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
def test_a_host_that_is_cut_off_ends_the_job_which_goes_on_from_the_last_save(
    kind, apart, base, chats, tmp_path
):
    flags, out = (
        (*KINDS[kind], "--lora-dropout", 0, "--save-every", 1, "--timeout", 6),
        tmp_path / "ckpt",
    )
    within, line = apart

    def both(*more, **ways):
        ways |= {"NNODES": 2, "MASTER_ADDR": "10.99.0.1", "GPUS": 2 if kind == "lora" else 1}
        nodes = list(enumerate(within))[::-1]
        return [
            launch(
                out,
                base,
                chats,
                *flags,
                *more,
                within=within[name],
                NODE_RANK=node,
                GLOO_SOCKET_IFNAME=name,
                **ways,
            )
            for node, name in nodes
        ]

    run(tmp_path / "alone", base, chats, *flags)
    processes = both()
    until(saved(out, 3), processes[0])
    line("down")
    assert processes[1].wait(timeout=240) == 1
    assert "gave no sign for 6 s" in heard(out, 0)
    until(
        lambda: "the first rank, or its host, gave no answer for 6 s" in heard(out, 1), seconds=240
    )
    line("up")
    over(processes, 1, 1)
    over(both("--resume"), 0, 0)
    assert "going on after step" in heard(out, 0)
    alike(tmp_path / "alone", out, exactly=False)

    out = tmp_path / "again"  # a line that comes back within torchrun's patience needs nobody
    processes = both(RESTARTS=2)
    until(saved(out, 3), processes[0])
    line("down")
    until(lambda: "gave no sign for 6 s" in heard(out, 0), processes[1], seconds=240)
    line("up")
    over(processes, 0, 0)
    alike(tmp_path / "alone", out, exactly=False)
