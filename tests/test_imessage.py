"""Messages' database. Every database here is invented, by the tables that the real one has."""

import collections
import os
import plistlib
import random
import shutil
import sqlite3
import struct
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_damage import MUTANTS

import exports
from exports import Reason, imessage

EPOCH = 978_307_200
AT = 1_700_000_000
SCHEMA = """
CREATE TABLE handle (ROWID INTEGER PRIMARY KEY, id TEXT, service TEXT);
CREATE TABLE chat (ROWID INTEGER PRIMARY KEY, guid TEXT, style INTEGER, chat_identifier TEXT, display_name TEXT);
CREATE TABLE message (ROWID INTEGER PRIMARY KEY, guid TEXT, text TEXT, attributedBody BLOB, handle_id INTEGER,
  date INTEGER, is_from_me INTEGER, item_type INTEGER, associated_message_type INTEGER, is_audio_message INTEGER,
  date_edited INTEGER, date_retracted INTEGER, message_summary_info BLOB);
CREATE TABLE chat_message_join (chat_id INTEGER, message_id INTEGER, PRIMARY KEY (chat_id, message_id));
CREATE TABLE attachment (ROWID INTEGER PRIMARY KEY, mime_type TEXT, transfer_name TEXT);
CREATE TABLE message_attachment_join (message_id INTEGER, attachment_id INTEGER);
"""
OLD_SCHEMA = SCHEMA.replace("attributedBody BLOB, ", "").replace(
    "item_type INTEGER, associated_message_type INTEGER, is_audio_message INTEGER,\n"
    "  date_edited INTEGER, date_retracted INTEGER, message_summary_info BLOB",
    "service TEXT",
)


def typedstream(text, mutable=False):
    """An NSAttributedString as NSArchiver writes it, with one attribute."""
    data = text.encode()
    size = len(data)
    length = bytes([size & 0x7F])
    if size > 0x7F:
        length = b"\x81" + struct.pack("<H", size & 0xFFFF)
    if size > 0xFFFF:
        length = b"\x82" + struct.pack("<I", size)
    string = b"\x84\x84\x84\x08NSString\x01\x94\x84\x01+"
    first, number = b"\x84\x84\x84\x12NSAttributedString\x00\x84\x84\x08NSObject\x00\x85\x92", 0
    if mutable:
        string = b"\x84\x84\x84\x0fNSMutableString\x01\x84\x84\x08NSString\x01\x95\x84\x01+"
        first = (
            b"\x84\x84\x84\x19NSMutableAttributedString\x00\x84\x84\x12NSAttributedString\x00"
            b"\x84\x84\x08NSObject\x00\x85\x92"
        )
        number = 1
    string = string.replace(b"\x94", bytes([0x94 + number])).replace(b"\x95", b"\x96")
    return (
        b"\x04\x0bstreamtyped\x81\xe8\x03\x84\x01@" + first + string + length + data + b"\x86"
        b"\x84\x02iI\x01" + (bytes([min(len(text), 100)])) + b"\x86"
    )


def make(path, messages, schema=SCHEMA, chats=(("+4915100", 45, None),), handles=("+4915100",)):
    """A database; a message is a dict of columns, with `chat` (a row, default 1)."""
    path.unlink(missing_ok=True)
    database = sqlite3.connect(path)
    database.executescript(schema)
    rows = [(i, who, "iMessage") for i, who in enumerate(handles, 1)]
    database.executemany("INSERT INTO handle VALUES (?, ?, ?)", rows)
    for i, (identifier, style, name) in enumerate(chats, 1):
        row = (i, f"any;-;{identifier}", style, identifier, name)
        database.execute("INSERT INTO chat VALUES (?, ?, ?, ?, ?)", row)
    for i, message in enumerate(messages, 1):
        message = {"guid": f"guid {i}", "date": (AT - EPOCH + i) * 10**9, "is_from_me": 0} | message
        chat, attachment = message.pop("chat", 1), message.pop("attachment", None)
        names = ", ".join(message)
        marks = ", ".join("?" * len(message))
        query = f"INSERT INTO message (ROWID, {names}) VALUES ({i}, {marks})"
        database.execute(query, [*message.values()])
        database.execute("INSERT INTO chat_message_join VALUES (?, ?)", (chat, i))
        if attachment:
            database.execute("INSERT INTO attachment VALUES (?, ?, ?)", (i, *attachment))
            database.execute("INSERT INTO message_attachment_join VALUES (?, ?)", (i, i))
    database.commit()
    database.close()
    return path


def read(path, repairs=None):
    return [(chat, list(messages)) for chat, messages in exports.read(path, repairs)]


def spoken(path, repairs=None):
    return [
        (m.name, m.text) for _, messages in read(path, repairs) for m in messages if not m.left_out
    ]


def them(said, **more):
    return {"text": said, "handle_id": 1, **more}


@pytest.mark.parametrize("mutable", [False, True])
@pytest.mark.parametrize(
    "text", ["hi", "x" * 127, "x" * 128, "ü" * 20_000, "\U0001f986" * 40_000, "+\x84\x01+"]
)
def test_typedstream_text_is_what_was_archived(text, mutable):
    assert imessage.string_of(typedstream(text, mutable)) == text


