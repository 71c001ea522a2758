import dataclasses

import pytest
from conftest import command, refused

import config
from config import UserError, flag


@dataclasses.dataclass(frozen=True)
class Options:
    """What it does."""

    file: str = flag("", "the file", positional=True)
    fast: bool = flag(False, "be fast")
    rate: float | None = flag(None, "how much, in %")
    keep: tuple[str, ...] = flag((), "keep it")
    mode: str = flag("a", "which", choices=("a", "b"))
    prompt: str | None = flag(None, "text", short="-p")


def test_a_dataclass_is_the_command_line(capsys):
    assert config.parse(Options, ["x"]) == Options("x")
    assert config.parse(Options, ["x", "--fast", "--rate", "1e-3", "--keep", "a", "--keep", "b", "-p", "hi"]) == Options(
        "x", True, 1e-3, ("a", "b"), "a", "hi"
    )
    for wrong in (["x", "--mode", "c"], [], ["x", "--rate", "much"]):
        with pytest.raises(UserError, match="--help"):
            config.parse(Options, wrong)
    with pytest.raises(SystemExit):
        config.parse(Options, ["--help"])
    assert "how much, in %" in capsys.readouterr().out


def test_what_a_person_can_mend_ends_with_code_2_and_two_lines(capsys):
    def main():
        raise UserError("--x is wrong", "Say --y.")

    with pytest.raises(SystemExit) as ended:
        config.run(main)
    assert ended.value.code == 2 and capsys.readouterr().err == "--x is wrong\nSay --y.\n"


def test_a_folder_with_something_in_it_is_kept(tmp_path):
    assert config.private_folder(tmp_path / "new" / "one").stat().st_mode & 0o777 == 0o700
    config.check_folder(tmp_path / "new" / "one", False)
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(UserError):
            config.check_folder(path, False)
    config.check_folder(tmp_path, True)


@pytest.mark.parametrize("program", ["data.py", "train.py", "chat.py"])
def test_help_is_there(program):
    done = command(program, "--help")
    assert done.returncode == 0 and "usage: " in done.stdout


def test_lora_has_one_verb():
    refused(command("lora.py"), "merge")


def test_one_of_a_kind_is_said_in_the_singular():
    for what, one in {
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
            config.counted(1, what) == f"1 {one}"
            and config.counted(1000, what) == f"1,000 {what}"
            and config.counted(0, what) == f"0 {what}"
        )
