"""What the pages in docs/ show is what the code says today. `python tests/test_docs.py` writes the shown outputs anew."""

import ast
import contextlib
import dataclasses
import functools
import importlib
import io
import re
import sys

import pytest
import torch
from conftest import ROOT
from test_imports import MAY, ROOMS

DOCS = ROOT / "docs"
PAGES = ("HOW_IT_WORKS", "RENT", "TROUBLES", "CONTRIBUTING")
FILE = re.compile(r"^```\w+ (?P<name>[\w.]+)\n(?P<text>.*?)^```$", re.M | re.S)
SHOWN = re.compile(r"^```python\n(?P<code>.*?)^```\n```text\n(?P<output>.*?)^```$", re.M | re.S)
PLANNED = re.compile(r"^\$ python plan.py (?P<flags>.*)\n(?P<output>(?:(?!```|\$).*\n)+)", re.M)
NUMBER = re.compile(r"\d+\.\d+")


def read(name):
    return (DOCS / f"{name}.md").read_text(encoding="utf-8")


def outputs(page, folder, monkeypatch):
    """Run a page's Python in order, in one namespace, where the files that it names lie → what each block prints."""
    (folder / "examples").symlink_to(ROOT / "examples")
    for file in FILE.finditer(page):
        (folder / file["name"]).write_text(file["text"])
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr("training.cost.GPUS", dict(importlib.import_module("training.cost").GPUS))
    names, found = {"__name__": "page"}, []
    for block in SHOWN.finditer(page):
        with contextlib.redirect_stdout(io.StringIO()) as said:
            exec(compile(block["code"], "the page", "exec"), names)
        found.append(said.getvalue())
    return found


def alike(one, other):
    """The same text; numbers with a point within 2% or a hundredth, for CPUs add in their own order."""
    numbers = [[float(n) for n in NUMBER.findall(text)] for text in (one, other)]
    return NUMBER.sub("#", one) == NUMBER.sub("#", other) and all(
        abs(a - b) <= max(0.02 * abs(b), 0.011) for a, b in zip(*numbers)
    )


@pytest.mark.parametrize("name", PAGES)
def test_the_python_of_a_page_prints_what_the_page_shows(name, tmp_path, monkeypatch):
    page = read(name)
    shown = [block["output"] for block in SHOWN.finditer(page)]
    for old, new in zip(shown, outputs(page, tmp_path, monkeypatch), strict=True):
        assert alike(old, new), (
            f"docs/{name}.md shows\n{old}\nand the code prints\n{new}\nIf that is right: python tests/test_docs.py"
        )


# --- plan.py's answers


@functools.cache
def planned(flags):
    """What plan.py says to these flags, in this process."""
    plan, cli = importlib.import_module("plan"), importlib.import_module("cli")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        patch.setattr(sys, "argv", ["plan.py", *flags.split()])
        try:
            plan.main()
        except cli.UserError as error:
            print(error)
    return said.getvalue()


@pytest.mark.parametrize(
    "flags, output", [(found["flags"], found["output"]) for found in PLANNED.finditer(read("RENT"))]
)
def test_what_plan_says_in_a_page_it_says(flags, output):
    if f"torch=={torch.__version__.split('+')[0]}" not in (ROOT / "requirements.txt").read_text():
        pytest.skip("other versions of torch keep more or less in memory")
    assert alike(output, planned(flags)), planned(flags)


@pytest.mark.parametrize(
    "flags, time, money",
    re.findall(r"^\| `(--gpu \S+ --lora)` \| (.*?) \| (.*?) \|$", read("RENT"), re.M),
)
def test_the_table_of_cards_is_what_plan_says(flags, time, money):
    found = planned(flags)
    assert f" {time} of training;" in found and f"= {money}, at " in found, found


# --- every message has its way out


def pattern(node):
    """A regular expression of all that a message can be, from the expression that makes it; what differs may be anything."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.escape(plain(node.value))
    if isinstance(node, ast.JoinedStr):
        return "".join(map(pattern, node.values))
    if isinstance(node, ast.BinOp):
        return pattern(node.left) + pattern(node.right)
    return ".*?"


def plain(text):
    """Without what Markdown or a line's end changes."""
    return re.sub(r"[`*\\]", "", text).replace("\n", " ")


def letters(expression):
    return sum(map(str.isalpha, expression))


