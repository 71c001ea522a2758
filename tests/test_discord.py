"""DiscordChatExporter's JSON and Discord's own data package; all names invented."""

import collections
import csv
import io
import json
import re
import sys
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_damage import assert_few_are_lost, mutants

import cli
import exports
from exports.command import main
from exports.discord_package import ONLY_MINE
from exports.join import order

PEOPLE = {
    "1111111111111111111": "Ann",
    "2222222222222222222": "Bób 🦆",
    "3333333333333333333": "Cid",
}
ANN, BOB, CID = PEOPLE
FIRST = 1_200_000_000_000_000_000  # a message's number
CHARACTERS = st.characters(codec="utf-8", exclude_categories=("Cc", "Zs"), exclude_characters="<")


def user(number, **fields):
    name = PEOPLE.get(number, "Eve")
    shown = {"id": number, "name": name.casefold(), "discriminator": "0000", "nickname": name}
    return shown | {"color": None, "isBot": False, "roles": [], "avatarUrl": "https://x"} | fields


def said(i, author, content, when="2023-01-15T10:30:00.123+02:00", **fields):
    return {
        "id": str(FIRST + i),
        "type": "Default",
        "timestamp": when,
        "timestampEdited": None,
        "callEndedTimestamp": None,
        "isPinned": False,
        "content": content,
        "author": user(author),
        "attachments": [],
        "embeds": [],
        "stickers": [],
        "reactions": [],
        "mentions": [],
        "inlineEmojis": [],
    } | fields


def channel(messages, kind="GuildTextChat", name="general", number="4444444444444444444"):
    return {
        "guild": {"id": "5", "name": "Chess Club", "iconUrl": "https://x"},
        "channel": {"id": number, "type": kind, "categoryId": None, "name": name, "topic": "x"},
        "dateRange": {"after": None, "before": None},
        "exportedAt": "2026-11-28T10:00:00+00:00",
        "messages": messages,
        "messageCount": len(messages),
    }


def write(path, value, indent=2):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=indent, ensure_ascii=False), encoding="utf-8")
    return path


def read(path, repairs=None):
    return [(chat, sorted(messages, key=order)) for chat, messages in exports.read(path, repairs)]


def result(tmp_path, fields):
    """What becomes of one message of Ann's: its text, or why it is left out."""
    [(_, [message])] = read(write(tmp_path / "x.json", channel([said(1, ANN, "") | fields])))
    return message.left_out or message.text


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([*PEOPLE]),
            st.integers(0, 3000),
            st.text(CHARACTERS, min_size=1, max_size=30),
        ),
        min_size=1,
        max_size=40,
    ),
    st.sampled_from((None, 2)),
    st.sampled_from((1, 7, 1000)),
)
def test_what_is_generated_comes_back_in_order(tmp_path_factory, lines, indent, size):
    folder, at, messages, expected = tmp_path_factory.mktemp("discord"), 1_673_771_400, [], []
    for i, (author, step, text) in enumerate(lines):
        at += step
        messages.append(said(i, author, text, exports.iso_time(at) + ".5+00:00"))
        expected.append((FIRST + i, f"discord:{author}", PEOPLE[author], at, text))
    for number, first in enumerate(range(0, len(messages), size), 1):
        part = channel(messages[first : first + size])
        write(folder / f"Chess Club - general [part {number}].json", part, indent)
    [(chat, found)] = read(folder)
    assert (chat.name, chat.type, chat.owner) == ("Chess Club #general", "private_supergroup", None)
    assert [(m.id, m.author, m.name, m.at, m.text) for m in found] == expected
    assert all(m.date == exports.iso_time(m.at) and not m.left_out for m in found)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"content": " hi "}, "hi"),
        ({"content": "hi", "type": "Reply", "reference": {"messageId": "1"}}, "hi"),
        ({"content": "new", "timestampEdited": "2023-01-15T10:31:00+02:00"}, "new"),
        ({"content": "hi <@2222222222222222222> <:kek:123> <a:hop:12>", "mentions": [user(BOB)]}, "hi @Bób 🦆 :kek: :hop:"),
        ({"content": "<@9> come <#12>"}, "come"),
        ({"content": "a < b > c <3"}, "a < b > c <3"),
        ({"content": "https://tenor.com/view/duck-123"}, "<gif>"),
        ({"attachments": [{"fileName": "a.PNG"}]}, "<photo>"),
        ({"attachments": [{"fileName": "voice-message.ogg"}]}, "<voice>"),
        ({"attachments": [{"fileName": "a.mp4"}], "content": "look"}, "look"),
        ({"attachments": [{"fileName": "a.xyz"}]}, "<file>"),
        ({"stickers": [{"name": "x"}]}, "<sticker>"),
        ({"embeds": [{"title": "x"}]}, "messages without text"),
        ({"content": "Joined the server.", "type": "GuildMemberJoin"}, "service messages"),
        ({"content": "Started a call.", "type": "Call"}, "service messages"),
        ({"content": "", "type": "46"}, "service messages"),
        ({"content": "x", "author": user(BOB, isBot=True)}, "written by or via a bot"),
        ({"content": "x", "type": "20"}, "written by or via a bot"),
        ({"forwardedMessage": {"content": "theirs"}, "reference": {"type": "Forward"}}, "forwards"),
        ({"content": "x", "author": None}, "messages without author or date"),
        ({"content": "x", "timestamp": "soon"}, "messages without author or date"),
    ],
)  # fmt: skip
def test_media_becomes_a_mark_and_others_words_a_reason(tmp_path, fields, expected):
    assert result(tmp_path, fields) == expected


