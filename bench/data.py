"""Measure time and memory of `data.py`, beside a plain `json.load` of the same file.

    python -m bench.data --mb 2000              a generated export of 2 GB, half of it one chat
    python -m bench.data --export result.json   your own
    python -m bench.data --mb 200 --runs 5      medians of 5 runs
    python -m bench.data --mb 500 --format messenger

Prints JSON. `ratio` is the time of all of data.py (Python's start, redaction, sessions, report)
over that of json.load alone, which needs about seven times the file's size in memory.
"""

import dataclasses
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import cli
from cli import flag

ROOT = Path(__file__).parent.parent
WORDS = (
    "the you know what I mean maybe tomorrow at work never mind it was really good "
    "did they say anything about dinner tonight because we",
    "привет как дела ну ладно я сегодня не смогу давай завтра вечером он сказал что всё хорошо "
    "а ты где вообще понял спасибо тогда потом",
)
SECRETS = (
    "call +49 170 1234567",
    "ann@example.org",
    "пароль: qwerty12",
    "card 4111 1111 1111 1111",
)
LOAD = """
import json, sys, time
began = time.time()
kept = [json.load(open(path, encoding="utf-8")) for path in sys.argv[1:]]
print(time.time() - began)
"""


@dataclasses.dataclass(frozen=True)
class Options:
    """Measure data.py on an export of a chosen size."""

    mb: int = flag(200, "size of the generated export, in megabytes")
    format: str = flag("telegram", "what it is of: telegram or messenger")
    export: str | None = flag(None, "measure on this export instead")
    runs: int = flag(3, "runs of each, in turn; medians are printed")
    alone: bool = flag(False, "don't run json.load, which holds the whole file")


def generate(path: Path, megabytes: int) -> None:
    """Write an export as Telegram Desktop does: two languages, media, forwards, some secrets."""
    rng = random.Random(0)
    vocabularies = [line.split() for line in WORDS]
    size, chats = 0, 0
    with open(path, "w", encoding="utf-8") as file:
        owner = '"personal_information": {\n  "user_id": 1\n }'
        file.write(f'{{\n "about": "x",\n {owner},\n "chats": {{\n  "about": "y",\n  "list": [')
        while size < megabytes * 1e6:
            chats += 1
            room = megabytes * 1e6 * (0.5 if chats == 1 else 0.02)
            name = f'"name": "Chat {chats}"'
            file.write(
                f'{"," * (chats > 1)}\n   {{\n    {name},\n    "type": "personal_chat",\n    '
            )
            file.write(f'"id": {chats + 1},\n    "messages": [')
            people = ((1, "Me Myself"), (chats + 1, f"Chat {chats} Person"))
            at, number, begin = 1_400_000_000, 0, file.tell()
            while file.tell() - begin < min(room, megabytes * 1e6 - size):
                lines = []
                for _ in range(200):
                    number += 1
                    at += rng.choice((7, 20, 45, 90, 200, 5000))
                    author, name = people[rng.random() < 0.5]
                    vocabulary = vocabularies[number % 3 == 0]
                    lines.append(message(rng, number, at, author, name, vocabulary))
                file.write(("," if number > 200 else "") + ",".join(lines))
            size += file.tell() - begin
            file.write("\n    ]\n   }")
        file.write("\n  ]\n }\n}\n")