def messages():
    """(file and line, pattern) of each UserError in the code, and of each message of the shell scripts."""
    for path in sorted(
        [*ROOT.glob("*.py"), *(file for room in ROOMS for file in (ROOT / room).glob("*.py"))]
    ):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("UserError"):
                problem, way_out = map(pattern, node.args)
                yield (
                    f"{path.relative_to(ROOT)}:{node.lineno}",
                    problem if letters(problem) >= 7 else f"{problem}.*?{way_out}",
                )
    for number, line in enumerate((ROOT / "remote.sh").read_text(encoding="utf-8").splitlines(), 1):
        for said in re.findall(r'\bfail "((?:\$\([^)]*\)|[^"])*)"', line):
            problem = ".*?".join(
                re.escape(plain(part)) for part in re.split(r"\$\{[^}]*\}|\$\([^)]*\)|\$\w+", said)
            )
            if letters(problem):
                yield f"remote.sh:{number}", problem


def test_troubles_names_every_message():
    told = [
        plain(re.split(r"(?<!\\) \|", row)[0])
        for row in re.findall(r"^\| (`.*)$", read("TROUBLES"), re.M)
    ]
    lacking = [
        f"{where}: {re.sub(r'[.][*][?]', '…', message)}"
        for where, message in messages()
        if not any(re.search(message, row) for row in told)
    ]
    how = "docs/TROUBLES.md lacks a row for these. Add | `what it says, … where it differs` | why, and the way out |"
    assert not lacking, "\n".join([how, *lacking]).replace("\\", "")


# --- names, flags, links


@pytest.mark.parametrize("name", PAGES)
def test_functions_that_a_page_links_are_in_the_file_that_it_links(name):
    for said, target in re.findall(r"\[`([\w.]+)`\]\(\.\./([\w/]+\.py)\)", read(name)):
        tree, parts = ast.parse((ROOT / target).read_text(encoding="utf-8")), said.split(".")
        module = target.removesuffix("/__init__.py").removesuffix(".py").rpartition("/")[2]
        for part in parts[1:] if parts[0] == module else parts:
            found = [node for node in tree.body if part in defines(node)]
            assert found, f"{said} is not in {target}"
            tree = found[0]


def defines(node):
    targets = node.targets if isinstance(node, ast.Assign) else []
    return [
        getattr(node, "name", None),
        *(target.id for target in targets if isinstance(target, ast.Name)),
    ]


@pytest.mark.parametrize(
    "path", sorted([*DOCS.glob("*.md"), ROOT / "README.md"]), ids=lambda path: path.name
)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", path.read_text(encoding="utf-8")):
        file, _, heading = target.partition("#")
        file = (path.parent / file) if file else path
        assert file.exists(), target
        titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.M) if heading else []
        assert not heading or heading in {
            re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles
        }, target


@pytest.mark.parametrize("name", PAGES)
def test_flags_that_a_page_names_exist(name):
    modules = {
        program: importlib.import_module("exports.command" if program == "data" else program)
        for program in ("data", "train", "chat", "evaluate", "plan")
    }
    known = {
        program: {
            f"--{field.name.rstrip('_').replace('_', '-')}"
            for field in dataclasses.fields(m.Options)
        }
        for program, m in modules.items()
    }
    for program, given in re.findall(
        r"python (data|train|chat|evaluate|plan)\.py([^`\n#]*)", read(name)
    ):
        assert set(re.findall(r"(?<!\S)--[a-z][a-z0-9-]*", given)) <= known[program] | {"--help"}, (
            given
        )
    scripts = (ROOT / "remote.sh").read_text() + (ROOT / "weights" / "merge.py").read_text()
    others = {
        "--nproc_per_node",
        "--max-restarts",
        "--check",
        "--mb",
        "--help",
        "--weights",
        "--on-done",
    }
    for flag in re.findall(r"`(--[a-z][a-z0-9_-]*)", read(name)):
        assert flag in set.union(others, *known.values()) or flag in scripts, flag


def test_contributing_tells_the_table_of_imports():
    table = re.search(r"^```imports\n(.*?)^```", read("CONTRIBUTING"), re.M | re.S)[1]
    said = {
        line.split()[0]: set(re.findall(r"[\w/]+", line)[1:]) & set(MAY)
        for line in table.splitlines()
    }
    assert said == MAY


if __name__ == "__main__":
    import tempfile
    from pathlib import Path

    for name in PAGES:
        page = read(name)
        with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as monkeypatch:
            found = iter(outputs(page, Path(folder), monkeypatch))
        shown = lambda block, found=found: (
            f"```python\n{block['code']}```\n```text\n{next(found)}```"
        )
        page = SHOWN.sub(shown, page)
        (DOCS / f"{name}.md").write_text(page, encoding="utf-8")