def test_typedstream_agrees_with_pytypedstream():
    reference = pytest.importorskip("typedstream", reason="pytypedstream is not installed")
    for text in ("hello", "ü" * 100, "x" * 40_000):
        for mutable in (False, True):
            stream = reference.stream.TypedStreamReader.from_data(typedstream(text, mutable))
            strings = [event for event in stream if isinstance(event, bytes)]
            assert text.encode() in strings


@pytest.mark.parametrize("stream", [None, b"", "text", b"bplist00", typedstream("x" * 300)[:90], 7])
def test_no_text_in_what_is_no_whole_typedstream(stream):
    assert imessage.string_of(stream) == ""


MESSAGES = st.lists(
    st.tuples(
        st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=200)
        .map(lambda text: imessage.OBJECTS.sub("", text).strip())
        .filter(bool),
        st.sampled_from((0, 1, 2)),  # me, Ann, Bob
        st.integers(0, 10_000),
        st.booleans(),  # in attributedBody
    ),
    max_size=20,
)


@settings(max_examples=60, deadline=None)
@given(MESSAGES)
def test_messages_come_back_with_author_order_and_time(tmp_path_factory, written):
    path = tmp_path_factory.getbasetemp() / "chat.db"
    rows = []
    for text, who, second, archived in written:
        row = {
            "handle_id": who,
            "is_from_me": int(not who),
            "date": (AT - EPOCH + second) * 10**9 + 5,
        }
        rows.append(row | ({"attributedBody": typedstream(text)} if archived else {"text": text}))
    make(path, rows, chats=(("chat1", 43, "Us"),), handles=("ann@x.org", "+4915100"))
    names = ("Me", "ann@x.org", "+4915100")
    expected = sorted(
        ((AT + row[2], names[row[1]], row[0]) for row in written), key=lambda row: row[0]
    )
    ((chat, messages),) = read(path)
    assert (chat.name, chat.type, chat.owner) == ("Us", "private_group", imessage.ME)
    assert [(m.at, m.name, m.text) for m in messages] == expected
    assert all(m.date == exports.local_time(m.at) for m in messages)


def test_sms_and_imessage_of_one_person_are_one_chat(tmp_path):
    path = make(
        tmp_path / "chat.db",
        [them("one", chat=1), them("two", chat=2, handle_id=2), {"text": "me", "is_from_me": 1}],
        chats=(("+4915100", 45, None), ("+4915100", 45, None)),
        handles=("+4915100", "+4915100"),
    )
    ((chat, messages),) = read(path)
    assert [m.text for m in messages] == ["one", "two", "me"]
    assert len({m.author for m in messages}) == 2
    assert "4915100" not in chat.id + "".join(m.author for m in messages)


def test_seconds_of_old_versions_and_columns_that_they_lack(tmp_path):
    path = make(tmp_path / "chat.db", [them("old", date=AT - EPOCH)], schema=OLD_SCHEMA)
    ((_, (message,)),) = read(path)
    assert (message.at, message.text, message.name) == (AT, "old", "+4915100")


@pytest.mark.parametrize("date", [-1, 0, 10**12, "soon", None])
def test_a_date_that_is_none_costs_its_message_alone(tmp_path, date):
    path = make(tmp_path / "chat.db", [them("lost", date=date), them("whole")])
    ((_, messages),) = read(path)
    assert {m.left_out or m.text for m in messages} == {Reason.NO_AUTHOR, "whole"}


def test_text_and_names_of_another_type_are_no_traceback(tmp_path):
    messages = [them(b"\x80"), them("whole"), them(None, attributedBody=b"\x80")]
    chats = [(b"\x80", 45, b"\x80")]
    path = make(tmp_path / "chat.db", messages, chats=chats, handles=[b"+4915100"])
    assert spoken(path) == [("+4915100", "whole")]


@pytest.mark.parametrize("kind", [1000, 2000, 2003, 2006, 3000, 3006, 4000])
def test_reactions_are_no_messages(tmp_path, kind):
    path = make(
        tmp_path / "chat.db", [them("hi"), them("Loved “hi”", associated_message_type=kind)]
    )
    assert spoken(path) == [("+4915100", "hi")]


@pytest.mark.parametrize(
    ("more", "text", "left_out"),
    [
        ({"text": "Ann left", "item_type": 3}, "", Reason.SERVICE),
        ({"date_edited": 5}, "", Reason.DELETED),
        ({"date_retracted": 5}, "", Reason.DELETED),
        ({}, "", Reason.NO_TEXT),
        ({"text": "hi", "date": 0}, "", Reason.NO_AUTHOR),
        ({"text": "\ufffc", "attachment": ("image/jpeg", "a.jpg")}, "<photo>", ""),
        ({"attachment": (None, "a.mov")}, "<video>", ""),
        ({"attachment": ("image/gif", "a.gif")}, "<gif>", ""),
        ({"attachment": (None, "x.pluginPayloadAttachment")}, "<file>", ""),
        ({"attachment": ("audio/amr", "a.amr"), "is_audio_message": 1}, "<voice>", ""),
        ({"text": "\ufffclook", "attachment": ("image/png", "a.png")}, "look", ""),
        ({"text": "game", "associated_message_type": 3}, "game", ""),
    ],
)
def test_what_becomes_of_a_message(tmp_path, more, text, left_out):
    ((_, (message,)),) = read(make(tmp_path / "chat.db", [them(None, **more)]))
    assert (message.text, message.left_out) == (text, left_out)


