"""The table of imports in docs: one way only, and nothing heavy where it isn't needed."""

import ast
import os
import subprocess
import sys

import pytest
from conftest import ROOT

ROOMS = ("exports", "weights", "training", "inference")
MAY = {  # a file or a room: what it may import of ours
    "cli": set(),
    "model": set(),
    "exports": {"cli"},
    "exports/command": {"cli", "data", "exports", "weights"},
    "lora": {"cli", "model", "weights"},  # weights as a program only
    "weights": {"cli", "model", "lora"},
    "data": {"cli", "exports", "weights"},  # exports/command as a program only
    "training": {"cli", "data", "model", "lora", "weights"},
    "inference": {"cli", "data", "model", "weights"},
    "plan": {"cli", "data", "model", "weights", "training"},
    "train": {"cli", "data", "model", "lora", "weights", "training", "inference"},
    "evaluate": {"cli", "data", "exports", "weights", "training", "inference"},
    "chat": {"cli", "data", "weights", "inference"},
}
OURS = {path.stem for path in ROOT.glob("*.py")} | {*ROOMS, "bench", "tests", "examples"}


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def files(name):
    """The files of an entry of the table; a file with an entry of its own isn't its room's."""
    if (ROOT / f"{name}.py").exists():
        return [ROOT / f"{name}.py"]
    own = {ROOT / f"{other}.py" for other in MAY if other.startswith(f"{name}/")}
    return sorted({*(ROOT / name).glob("*.py")} - own)


@pytest.mark.parametrize("name", MAY)
def test_imports_go_one_way(name):
    for path in files(name):
        assert set(imports(ast.parse(path.read_text()))) & OURS - {name} <= MAY[name], path


def test_the_table_names_every_module():
    assert {path.stem for path in ROOT.glob("*.py")} | {*ROOMS, "exports/command"} == set(MAY)


@pytest.mark.parametrize(
    "name, only_as_a_program", [("lora", "weights"), ("data", "exports.command")]
)
def test_a_program_imports_its_command_only_when_it_is_run(name, only_as_a_program):
    code = f"import sys, {name}; assert {only_as_a_program!r} not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("name", ["chat", "evaluate"])
def test_to_talk_needs_no_plan_and_no_reader_of_exports(name):
    code = f"import sys, {name}; print(sorted({{'plan', 'exports.telegram', 'exports.whatsapp'}} & {{*sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_data_needs_no_torch_and_importing_has_no_side_effects():
    code = "import sys, data, exports.command, inference.context, weights.tokenizer; assert 'torch' not in sys.modules; print('quiet')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("quiet\n", "")


def test_programs_start_in_what_torch_takes():
    code = "import sys, train, chat, evaluate, plan; print(sorted({'torch.distributed.tensor', 'torch._dynamo', 'sklearn'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", ""), done.stderr


def test_data_starts_in_half_a_second():
    """Of the processor's time, the least of three starts: other work on this machine doesn't count."""

    def seconds():
        before = os.times()
        subprocess.run(
            [sys.executable, "data.py", "--help"], cwd=ROOT, capture_output=True, check=True
        )
        after = os.times()
        return (
            after.children_user
            + after.children_system
            - before.children_user
            - before.children_system
        )

    assert min(seconds() for _ in range(3)) < 0.5
