"""Check what docs/ says against the code. `python tests/test_docs.py` rewrites the shown outputs."""

import ast
import contextlib
import dataclasses
import functools
import importlib
import io
import re
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_imports import MAY, ROOMS

import exports

DOCS = ROOT / "docs"
PAGES = ("HOW_IT_WORKS", "RENT", "TROUBLES", "CONTRIBUTING")
FILE = re.compile(r"^```\w+ (?P<name>[\w.]+)\n(?P<text>.*?)^```$", re.M | re.S)
SNIPPET = re.compile(r"^```python\n(?P<code>.*?)^```\n```text\n(?P<output>.*?)^```$", re.M | re.S)
PLAN = re.compile(r"^\$ python plan.py (?P<flags>.*)\n(?P<output>(?:(?!```|\$).*\n)+)", re.M)
PLAN_ROW = re.compile(
    r"^\| `(?P<flags>--gpu \S+ --lora)` \| (?P<time>.*?) \| (?P<money>.*?) \|$", re.M
)
DECIMAL = re.compile(r"\d+\.\d+")


def read_page(name: str) -> str:
    return (DOCS / f"{name}.md").read_text(encoding="utf-8")


def relative_path(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# --- Python snippets


def run_snippets(page: str, folder: Path, monkeypatch) -> list[str]:
    """Run a page's snippets in order, in one namespace and in `folder`; return what each prints."""
    (folder / "examples").symlink_to(ROOT / "examples")
    for file in FILE.finditer(page):
        (folder / file["name"]).write_text(file["text"])
    monkeypatch.chdir(folder)
    namespace: dict = {"__name__": "page"}
    outputs = []
    for snippet in SNIPPET.finditer(page):
        with contextlib.redirect_stdout(io.StringIO()) as stdout:
            exec(compile(snippet["code"], "the page", "exec"), namespace)
        outputs.append(stdout.getvalue())
    return outputs


def same_output(first: str, second: str) -> bool:
    """Compare texts; decimals may differ by 2% or 0.011, because CPUs add in different orders."""
    if DECIMAL.sub("#", first) != DECIMAL.sub("#", second):
        return False
    pairs = zip(DECIMAL.findall(first), DECIMAL.findall(second))
    return all(abs(float(a) - float(b)) <= max(0.02 * abs(float(b)), 0.011) for a, b in pairs)


@pytest.mark.parametrize(
    "first, second, same",
    [
        ("loss 7.34", "loss 7.40", True),
        ("loss 7.34", "loss 7.60", False),
        ("8 targets", "9 targets", False),
        ("0.01", "0.02", True),
    ],
)
def test_same_output_allows_two_percent(first, second, same):
    assert same_output(first, second) == same


@pytest.mark.parametrize("name", [name for name in PAGES if SNIPPET.search(read_page(name))])
def test_snippets_print_what_the_page_shows(name, tmp_path, monkeypatch):
    page = read_page(name)
    shown = [snippet["output"] for snippet in SNIPPET.finditer(page)]
    for old, new in zip(shown, run_snippets(page, tmp_path, monkeypatch), strict=True):
        assert same_output(old, new), (
            f"docs/{name}.md shows\n{old}\nThe code prints\n{new}\n"
            "If the code is right: python tests/test_docs.py"
        )


# --- plan.py's outputs


@functools.cache
def plan_output(flags: str) -> str:
    """Run plan.py with these flags, in this process."""
    plan, cli = importlib.import_module("plan"), importlib.import_module("cli")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as stdout:
        patch.setattr(sys, "argv", ["plan.py", *flags.split()])
        try:
            plan.main()
        except cli.UserError as error:
            print(error)
    return stdout.getvalue()


@pytest.mark.parametrize("flags, output", PLAN.findall(read_page("RENT")))
def test_plan_prints_what_the_page_shows(flags, output):
    pinned = (ROOT / "requirements.txt").read_text()
    if f"torch=={torch.__version__.split('+')[0]}" not in pinned:
        pytest.skip("other versions of torch need more or less memory")
    assert same_output(output, plan_output(flags)), plan_output(flags)


@pytest.mark.parametrize("flags, time, money", PLAN_ROW.findall(read_page("RENT")))
def test_plan_table_is_what_plan_prints(flags, time, money):
    output = plan_output(flags)
    assert f" {time} of training;" in output and f"= {money}, at " in output, output


# --- every row in TROUBLES.md quotes a message of ours


OTHERS_MESSAGES = ("… failed (exitcode: 2)", "ChildFailedError")  # torchrun's


def constant_parts(node: ast.AST) -> str:
    """Return a text of the code, `…` where it varies."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(map(constant_parts, node.values))
    return "…"


def plain_text(text: str) -> str:
    """Remove what Markdown or the end of a line changes."""
    return re.sub(r"[`*\\]", "", text).replace("\n", " ")


@functools.cache
def messages() -> str:
    """Return all texts that our programs may print, one a line, `…` where they vary."""
    texts = re.findall(
        r'"((?:\$\([^)]*\)|[^"])*)"', (ROOT / "remote.sh").read_text(encoding="utf-8")
    )
    texts = [re.sub(r"\$\{[^}]*\}|\$\([^)]*\)|\$\w+", "…", text) for text in texts]
    texts.append((ROOT / "inference" / "page.html").read_text(encoding="utf-8"))
    paths = [*ROOT.glob("*.py"), *ROOT.glob("examples/*.py")]
    for room in ROOMS:
        paths += (ROOT / room).glob("*.py")
    for path in paths:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        texts += [constant_parts(node) for node in ast.walk(tree)]
    return "\n".join(sorted({plain_text(text) for text in texts}))


def is_said(quote: str) -> bool:
    """Return whether a text of ours can read like `quote`; `…` may be anything, in both."""
    parts = [part for part in re.split("…|[0-9]+", quote) if part]
    if re.search(".*?".join(map(re.escape, parts)), messages()):
        return True
    # or as one whose own constant parts stand in the quote, in their order
    for text in messages().splitlines():
        parts = [part for part in re.split("…|[0-9]+", text) if part]
        if "…" not in text or sum(map(str.isalpha, text)) < 7 or parts[0] not in quote:
            continue
        if re.search(".*?".join(map(re.escape, parts)), quote):
            return True
    return False


def troubles_quotes() -> list[str]:
    rows = re.findall(r"^\| (`.*)$", read_page("TROUBLES"), re.M)
    cells = [re.split(r"(?<!\\) \|", row)[0] for row in rows]
    return [quote for cell in cells for quote in re.findall(r"`([^`]+)`", cell)]


@pytest.mark.parametrize("quote", troubles_quotes())
def test_troubles_quotes_what_a_program_says(quote):
    if not any(text in quote for text in OTHERS_MESSAGES):
        assert is_said(plain_text(quote)), f"no program says {quote}"


def test_a_message_that_was_reworded_is_found_out():
    assert is_said("… is encrypted") and not is_said("… is locked with a password")


# --- names, links, flags


@pytest.mark.parametrize("name", PAGES)
def test_linked_functions_exist(name):
    links = re.findall(r"\[`([\w.]+)`\]\(\.\./([\w/]+\.py)\)", read_page(name))
    for function, target in links:
        module = target.removesuffix("/__init__.py").removesuffix(".py").rpartition("/")[2]
        parts = function.split(".")
        if parts[0] == module:
            parts = parts[1:]
        scope = ast.parse((ROOT / target).read_text(encoding="utf-8"))
        for part in parts:
            definitions = [node for node in scope.body if part in defined_names(node)]
            assert definitions, f"{function} is not in {target}"
            scope = definitions[0]


def defined_names(node: ast.stmt) -> list[str]:
    """Return the names that a statement defines: a function, a class, or assigned variables."""
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return [node.target.id]
    return [node.name] if hasattr(node, "name") else []


def heading_anchors(page: str) -> set[str]:
    """Return GitHub's anchors of a page's headings."""
    titles = re.findall(r"^#+ (.*)$", page, re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


LINKING_PAGES = sorted([*DOCS.glob("*.md"), *ROOT.glob("*/README.md"), ROOT / "README.md"])


@pytest.mark.parametrize("path", LINKING_PAGES, ids=relative_path)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", path.read_text(encoding="utf-8")):
        file, _, heading = target.partition("#")
        linked = path.parent / file if file else path
        assert linked.exists(), target
        if heading:
            assert heading in heading_anchors(linked.read_text(encoding="utf-8")), target


@functools.cache
def known_flags(program: str) -> set[str]:
    """Return the flags of one of our programs."""
    module = importlib.import_module("exports.command" if program == "data" else program)
    names = [field.name.rstrip("_") for field in dataclasses.fields(module.Options)]
    return {f"--{name.replace('_', '-')}" for name in names}


PROGRAMS = ("data", "train", "chat", "evaluate", "plan")
OTHER_FLAGS = {  # of torchrun, the benchmarks and scripts
    "--nproc_per_node",
    "--max-restarts",
    "--check",
    "--mb",
    "--help",
    "--weights",
    "--on-done",
}


@pytest.mark.parametrize(
    "path", sorted({*DOCS.glob("*.md")} - {DOCS / "LOG.md"}), ids=relative_path
)
def test_flags_in_commands_exist(path):
    text = path.read_text(encoding="utf-8")
    for program, arguments in re.findall(rf"python ({'|'.join(PROGRAMS)})\.py([^`\n#]*)", text):
        flags = set(re.findall(r"(?<!\S)--[a-z][a-z0-9-]*", arguments))
        assert flags <= known_flags(program) | {"--help"}, arguments


@pytest.mark.parametrize("name", PAGES)
def test_flags_in_prose_exist(name):
    scripts = (ROOT / "remote.sh").read_text() + (ROOT / "weights" / "merge.py").read_text()
    known = set.union(OTHER_FLAGS, *map(known_flags, PROGRAMS))
    for flag in re.findall(r"`(--[a-z][a-z0-9_-]*)", read_page(name)):
        assert flag in known or flag in scripts, flag


def test_contributing_shows_the_table_of_imports():
    table = re.search(r"^```imports\n(.*?)^```", read_page("CONTRIBUTING"), re.M | re.S)[1]
    shown = {}
    for line in table.splitlines():
        name, *imports = re.findall(r"[\w/]+", line)
        shown[name] = set(imports) & set(MAY)
    assert shown == MAY


# --- rewriting


def rewrite_outputs(name: str) -> None:
    """Run what a page shows and write the new outputs into it."""
    page = read_page(name)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as monkeypatch:
        outputs = iter(run_snippets(page, Path(folder), monkeypatch))
    page = SNIPPET.sub(
        lambda old: f"```python\n{old['code']}```\n```text\n{next(outputs)}```", page
    )
    page = PLAN.sub(
        lambda old: f"$ python plan.py {old['flags']}\n{plan_output(old['flags'])}", page
    )
    (DOCS / f"{name}.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    for page_name in PAGES:
        rewrite_outputs(page_name)


# --- a reader of one's own


def test_a_complete_reader_has_at_most_60_lines():
    section = read_page("CONTRIBUTING").split("## A complete reader")[1]
    code = SNIPPET.search(section)["code"]
    assert "def can_read" in code and "def read" in code and len(code.splitlines()) <= 60


def test_the_conversion_script_has_ten_lines_and_makes_a_table(tmp_path, monkeypatch):
    page = read_page("EXPORTS")
    code = re.search(r"^```python\n(.*?)^```$", page, re.M | re.S)[1]
    assert len(code.splitlines()) <= 10
    monkeypatch.setattr(
        sys, "stdin", io.StringIO("[2024-01-31 18:05] <Ann> on, my way\n--- join\n")
    )
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(code, "the page", "exec"), {})
    (tmp_path / "tea.csv").write_text(out.getvalue())
    ((chat, messages),) = [(c, list(m)) for c, m in exports.read(tmp_path / "tea.csv")]
    assert chat.name == "#tea" and [(m.name, m.text) for m in messages] == [("Ann", "on, my way")]