def message(
    rng: random.Random, number: int, at: int, author: int, name: str, vocabulary: list
) -> str:
    """Return a message as it stands in an export: text, or sometimes something else."""
    kind = rng.random()
    text = " ".join(rng.choices(vocabulary, k=1 + int(rng.expovariate(1 / 6))))
    if kind > 0.998:
        text += " " + rng.choice(SECRETS)
    extra = {}
    if kind < 0.12:
        extra = {"reply_to_message_id": number - 3}
    elif kind < 0.16:
        photo = f"photos/photo_{number}@10-01-2021_10-00-00.jpg"
        extra = {"photo": photo, "width": 1280, "height": 960}
    elif kind < 0.18:
        extra = {"file": "(File not included.)", "media_type": "sticker", "sticker_emoji": "😂"}
        text = ""
    elif kind < 0.20:
        extra = {"forwarded_from": "Some Channel"}
    entities = [{"type": "plain", "text": text}] if text else []
    shown: str | list = text
    if 0.90 < kind < 0.95:
        link = {"type": "link", "text": "https://example.org/x"}
        shown, entities = [text, link], [*entities, link]
    fields = {
        "id": number,
        "type": "message",
        "date": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at)),
        "date_unixtime": str(at),
        "from": name,
        "from_id": f"user{author}",
        **extra,
        "text": shown,
        "text_entities": entities,
    }
    # Telegram indents by one space; a message lies five levels deep.
    return "\n" + textwrap.indent(json.dumps(fields, indent=1, ensure_ascii=False), " " * 5)


def generate_messenger(folder: Path, megabytes: int) -> None:
    """Write an export as Facebook does: files of 10,000 messages, newest first, mojibake."""
    rng = random.Random(0)
    vocabularies = [line.split() for line in WORDS]
    size = chats = 0
    while size < megabytes * 1e6:
        chats += 1
        room = size + megabytes * 1e6 * (0.5 if chats == 1 else 0.02)
        inbox = folder / f"your_facebook_activity/messages/inbox/person_{chats}"
        inbox.mkdir(parents=True)
        people, at, number = ("Me Myself", f"Person {chats}"), 1_700_000_000_000, 0
        while size < min(room, megabytes * 1e6):
            number += 1
            messages = []
            for i in range(10_000):
                at -= rng.choice((7, 20, 45, 90, 200, 5000)) * 1000
                text = " ".join(rng.choices(vocabularies[i % 3 == 0], k=1 + i % 12))
                sent: dict = {"content": text.encode().decode("latin-1")}
                if i % 25 == 0:
                    sent = {"photos": [{"uri": f"photos/{i}.jpg", "creation_timestamp": 1}]}
                sender = {"sender_name": people[rng.random() < 0.5], "timestamp_ms": at}
                messages.append(sender | sent | {"is_geoblocked_for_viewer": False})
            chat = {
                "participants": [{"name": name} for name in people[::-1]],
                "messages": messages,
                "title": people[1],
                "thread_path": f"inbox/person_{chats}",
            }
            path = inbox / f"message_{number}.json"
            path.write_text(json.dumps(chat, indent=2), encoding="utf-8")
            size += path.stat().st_size


def measure(*command) -> tuple[float, float, str]:
    """Run Python with these arguments; return (seconds, peak memory in MiB, what it printed)."""
    began = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    printed = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(child.returncode)
    return time.perf_counter() - began, usage.ru_maxrss / 1024, printed


def main():
    options = cli.parse(Options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(options.export).absolute() if options.export else Path(folder) / "result.json"
        if options.format == "messenger" and not options.export:
            path = Path(folder) / "export"
            generate_messenger(path, options.mb)
        elif not options.export:
            generate(path, options.mb)
        files = sorted(path.rglob("*.json")) if path.is_dir() else [path]
        out = Path(folder) / "data"
        runs, loads = [], []
        for _ in range(options.runs):
            runs.append(measure("data.py", path, "--out", out, "--overwrite"))
            if not options.alone:
                loads.append(float(measure("-c", LOAD, *files)[2]))
        messages = json.loads((out / "report.json").read_text(encoding="utf-8"))["messages"]
        size = sum(file.stat().st_size for file in files) / 1e6
        seconds = statistics.median(run[0] for run in runs)
        result = {
            "mb": round(size, 1),
            "messages": messages,
            "seconds": round(seconds, 2),
            "mb_per_s": round(size / seconds, 1),
            "messages_per_s": round(messages / seconds),
            "us_per_message": round(seconds / messages * 1e6, 1),
            "peak_mib": round(max(peak for _, peak, _ in runs), 1),
        }
        if loads:
            load = statistics.median(loads)
            result |= {"json_load_seconds": round(load, 2), "ratio": round(seconds / load, 3)}
        print(json.dumps(result))


if __name__ == "__main__":
    cli.run(main)
