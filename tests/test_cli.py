import dataclasses
import importlib
import re
from pathlib import Path

import pytest
import torch
from conftest import command, refused

import cli
from cli import UserError, flag


@dataclasses.dataclass(frozen=True)
class Options:
    """What it does."""

    file: str = flag("", "the file", positional=True)
    fast: bool = flag(False, "be fast")
    rate: float | None = flag(None, "how much, in %")
    keep: tuple[str, ...] = flag((), "keep it")
    mode: str = flag("a", "which", choices=("a", "b"))
    prompt: str | None = flag(None, "text", short="-p")
    batch: int = flag(8, "rows", alias="--rows")


def test_dataclass_is_parsed_from_flags(capsys):
    assert cli.parse(Options, ["x"]) == Options("x")
    assert cli.parse(
        Options, ["x", "--fast", "--rate", "1e-3", "--keep", "a", "--keep", "b", "-p", "hi"]
    ) == Options("x", True, 1e-3, ("a", "b"), "a", "hi")
    assert cli.parse(Options, ["x", "--rows", "3"]).batch == 3  # the old name
    for wrong in (["x", "--mode", "c"], [], ["x", "--rate", "much"]):
        with pytest.raises(UserError, match="--help"):
            cli.parse(Options, wrong)
    with pytest.raises(SystemExit):
        cli.parse(Options, ["--help"])
    assert "how much, in %" in capsys.readouterr().out


def test_user_error_exits_with_code_2_and_two_lines(capsys):
    def main():
        raise UserError("--x is wrong", "Say --y.")

    with pytest.raises(SystemExit) as ended:
        cli.run(main)
    assert ended.value.code == 2 and capsys.readouterr().err == "--x is wrong\nSay --y.\n"


def test_gpu_without_memory_ends_with_code_2_and_two_lines(capsys):
    def main():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with pytest.raises(SystemExit) as ended:
        cli.run(main)
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and len(lines) == 2 and "out of memory" in lines[0]


def test_json_that_a_windows_editor_saved_is_read(tmp_path):
    path = tmp_path / "persona.json"
    path.write_text('{"me": "Zoë"}', encoding="utf-8-sig")
    assert cli.read_json(path) == {"me": "Zoë"}


def test_output_dir_that_is_not_empty_is_refused(tmp_path):
    assert cli.make_private_dir(tmp_path / "new" / "one").stat().st_mode & 0o777 == 0o700
    cli.check_output_dir(tmp_path / "new" / "one", False)
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(UserError):
            cli.check_output_dir(path, False)
    cli.check_output_dir(tmp_path, True)
    cli.check_output_dir(tmp_path, False, ["file", "new"])


