"""What the README says is so."""

import re
import shlex

import pytest
from conftest import ROOT, command

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```\n(.*?)^```", README, re.M | re.S)
COMMANDS = [
    line.split("#")[0].strip()
    for block in BLOCKS
    for line in block.splitlines()
    if line.startswith("python ")
]


def test_its_commands_make_a_clone_of_the_example(tmp_path):
    """Every `python …` line of the README, in order, on the example export and the tiny base, in an empty folder."""
    small = {
        "data.py": [],
        "train.py": ["--model", "examples/base", "--max-steps", "3", "--device", "cpu"],
        "chat.py": ["-p", "Where are you?", "--seed", "1"],
        "lora.py": [],
    }
    ours = [c for c in COMMANDS if " -m venv" not in c]
    assert [c.split()[1] for c in ours] == ["data.py", "train.py", "chat.py", "lora.py"]
    for line in ours:
        words = [
            str(tmp_path / w) if w in ("ckpt/", "clone/") else w for w in shlex.split(line)[1:]
        ]
        words = [
            str(ROOT / "examples/telegram/result.json") if w == "path/to/result.json" else w
            for w in words
        ]
        extra = {
            "data.py": ["--out", tmp_path / "data"],
            "train.py": ["--data", tmp_path / "data", "--out", tmp_path / "ckpt"],
        }.get(words[0], [])
        done = command(*words, *extra, *small[words[0]])
        assert done.returncode == 0, (line, done.stderr)
    assert command("chat.py", tmp_path / "clone", "-p", "hi", "--seed", 1).stdout.strip()


def test_every_flag_it_names_exists():
    for program in ("data.py", "train.py", "chat.py", "plan.py", "evaluate.py"):
        offered = set(re.findall(r"--[a-z-]+", command(program, "--help").stdout))
        for line in re.findall(rf"(?:python|8) {program}([^`\n#]*)", README):
            assert set(re.findall(r"--[a-z-]+", line)) <= offered | {"--lora"}, line


@pytest.mark.parametrize(
    "path",
    sorted(p.name for p in ROOT.glob("*.py"))
    + ["exports/", "weights/", "training/", "inference/", "fsdp_launch.sh", "remote.sh"],
)
def test_the_table_of_files_names_each_once(path):
    assert len(re.findall(rf"^\| `{re.escape(path)}` \|", README, re.M)) == 1


def test_make_targets_are_those_it_names():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.M):
        assert f"\n{target}:" in makefile
