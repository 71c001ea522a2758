"""data.py, plan.py and chat.py run without the parts of Python that Windows lacks.

mypy --platform win32 (`make lint`) checks the lines that aren't run.
"""

import json

from conftest import command

WITHOUT = """
import os, runpy, signal, sys
import numpy, safetensors.torch, tokenizers, tqdm
import {library}
for module in ("fcntl", "grp", "pwd", "readline", "resource", "termios"):
    sys.modules[module] = None
missing = "fork geteuid getpgid getuid killpg mkfifo pread preadv pwrite pwritev setsid sysconf uname".split(), "SIGALRM SIGHUP SIGKILL".split()
for owner, names in zip((os, signal), missing):
    for name in names:
        delattr(owner, name)
sys.argv = sys.argv[1:]
sys.path[0] = os.getcwd()
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_as_on_windows(tmp_path, *args, library="torch", stdin=""):
    """Run a program where pipes have an old code page. → its stdout"""
    boot = tmp_path / "boot.py"
    boot.write_text(WITHOUT.format(library=library))
    done = command(boot, *args, env={"PYTHONIOENCODING": "cp1252"}, stdin=stdin)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_data_reads_an_export(tmp_path):
    texts = [("user1", "Ann", "hey \U0001f986"), ("user2", "Bob", "привет")] * 4
    messages = [
        {"id": n, "type": "message", "date": f"2024-01-{n + 1:02}T00:00:0{m}", "date_unixtime": str(1704067200 + n * 86400 + m),
         "from": who, "from_id": author, "text": text}
        for n in range(3) for m, (author, who, text) in enumerate(texts)
    ]  # fmt: skip
    chat = {"name": "Bob", "type": "personal_chat", "id": 2, "messages": messages}
    export = tmp_path / "result.json"
    export.write_text(
        json.dumps(
            {"personal_information": {"user_id": 1, "first_name": "Ann"}, "chats": {"list": [chat]}}
        ),
        encoding="utf-8",
    )
    output = run_as_on_windows(
        tmp_path, "data.py", export, "--out", tmp_path / "data", library="json"
    )
    assert "\U0001f986" in output and "привет" in output
    assert [*(tmp_path / "data").glob("*.jsonl")] and not [*tmp_path.glob("new-*")]


def test_plan_prints_a_plan(tmp_path, base, chats):
    assert "memory" in run_as_on_windows(
        tmp_path,
        "plan.py",
        "--gpu",
        "3090",
        "--lora",
        "--model",
        base,
        "--data",
        chats,
        "--seq-len",
        160,
    )


def test_chat_answers(tmp_path, base):
    assert run_as_on_windows(
        tmp_path, "chat.py", base, "-p", "привет \U0001f986", "--device", "cpu"
    ).strip()
    assert run_as_on_windows(
        tmp_path,
        "chat.py",
        base,
        "--device",
        "cpu",
        "--max-tokens",
        4,
        stdin="привет\nhow are you?\n",
    ).strip()
