"""Check what README.md says."""

import re
import shlex

import pytest
from conftest import ROOT, command

README = (ROOT / "README.md").read_text(encoding="utf-8")
CODE_BLOCKS = re.findall(r"^```\n(.*?)^```", README, re.M | re.S)
TOP_LEVEL_FILES = sorted(path.name for path in ROOT.glob("*.py"))
ROOMS = ["exports/", "weights/", "training/", "inference/"]
SCRIPTS = ["fsdp_launch.sh", "remote.sh"]


def python_commands() -> list[list[str]]:
    """Return the arguments of each `python …` line in a code block, but for making the venv."""
    commands = []
    for block in CODE_BLOCKS:
        for line in block.splitlines():
            if line.startswith("python ") and " -m venv" not in line:
                commands.append(shlex.split(line.partition("#")[0])[1:])
    return commands


def test_commands_make_a_clone_of_the_example(tmp_path):
    """Run the commands in order, on the example export and the tiny base, in an empty folder."""
    data, ckpt, clone = (str(tmp_path / name) for name in ("data", "ckpt", "clone"))
    export = str(ROOT / "examples" / "telegram" / "result.json")
    replacements = {"path/to/result.json": export, "ckpt/": ckpt, "clone/": clone}
    train = ["--data", data, "--out", ckpt, "--model", "examples/base"]
    extra_arguments = {
        "data.py": ["--out", data],
        "train.py": [*train, "--max-steps", "3", "--device", "cpu"],
        "chat.py": ["-p", "Where are you?", "--seed", "1"],
        "lora.py": [],
    }
    commands = python_commands()
    assert [program for program, *_ in commands] == list(extra_arguments)
    for program, *arguments in commands:
        arguments = [replacements.get(argument, argument) for argument in arguments]
        done = command(program, *arguments, *extra_arguments[program])
        assert done.returncode == 0, (program, arguments, done.stderr)
    assert command("chat.py", clone, "-p", "hi", "--seed", 1).stdout.strip()


@pytest.mark.parametrize("program", ["data.py", "train.py", "chat.py", "plan.py", "evaluate.py"])
def test_flags_exist(program):
    known = set(re.findall(r"--[a-z-]+", command(program, "--help").stdout))
    lines = re.findall(rf"(?:python|8) {program}([^`\n#]*)", README)
    assert lines
    for line in lines:
        assert set(re.findall(r"--[a-z-]+", line)) <= known, line


@pytest.mark.parametrize("path", [*TOP_LEVEL_FILES, *ROOMS, *SCRIPTS])
def test_table_of_files_names_each_once(path):
    assert len(re.findall(rf"^\| `{re.escape(path)}` \|", README, re.M)) == 1


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^make (\w+)", README, re.M)
    assert targets
    for target in targets:
        assert f"\n{target}:" in makefile


def test_readme_is_at_most_1000_words():
    assert len(README.split()) <= 1000
