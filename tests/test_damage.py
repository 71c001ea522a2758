"""Mutated exports: no traceback, no hang, never another person's words under someone's name or in a chat not theirs. `make soak` runs 10,000 of them."""

import collections
import contextlib
import io
import json
import os
import random
import re
import sys
import time
import zipfile

import pytest

import cli
import exports
from exports.command import main

MUTANTS = int(os.environ.get("MUTANTS", 400))
AUTHORS = (
    "user1111",
    "user2222",
    "user3333",
    "channel4444",
)  # no one mutation makes one of another
CHATS = (5000, 5011, 5122, 5233)
STRUCTURE = '{}[]",:\\\n 0'


def healthy(rng):
    """An export in Telegram's own shape; each message says who wrote it."""
    listed = []
    for number in range(rng.randint(1, 4)):
        said, at = [], 1_600_000_000
        for i in range(rng.randint(0, 25)):
            at += rng.choice((5, 60, 4000))
            who = rng.choice(AUTHORS)
            text = f"[{who} in {CHATS[number]}] " + rng.choice(
                (f"says {i}", f'\\ " \u20ac\n \U0001f986 {i}')
            )
            one = {
                "id": i,
                "type": "message",
                "date": "2020-09-13T12:26:40",
                "date_unixtime": str(at),
                "from": "N",
                "from_id": who,
            }
            one |= rng.choice(
                (
                    {},
                    {"reply_to_message_id": 1},
                    {"media_type": "sticker", "document_id": "video_files/a.webm"},
                )
            )
            said.append(
                one
                | {
                    "text": rng.choice((text, [text[:4], {"type": "bold", "text": text[4:]}])),
                    "text_entities": [{"type": "plain", "text": text}],
                }
            )
        kind = rng.choice(("personal_chat", "private_group", "public_supergroup", "bot_chat"))
        listed.append(
            {"name": f"chat {number}", "type": kind, "id": CHATS[number], "messages": said}
        )
    root = {
        "about": "x",
        "personal_information": {"user_id": 1111, "bio": "y"},
        "contacts": {"list": [{"name": "z"}]},
    }
    value = rng.choice(
        (
            root
            | {"chats": {"about": "", "list": listed[:-1]}, "left_chats": {"list": listed[-1:]}},
            listed[0],
        )
    )
    return json.dumps(value, indent=rng.choice((None, 1, 1, 1)), ensure_ascii=False)


OTHERS = {
    "user1111": ("user00000", "user00000"),
    "user2222": ("userBob Smith", "telegram:userBob Smith"),
    "user3333": ("4917000003333@s.whatsapp.net", "user4917000003333"),
}
KNOWN = {read: author for author, (_, read) in OTHERS.items()}


def another_tools(text):
    """The same, its first chat, as WhatsApp-Chat-Exporter and its like would write it."""
    value = json.loads(text)
    value = (value["chats"]["list"] + value["left_chats"]["list"])[0] if "chats" in value else value
    for message in value["messages"]:
        author = message["from_id"]
        message["from_id"] = OTHERS.get(author, (author, author))[0]
        message["date_unixtime"] = int(message["date_unixtime"])
    return json.dumps(value, indent=1, ensure_ascii=False)


def damaged(text, rng):
    """What disks, tools and Telegram itself do to it, once or several times."""
    for _ in range(rng.choice((1, 1, 2, 5))):
        text = once(text, rng.choice(DAMAGES), rng.randrange(len(text) + 1), rng)
    return text


DAMAGES = ("cut", "change", "lose", "insert", "repeat", "hole", "escapes", "unquoted", "mark")


def once(text, damage, at, rng):
    """Ranges are shorter than a message: where one's head meets another's text, nobody can tell."""
    length = rng.randint(1, 40)
    if damage == "cut":
        return text[:at]
    if damage == "change":
        return (
            text[:at] + chr(rng.choice((0, 7, 65, 0xFFFD, rng.randrange(32, 127)))) + text[at + 1 :]
        )
    if damage == "lose":
        return text[:at] + text[at + length :]
    if damage == "insert":
        return text[:at] + "".join(rng.choices(STRUCTURE, k=rng.randint(1, 4))) + text[at:]
    if damage == "repeat":
        return text[: at + length] + text[at:]
    if damage == "hole":
        return text[:at] + "\0" * 512 + text[at + 512 :]
    if damage == "escapes":
        return text.replace("says", rng.choice((r"\x01", r"\\x01", "\n", r"\q")), length)
    if damage == "unquoted":
        return re.sub('"(video_files[^"]*)"', r"\1", text)
    return "\ufeff" + text


def spoken(path):
    try:
        return [(chat, message) for chat, messages in exports.read(path) for message in messages]
    except cli.UserError:
        return []


def mutants(path, make, damage=damaged):
    """Yield (number, text before the damage, its (chat, message) pairs) of MUTANTS damaged files.

    A file that is refused has none. None may take five seconds.
    """
    for number in range(MUTANTS):
        rng = random.Random(number)
        text = make(rng)
        path.write_bytes(damage(text, rng).encode("utf-8", "replace"))
        began = time.process_time()
        found = spoken(path)
        assert time.process_time() - began < 5, f"mutant {number}"
        yield number, text, found