def test_times_are_local_as_written_and_deleted_people_have_no_name(tmp_path):
    gone = user(CID, name="Deleted User", nickname="Deleted User")
    path = write(tmp_path / "x.json", channel([said(1, CID, "hi") | {"author": gone}]))
    [(_, [message])] = read(path)
    assert (message.at, message.date) == (1_673_771_400, "2023-01-15T10:30:00")
    assert (message.author, message.name) == (f"discord:{CID}", None)


def test_of_a_chat_of_two_the_owner_is_the_one_who_is_not_its_name(tmp_path):
    both = [said(1, ANN, "hi"), said(2, BOB, "ho")]
    found = {}
    for name, messages in (("both", both), ("one", both[:1])):
        value = channel(messages, "DirectTextChat", "Bób 🦆")
        [(chat, _)] = read(write(tmp_path / f"{name}.json", value))
        found[name] = (chat.type, chat.name, chat.owner)
    assert found["both"] == ("personal_chat", "Bób 🦆", f"discord:{ANN}")
    assert found["one"] == ("personal_chat", "Bób 🦆", None)


def test_a_channel_without_a_readable_head_is_left_out_not_guessed(tmp_path):
    text = json.dumps(channel([said(1, ANN, "hi")]))
    path = tmp_path / "x.json"
    path.write_text(text.replace('"channel": {"id": "444', '"channel": {"id": "\n'))
    repairs = collections.Counter()
    assert read(path, repairs) == [] and repairs.total() == 1


def test_a_nickname_that_is_no_text_is_no_traceback(tmp_path):
    messages = [said(0, ANN, "hi"), said(1, BOB, "ho")]
    messages[0]["author"]["nickname"] = {"a": 1}
    path = write(tmp_path / "dm.json", channel(messages, "DirectTextChat", PEOPLE[BOB]))
    ((chat, found),) = read(path)
    assert chat.owner == f"discord:{ANN}" and [m.text for m in found] == ["hi", "ho"]


def package(folder, rows, as_csv, kind="DM"):
    """Discord's data package, with one channel."""
    home = folder / "messages/c4444444444444444444"
    home.mkdir(parents=True, exist_ok=True)
    if as_csv:
        buffer = io.StringIO()
        table = csv.writer(buffer)
        table.writerow(("ID", "Timestamp", "Contents", "Attachments"))
        for number, time_, text, files in rows:
            table.writerow((number, time_ + ".726000+00:00", text, files))
        (home / "messages.csv").write_text(buffer.getvalue(), encoding="utf-8", newline="")
    else:
        keys = ("ID", "Timestamp", "Contents", "Attachments")
        write(home / "messages.json", [dict(zip(keys, row, strict=True)) for row in rows], 0)
    recipients = {"type": kind, "recipients": [ANN, BOB]}
    write(home / "channel.json", {"id": "4444444444444444444"} | recipients)
    write(folder / "messages/index.json", {"4444444444444444444": "Direct Message with bob#0"})
    write(folder / "account/user.json", {"id": ANN, "username": "ann", "global_name": "Ann"})
    return folder


@pytest.mark.parametrize("as_csv", [False, True])
@settings(max_examples=30, deadline=None)
@given(texts=st.lists(st.text(CHARACTERS, min_size=1, max_size=20), min_size=1, max_size=20))
def test_the_data_package_comes_back_and_says_who_i_am(tmp_path_factory, as_csv, texts):
    rows = []
    for i, text in enumerate(texts):
        rows.append((FIRST + i, exports.iso_time(1_673_771_400 + i).replace("T", " "), text, ""))
    folder = package(tmp_path_factory.mktemp("package") / "package", rows[::-1], as_csv)
    [(chat, found)] = read(folder)
    assert (chat.type, chat.owner) == ("personal_chat", f"discord:{ANN}")
    assert [(m.id, m.at, m.text) for m in found] == [
        (FIRST + i, 1_673_771_400 + i, text) for i, text in enumerate(texts)
    ]
    assert {(m.author, m.name) for m in found} == {(f"discord:{ANN}", "Ann")}


