"""The table of imports in docs: one way only, and nothing heavy where it isn't needed."""

import ast
import os
import subprocess
import sys

import pytest
from conftest import ROOT

MAY = {
    "config": set(),
    "exports": {"config"},
    "tokenizer": {"config"},
    "doctor": {"config"},
    "data": {"config", "doctor", "exports", "tokenizer"},
    "model": set(),
    "quantize": {"model"},
    "lora": {"config", "model", "checkpoint", "tokenizer"},  # the last two inside main
    "checkpoint": {"config", "model", "lora", "quantize"},
    "gguf_convert": {"config", "checkpoint", "model", "tokenizer"},
    "generate": {"data", "model", "quantize"},
    "memory": {"config", "data"},
    "step": {"config", "checkpoint", "lora", "model", "data", "quantize"},
    "plan": {"config", "checkpoint", "data", "model", "quantize", "step", "tokenizer"},
    "resume": {"config", "checkpoint", "step"},
    "train": {"config", "data", "plan", "step", "resume", "generate", "checkpoint", "lora", "model", "quantize", "tokenizer"},
    "evaluate": {"config", "data", "exports", "plan", "step", "generate", "memory", "checkpoint", "model", "tokenizer"},
    "server": {"config", "data", "generate"},
    "chat": {"config", "data", "plan", "generate", "memory", "checkpoint", "tokenizer", "server"},
}


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


@pytest.mark.parametrize("name", MAY)
def test_imports_go_one_way(name):
    files = [ROOT / f"{name}.py"] if (ROOT / f"{name}.py").exists() else sorted((ROOT / name).glob("*.py"))
    ours = {path.stem for path in ROOT.glob("*.py")} | {"exports", "bench", "tests", "examples"}
    for path in files:
        assert set(imports(ast.parse(path.read_text()))) & ours - {name} <= MAY[name], path


def test_the_table_names_every_module():
    assert {path.stem for path in ROOT.glob("*.py")} | {"exports"} == set(MAY)


def test_lora_imports_what_is_above_it_only_inside_main():
    tree = ast.parse((ROOT / "lora.py").read_text())
    top = ast.Module([node for node in tree.body if not isinstance(node, ast.FunctionDef)], [])
    assert not set(imports(top)) & {"checkpoint", "tokenizer"}


def test_data_needs_no_torch_and_importing_has_no_side_effects():
    code = "import sys, data, exports, memory, tokenizer; assert 'torch' not in sys.modules; print('quiet')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("quiet\n", "")


def test_programs_start_in_what_torch_takes():
    code = (
        "import sys, train, chat, evaluate, plan; print(sorted({'torch.distributed.tensor', 'torch._dynamo', 'sklearn'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", ""), done.stderr


def test_data_starts_in_half_a_second():
    """Of the processor's time, the least of three starts: other work on this machine doesn't count."""

    def seconds():
        before = os.times()
        subprocess.run([sys.executable, "data.py", "--help"], cwd=ROOT, capture_output=True, check=True)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    assert min(seconds() for _ in range(3)) < 0.5
