"""Check who imports whom: one way only, and nothing heavy where it isn't needed."""

import ast
import graphlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

ROOMS = ("exports", "weights", "training", "inference")
# A file or a room: what it may import of ours. docs/CONTRIBUTING.md shows this table.
MAY = {
    "cli": set(),
    "fused": set(),
    "model": {"fused"},
    "exports": {"cli"},
    "exports/command": {"cli", "data", "exports", "weights"},
    "lora": {"cli", "model", "weights"},  # weights only when run as a program
    "weights": {"cli", "model", "lora"},
    "data": {"cli", "exports", "weights"},  # exports.command only when run as a program
    "training": {"cli", "data", "model", "lora", "weights"},
    "inference": {"cli", "data", "fused", "model", "weights"},
    "plan": {"cli", "data", "model", "weights", "training"},
    "train": {"cli", "data", "fused", "model", "lora", "weights", "training", "inference"},
    "evaluate": {"cli", "data", "weights", "training", "inference"},
    "chat": {"cli", "data", "weights", "inference"},
}
TOP_LEVEL = {path.stem for path in ROOT.glob("*.py")}
OURS = {*TOP_LEVEL, *ROOMS, "bench", "tests", "examples"}


def imported_packages(path: Path) -> Iterator[str]:
    """Yield the first part of everything that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def files_of(name: str) -> list[Path]:
    """Return the files of a table entry; a file with an entry of its own is not its room's."""
    if name in TOP_LEVEL or "/" in name:
        return [ROOT / f"{name}.py"]
    separate = {ROOT / f"{entry}.py" for entry in MAY if entry.startswith(f"{name}/")}
    return sorted({*(ROOT / name).glob("*.py")} - separate)


def run_python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


SLOW = {"torch.distributed.tensor", "torch._dynamo", "sympy", "sklearn"}


def loaded_modules(imports: str, candidates: set[str]) -> set[str]:
    """Import modules in a new process; return which candidates are loaded. Nothing else prints."""
    done = run_python(f"import sys, {imports}; print(*{candidates!r} & {{*sys.modules}})")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize("name", MAY)
def test_imports_go_one_way(name):
    for path in files_of(name):
        imports = set(imported_packages(path)) & OURS - {name}
        assert imports <= MAY[name], path


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_at_start(path: Path, modules: set[str]) -> set[str]:
    """Return which of our modules a file imports before anything is called."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found & modules - {module_name(path)}


def test_no_modules_import_one_another_in_a_circle():
    """Also inside a room, where the table allows everything."""
    paths = [*ROOT.glob("*.py")]
    for room in ROOMS:
        paths += (ROOT / room).glob("*.py")
    modules = {module_name(path) for path in paths}
    graph = {module_name(path): imports_at_start(path, modules) for path in paths}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_table_names_every_module():
    assert {*TOP_LEVEL, *ROOMS, "exports/command"} == set(MAY)


@pytest.mark.parametrize("module, command", [("lora", "weights"), ("data", "exports")])
def test_command_is_imported_only_by_the_program(module, command):
    assert not loaded_modules(module, {command})


@pytest.mark.parametrize("module", ["chat", "evaluate"])
def test_chat_and_evaluate_need_no_plan_and_no_export_reader(module):
    assert not loaded_modules(module, {"plan", "exports.telegram", "exports.whatsapp"})


def test_data_needs_no_torch_and_importing_prints_nothing():
    modules = "data, exports.command, inference.context, weights.tokenizer"
    assert not loaded_modules(modules, {"torch"})


def test_programs_import_nothing_slow():
    assert not loaded_modules("train, chat, evaluate, plan", SLOW)


def test_loading_a_model_imports_nothing_slow():
    load = f"weights.load; weights.load.load_model({str(ROOT / 'examples' / 'base')!r})"
    assert not loaded_modules(load, SLOW)


def test_loaded_modules_sees_what_is_loaded():
    assert loaded_modules("json", {"json", "torch"}) == {"json"}


def cpu_seconds_of_data_help() -> float:
    before = os.times()
    subprocess.run([sys.executable, "data.py", "--help"], cwd=ROOT, capture_output=True, check=True)
    after = os.times()
    user = after.children_user - before.children_user
    return user + after.children_system - before.children_system


def test_data_starts_in_half_a_second():
    """CPU time, and the best of three starts, so that other work on this machine doesn't count."""
    assert min(cpu_seconds_of_data_help() for _ in range(3)) < 0.5