def test_a_package_in_a_zip_is_read_with_several_lines_and_attachments(tmp_path):
    rows = [
        (FIRST + 1, "2023-01-15 08:30:00", 'two\nlines, "quoted"', ""),
        (FIRST + 2, "2023-01-15 08:31:00", "", "https://cdn.example/a/photo.jpg?ex=1 https://x/b"),
    ]
    folder = package(tmp_path / "package", rows, as_csv=True)
    with zipfile.ZipFile(tmp_path / "package.zip", "w") as archive:
        for path in folder.rglob("*.*"):
            archive.write(path, path.relative_to(folder))
    repairs = collections.Counter()
    [(chat, found)] = read(tmp_path / "package.zip", repairs)
    assert chat.name == "Direct Message with bob#0" and repairs == {ONLY_MINE: 1}
    assert [m.text for m in found] == ['two\nlines, "quoted"', "<photo>"]


def test_package_and_export_of_a_channel_are_one_chat_and_the_package_says_who_i_am(
    tmp_path, monkeypatch, capsys
):
    messages, rows = [], []
    for day in range(1, 28):
        for i, author in enumerate((BOB, ANN, BOB, ANN)):
            at = f"2023-01-{day:02}T10:0{i}:00"
            messages.append(said(100 * day + i, author, f"day {day} text {i}", at + "+00:00"))
            if author == ANN:
                row = (FIRST + 100 * day + i, at.replace("T", " "), f"day {day} text {i}", "")
                rows.append(row)
    exported = write(tmp_path / "export.json", channel(messages))
    folder = package(tmp_path / "package", rows, as_csv=False, kind="GUILD_TEXT")
    arguments = ["data.py", str(exported), str(folder), "--out", str(tmp_path / "data")]
    monkeypatch.setattr(sys, "argv", arguments)
    cli.run(main)
    capsys.readouterr()
    report = json.loads((tmp_path / "data/report.json").read_text(encoding="utf-8"))
    assert report["chats"] == 1 and report["messages"] == len(messages)
    assert report["trained_messages"] > 40


AUTHORS = ("1111111111111111111", "2222222222222222222", "3333333333333333333")


def healthy(rng):
    messages = []
    for i in range(rng.randint(0, 20)):
        author = rng.choice(AUTHORS)
        text = f"[{author}] " + rng.choice((f"says {i}", f'\\ " \u20ac\n \U0001f986 {i}'))
        extra = rng.choice(
            ({}, {"attachments": [{"fileName": "a.png"}]}, {"mentions": [user(BOB)]})
        )
        messages.append(said(i, author, text, **extra))
    return json.dumps(channel(messages), indent=rng.choice((None, 2)), ensure_ascii=False)


def test_mutated_files_have_no_traceback_no_hang_and_no_wrong_author(tmp_path):
    path = tmp_path / "general.json"
    assert_few_are_lost(path, healthy, AUTHORS, "discord", r"\[(\d+)\] ", r"\[\d{19}\] ", 0.7)


@pytest.mark.parametrize("shape", ["csv", "json"])
def test_mutated_packages_have_no_traceback_no_hang_and_no_text_under_another_number(
    tmp_path, shape
):
    """All is mine there, but a message joins by its number with the one that others answered."""
    folder = package(tmp_path, [], shape == "csv")
    path = folder / f"messages/c4444444444444444444/messages.{shape}"

    def make(rng):
        rows = []
        for i in range(rng.randint(1, 20)):
            number = 7 * i + rng.choice((FIRST, 2 * FIRST))
            end = rng.choice(("", "\n\u20ac \U0001f986", ', "so"'))
            text = f"[{number}] says {i}{end}"
            rows.append((number, f"2023-01-15 10:{i:02}:00", text, ""))
        package(tmp_path, rows, shape == "csv")
        return path.read_text(encoding="utf-8")

    kept = whole = 0
    numbers = r"\[(\d{19})\] says"
    for mutant, text, found in mutants(path, make):
        known = {*re.findall(numbers, text)}
        whole += len(re.findall(numbers, text))
        for _, message in found:
            assert message.author in (f"discord:{ANN}", None)
            for tag in {*re.findall(numbers, message.text)} & known:
                number = str(message.id)
                assert number == tag or number not in known, f"mutant {mutant}: {message}"
                kept += number == tag
    assert kept > 0.5 * whole  # a hole of 512 bytes costs five of these short messages