def test_read_metrics_stops_at_a_broken_line(tmp_path):
    assert cli.read_metrics(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
    assert cli.read_metrics(tmp_path) == [{"step": 1}, {"step": 2}]


@dataclasses.dataclass(frozen=True)
class Grouped:
    """Has groups.

    python grouped.py
    """

    file: str = flag("", "the file", positional=True, group="what is read")
    rows: int = flag(0, "rows")
    minutes: float = flag(10.0, "minutes from save to save", group="the run")
    mode: str = flag("a", "which", choices=("a", "b"), shown="a, as ever")
    quiet: bool = flag(False, "say nothing")


def test_help_shows_groups_choices_and_defaults(capsys):
    with pytest.raises(SystemExit):
        cli.parse(Grouped, ["--help"], prog="grouped.py")
    assert (
        capsys.readouterr().out
        == """usage: grouped.py [flags] FILE

Has groups.

python grouped.py

what is read:
  FILE         the file
  --rows N     rows (default: 0)

the run:
  --minutes X  minutes from save to save (default: 10)
  --mode TEXT  which: a, b (default: a, as ever)
  --quiet      say nothing
"""
    )


@pytest.mark.parametrize("columns", ["50", "200"])
def test_help_width_is_the_terminals_up_to_100(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    long = dataclasses.make_dataclass("Long", [("rows", int, flag(1, "some words " * 20))])
    with pytest.raises(SystemExit):
        cli.parse(long, ["--help"])
    widest = max(map(len, capsys.readouterr().out.splitlines()))
    assert min(int(columns), 100) - len("words ") <= widest <= min(int(columns), 100)


PROGRAMS = {
    "data.py": "exports.command",
    "train.py": "train",
    "chat.py": "chat",
    "plan.py": "plan",
    "evaluate.py": "evaluate",
    "lora.py": "weights.merge",
}


@pytest.mark.parametrize(
    "arguments", [*([program] for program in PROGRAMS), ["lora.py", "merge"]], ids=" ".join
)
def test_help_of_each_program_is_grouped_and_short(arguments):
    done = command(*arguments, "--help", env={"COLUMNS": "100"})
    assert (done.returncode, done.stderr) == (0, "")
    assert re.match(r"usage: [a-z.]+( merge)? \[flags\][A-Z .[\]]*\n\n", done.stdout)
    assert not re.search("^(options|positional arguments):", done.stdout, re.M)
    assert max(map(len, done.stdout.splitlines())) <= 100
    entries = re.split(r"\n(?=  \S)", done.stdout)[1:]
    # One line each, but for the names of the GPUs and the longest flag.
    longer = ("  --gpu ", "  --activation-checkpointing ")
    assert [e for e in entries if "\n   " in e and not e.startswith(longer)] == []


@pytest.mark.parametrize("module", PROGRAMS.values())
def test_shown_default_can_be_passed(module, capsys):
    options = importlib.import_module(module).Options
    needed = [field.name for field in dataclasses.fields(options) if field.metadata["positional"]]
    with pytest.raises(SystemExit):
        cli.parse(options, ["--help"])
    shown = dict(
        re.findall(
            r"^  (?:-\w TEXT, )?(--[a-z-]+) (?:.|\n {9})*?\(default:\s+([^ ,)]+)",
            capsys.readouterr().out,
            re.M,
        )
    )
    for field in dataclasses.fields(options):
        spelling = "--" + field.name.rstrip("_").replace("_", "-")
        if (
            field.default not in (None, "", ())
            and not isinstance(field.default, bool)
            and spelling != "--lora-targets"
        ):
            assert cli.parse(options, [*needed, spelling, shown[spelling]]) == cli.parse(
                options, needed
            ), spelling


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    cli.write_json(tmp_path / "run.json", {"steps": 1})

    def half(path, text, **_):
        path.write_bytes(text.encode()[:5])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError):
        cli.write_json(tmp_path / "run.json", {"steps": 2})
    assert cli.read_json(tmp_path / "run.json") == {"steps": 1}


def test_enospc_names_file_and_leaves_no_partial_write(tmp_path, capsys):
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    cli.write_json(tmp_path / "run.json", {"steps": 1})
    (tmp_path / "run.json.new").symlink_to("/dev/full")
    with pytest.raises(SystemExit) as end:
        cli.run(lambda: cli.write_json(tmp_path / "run.json", {"steps": 2}))
    errors = capsys.readouterr().err.splitlines()
    assert (
        end.value.code == 2
        and errors[0] == f"{tmp_path / 'run.json'} can't be written: the disk is full"
        and "Make room" in errors[1]
    )
    assert cli.read_json(tmp_path / "run.json") == {"steps": 1} and [*tmp_path.iterdir()] == [
        tmp_path / "run.json"
    ]


def test_lora_command_is_merge():
    refused(command("lora.py"), "merge")
    refused(command("lora.py", "split", "--help"), "merge")


def test_counted_makes_a_singular_of_one():
    for noun, singular in {
        "rows": "row",
        "sessions in which I say nothing": "session in which I say nothing",
        "private channels (--include takes it)": "private channel (--include takes it)",
        "sign-in codes": "sign-in code",
        "Saved Messages": "Saved Messages",
        "of them mine": "of them mine",
        "written by or via a bot": "written by or via a bot",
        "<address>": "<address>",
    }.items():
        assert (
            cli.counted(1, noun) == f"1 {singular}"
            and cli.counted(1000, noun) == f"1,000 {noun}"
            and cli.counted(0, noun) == f"0 {noun}"
        )
