"""How fast `data.py` reads, in how much memory, beside a plain `json.load` of the same file in the same run.

    python -m bench.data --mb 2000              a generated export of 2 GB, half of it one chat; prints JSON
    python -m bench.data --export result.json   your own
    python -m bench.data --mb 200 --runs 5      medians of 5 runs; json.load needs some seven times the file's size in memory

`ratio` is data.py's whole run (start of Python, redaction, sessions, validation split, report) over json.load's time alone.
"""

import dataclasses
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cli
from cli import flag

ROOT = Path(__file__).parent.parent
WORDS = (
    "the you know what I mean maybe tomorrow at work never mind it was really good did they say anything about dinner tonight because we",
    "привет как дела ну ладно я сегодня не смогу давай завтра вечером он сказал что всё хорошо а ты где вообще понял спасибо тогда потом",
)
SECRETS = (
    "call +49 170 1234567",
    "ann@example.org",
    "пароль: qwerty12",
    "card 4111 1111 1111 1111",
)
LOAD = "import json, sys, time; began = time.time(); json.load(open(sys.argv[1], encoding='utf-8')); print(time.time() - began)"


@dataclasses.dataclass(frozen=True)
class Config:
    """Measure data.py on an export of a chosen size."""

    mb: int = flag(200, "size of the export that is generated, in megabytes")
    export: str | None = flag(None, "measure on this export instead")
    runs: int = flag(3, "runs of each, side by side; medians are printed")
    alone: bool = flag(False, "leave json.load out (it holds the whole file)")


def generate(path, megabytes):
    """Write an export as Telegram Desktop does: two languages, replies, photos, stickers, links, forwards, a secret in 500 messages."""
    rng = random.Random(0)
    words = [line.split() for line in WORDS]
    size, chats = 0, 0
    with open(path, "w", encoding="utf-8") as file:
        file.write(
            '{\n "about": "x",\n "personal_information": {\n  "user_id": 1\n },\n "chats": {\n  "about": "y",\n  "list": ['
        )
        while size < megabytes * 1e6:
            chats += 1
            room = megabytes * 1e6 * (0.5 if chats == 1 else 0.02)
            file.write(
                f'{"," * (chats > 1)}\n   {{\n    "name": "Chat {chats}",\n    "type": "personal_chat",\n    '
            )
            file.write(f'"id": {chats + 1},\n    "messages": [')
            at, number, begin = 1_400_000_000, 0, file.tell()
            while file.tell() - begin < min(room, megabytes * 1e6 - size):
                lines = []
                for _ in range(200):
                    number += 1
                    at += rng.choice((7, 20, 45, 90, 200, 5000))
                    who, name = ((1, "Me Myself"), (chats + 1, f"Chat {chats} Person"))[
                        rng.random() < 0.5
                    ]
                    lines.append(message(rng, number, at, who, name, words[number % 3 == 0]))
                file.write(("," if number > 200 else "") + ",".join(lines))
            size += file.tell() - begin
            file.write("\n    ]\n   }")
        file.write("\n  ]\n }\n}\n")


def message(rng, number, at, who, name, words):
    kind = rng.random()
    text = " ".join(rng.choices(words, k=1 + int(rng.expovariate(1 / 6))))
    if kind > 0.998:
        text += " " + rng.choice(SECRETS)
    date, extra = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at)), ""
    if kind < 0.12:
        extra = f',\n      "reply_to_message_id": {number - 3}'
    elif kind < 0.16:
        extra = f',\n      "photo": "photos/photo_{number}@10-01-2021_10-00-00.jpg",\n      "width": 1280,\n      "height": 960'
    elif kind < 0.18:
        extra, text = (
            ',\n      "file": "(File not included.)",\n      "media_type": "sticker",\n      "sticker_emoji": "😂"',
            "",
        )
    elif kind < 0.20:
        extra = ',\n      "forwarded_from": "Some Channel"'
    entity = f'{{\n        "type": "plain",\n        "text": "{text}"\n       }}'
    shown, entities = f'"{text}"', f"[\n       {entity}\n      ]" if text else "[]"
    if 0.90 < kind < 0.95:
        link = '{\n        "type": "link",\n        "text": "https://example.org/x"\n       }'
        shown, entities = (
            f'[\n       "{text}",\n       {link}\n      ]',
            f"[\n       {entity},\n       {link}\n      ]",
        )
    fields = (
        f'"id": {number}',
        '"type": "message"',
        f'"date": "{date}"',
        f'"date_unixtime": "{at}"',
        f'"from": "{name}"',
        f'"from_id": "user{who}"{extra}',
        f'"text": {shown}',
        f'"text_entities": {entities}',
    )
    return "\n     {\n      " + ",\n      ".join(fields) + "\n     }"


def measured(*command):
    """Run a command → (seconds, peak resident memory in MiB, what it printed)."""
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
    options = cli.parse(Config)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(options.export).absolute() if options.export else Path(folder) / "result.json"
        if not options.export:
            generate(path, options.mb)
        ours, loads, messages = [], [], 0
        for _ in range(options.runs):
            ours.append(
                measured("data.py", path, "--out", Path(folder) / "data", "--overwrite")[:2]
            )
            messages = json.loads(
                (Path(folder) / "data" / "report.json").read_text(encoding="utf-8")
            )["messages"]
            if not options.alone:
                loads.append(float(measured("-c", LOAD, path)[2]))
        size, seconds = path.stat().st_size / 1e6, statistics.median(s for s, _ in ours)
        result = {
            "mb": round(size, 1),
            "messages": messages,
            "seconds": round(seconds, 2),
            "mb_per_s": round(size / seconds, 1),
            "messages_per_s": round(messages / seconds),
            "peak_mib": round(max(peak for _, peak in ours), 1),
        }
        if loads:
            result |= {
                "json_load_seconds": round(statistics.median(loads), 2),
                "ratio": round(seconds / statistics.median(loads), 3),
            }
        print(json.dumps(result))


if __name__ == "__main__":
    cli.run(main)