def damaged_by(*kinds):
    """Return a function that damages a text once or twice, in one of these ways."""

    def damage(text, rng):
        for _ in range(rng.choice((1, 2))):
            text = once(text, rng.choice(kinds), rng.randrange(len(text) + 1), rng)
        return text

    return damage


def assert_tags_name_the_authors(path, make, authors, tag, kinds):
    """Each message of damaged files has only the texts of its author, whom they name in a tag."""
    kept = 0
    for number, _, found in mutants(path, make, damaged_by(*kinds)):
        for _, message in found:
            for name in re.findall(tag, message.text):
                kept += 1
                wrong = message.name in authors and name in authors and message.name != name
                assert not wrong, f"mutant {number}: {message}"
    assert kept > MUTANTS * 5


def assert_few_are_lost(path, make, authors, messenger, tag, count, least):
    """Each message of damaged files is its author's, whose id its text begins with."""
    kept = whole = 0
    for number, text, found in mutants(path, make):
        for _, message in found:
            name = re.match(tag, message.text)
            if name and name[1] in authors and not message.left_out:
                author = str(message.author).removeprefix(f"{messenger}:")
                assert author == name[1] or author not in authors, f"mutant {number}: {message}"
                kept += 1
        whole += len(re.findall(count, text))
    print(f"{MUTANTS:,} mutants, {kept / whole:.1%} of their texts read")
    assert kept > least * whole


@pytest.mark.parametrize("shape", ["telegram", "another tool"])
def test_mutated_exports_have_no_traceback_no_hang_and_no_wrong_author_or_chat(shape, tmp_path):
    kept = whole = 0

    def make(rng):
        return healthy(rng) if shape == "telegram" else another_tools(healthy(rng))

    for number, text, found in mutants(tmp_path / "result.json", make):
        for chat, message in found:
            tag = re.match(r"\[(\w+) in (\d+)\] ", message.text)
            if tag and tag[1] in AUTHORS and not message.left_out:
                author = KNOWN.get(message.author, message.author)
                assert author == tag[1] or author not in AUTHORS, f"mutant {number}: {message}"
                assert chat.id == tag[2] or int(chat.id) not in CHATS or int(tag[2]) not in CHATS, (
                    f"mutant {number}: {chat} {message}"
                )
                kept += 1
        whole += text.count('"date_unixtime"')
    print(f"{MUTANTS:,} mutants, {kept / whole:.1%} of their messages read")
    # in a single chat a damaged head costs everything
    assert kept > whole * (0.7 if shape == "telegram" else 0.65)


@pytest.mark.parametrize("shape", ["telegram", "whatsapp", "zip"])
def test_the_command_takes_mutants_or_refuses_them_in_two_lines(shape, tmp_path, monkeypatch):
    names = {"telegram": "result.json", "whatsapp": "WhatsApp Chat with Bob.txt", "zip": "chat.zip"}
    path = tmp_path / names[shape]
    for number in range(MUTANTS // 10):
        rng = random.Random(number)
        text = damaged(healthy(rng) if shape != "whatsapp" else talk(rng), rng).encode(
            "utf-8", "replace"
        )
        if shape == "zip":
            packed = io.BytesIO()
            with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr("result.json", text)
            text = bytearray(packed.getvalue())
            for _ in range(rng.randint(0, 3)):
                text[rng.randrange(len(text))] = rng.randrange(256)
        path.write_bytes(text)
        monkeypatch.setattr(
            sys,
            "argv",
            ["data.py", str(path), "--dry-run", "--me", rng.choice((AUTHORS[0], "whatsapp:Ann"))],
        )
        said, code = io.StringIO(), 0
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            try:
                cli.run(main)
            except SystemExit as end:
                code = end.code
        lines = [line for line in said.getvalue().splitlines() if line]
        assert (code, len(lines)) in ((0, 0), (2, 2)), f"mutant {number}: {code} {said.getvalue()}"


def talk(rng):
    """A WhatsApp chat."""
    lines = (
        f"{rng.randint(1, 28):02}/03/2021, {n // 60 % 24:02}:{n % 60:02} - {rng.choice(('Ann', 'Bob'))}: hello {n}"
        for n in range(60)
    )
    return "\n".join(lines) + "\n"


def test_what_was_read_of_a_mutant_is_what_stood_there(tmp_path):
    """One lost byte costs at most the message it hit and, where it hit a chat's head, that chat."""
    path, lost = tmp_path / "result.json", collections.Counter()
    for number in range(MUTANTS // 2):
        rng = random.Random(-number)
        text = healthy(rng)
        path.write_text(text, encoding="utf-8")
        before = collections.Counter(m.text for _, m in spoken(path))
        at = rng.randrange(text.index('"messages"'), len(text))
        path.write_text(text[:at] + text[at + 1 :], encoding="utf-8")
        after = collections.Counter(m.text for _, m in spoken(path))
        lost[min(5, (before - after).total())] += 1
    print(f"messages lost to a missing byte: {dict(sorted(lost.items()))}")
    assert lost[0] + lost[1] > 0.9 * lost.total()