def test_an_edited_message_has_its_latest_text(tmp_path):
    edits = {"ec": {"0": [{"t": typedstream("helo")}, {"t": typedstream("hello")}]}}
    summary = plistlib.dumps(edits, fmt=plistlib.FMT_BINARY)
    path = make(tmp_path / "chat.db", [them(None, date_edited=1, message_summary_info=summary)])
    assert spoken(path) == [("+4915100", "hello")]


@pytest.mark.parametrize(
    "summary", [b"", b"bplist00", b"<plist/>", plistlib.dumps([1], fmt=plistlib.FMT_BINARY), 5]
)
def test_a_damaged_summary_has_no_text(summary):
    assert imessage.edited_text(summary) == ""


def test_a_group_message_without_sender_is_nobodys(tmp_path):
    path = make(tmp_path / "chat.db", [them("hi", handle_id=0)], chats=(("chat1", 43, ""),))
    ((chat, (message,)),) = read(path)
    assert chat.name == "chat1" and message.left_out == Reason.NO_AUTHOR and not message.author


def test_latest_messages_in_the_wal_are_read_and_nothing_is_written(tmp_path):
    path, copy = make(tmp_path / "chat.db", [them("one")]), tmp_path / "copy"
    copy.mkdir()
    database = sqlite3.connect(path)
    database.execute("PRAGMA journal_mode=WAL")
    database.execute(
        "INSERT INTO message (ROWID, guid, text, handle_id, date, is_from_me) VALUES (9, 'x', 'two', 1, 9e17, 0)"
    )
    database.execute("INSERT INTO chat_message_join VALUES (1, 9)")
    database.commit()
    for name in ("chat.db", "chat.db-wal"):
        shutil.copyfile(tmp_path / name, copy / name)
    before = {name: (copy / name).read_bytes() for name in os.listdir(copy)}
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name, data in before.items():
            archive.writestr(name, data)
    expected = [("+4915100", "one"), ("+4915100", "two")]
    assert spoken(copy / "chat.db") == expected
    assert spoken(tmp_path / "x.zip") == expected
    assert {name: (copy / name).read_bytes() for name in os.listdir(copy)} == before
    (copy / "chat.db-wal").unlink()
    assert spoken(copy / "chat.db") == expected[:1]
    assert os.listdir(copy) == ["chat.db"]
    database.close()


def test_an_iphone_backup_is_found_by_content(tmp_path):
    (tmp_path / "3d").mkdir()
    make(tmp_path / "3d" / exports.IPHONE_MESSAGES, [them("hi")])
    assert spoken(tmp_path) == [("+4915100", "hi")]
    assert spoken(tmp_path / "3d" / exports.IPHONE_MESSAGES) == [("+4915100", "hi")]


def test_another_database_is_left_out(tmp_path):
    sqlite3.connect(tmp_path / "x.db").execute("CREATE TABLE x (y)").connection.close()
    repairs = collections.Counter()
    assert read(tmp_path / "x.db", repairs) == [] and repairs[imessage.OTHER_DATABASE] == 1


def test_mutated_databases_have_no_traceback_and_no_wrong_author(tmp_path):
    """Pages that are cut off, emptied or repeated. A single changed byte can't be seen: SQLite has no checksums."""
    tags, rows = ("Me", "ann", "bob"), []
    for i in range(400):
        who = i % 3
        text = f"[{tags[who]}] says {i} " + "x" * (i % 90)
        body = {"attributedBody": typedstream(text)} if i % 2 else {"text": text}
        rows.append({"handle_id": who, "is_from_me": int(not who), **body})
    healthy = make(
        tmp_path / "healthy.db", rows, chats=(("c", 43, "c"),), handles=("ann", "bob")
    ).read_bytes()
    kept = 0
    for number in range(MUTANTS // 4):
        rng, data = random.Random(number), bytearray(healthy)
        at = 4096 * rng.randrange(1, len(data) // 4096)
        kind = rng.choice(("cut", "hole", "noise"))
        if kind == "cut":
            del data[at + rng.randrange(4096) :]
        elif kind == "hole":
            data[at : at + 4096] = bytes(4096)
        else:
            data[at : at + 100] = rng.randbytes(100)
        path = tmp_path / "chat.db"
        path.write_bytes(data)
        for name, text in spoken(path, collections.Counter()):
            assert text.startswith(f"[{name}]"), f"mutant {number}, {kind}: {name}: {text}"
            kept += 1
    assert kept > 400 * (MUTANTS // 4) * 0.4
