"""iMessage: Messages' own database, `chat.db` of a Mac or `sms.db` in an iPhone's backup."""

import collections
import hashlib
import re
import sqlite3
from collections.abc import Iterator

from exports import Chat, Message, Reason, local_time, make_message, read_each
from exports.content import as_text, file_mark, hash_name
from exports.database import DAMAGED, open_database, read_rows
from exports.source import Source
from exports.typedstream import edited_text, string_of

NUM_PASSES = 1
SAME_IDS = True
ME = "imessage:me"  # my id: of messages with is_from_me
HEADER = "SQLite format 3\0"
TABLES = {"message", "handle", "chat", "chat_message_join"}
GROUP_STYLE = 43  # chat.style; 45 is a chat of two
APPLE_EPOCH = 978_307_200  # 2001-01-01 in seconds since 1970
NANOSECONDS = 10**12  # a larger date is in nanoseconds (since 2017), a smaller one in seconds
OBJECTS = re.compile("[\ufffc\ufffd]")  # stand for attachments in a message's text
# Columns that old versions lack are read as NULL.
COLUMNS = (
    "ROWID guid date is_from_me handle_id text attributedBody item_type is_audio_message"
    " date_edited date_retracted message_summary_info"
).split()
# Reactions, stickers on a message and votes are rows of their own.
NO_REACTION = "COALESCE(associated_message_type, 0) NOT BETWEEN 1000 AND 4999"
OTHER_DATABASE = "SQLite databases that aren't Messages' own, left out"


def can_read(head: str) -> bool:
    return head.startswith(HEADER)


def read(source: Source, repairs: collections.Counter) -> Iterator[tuple[Chat, Iterator[Message]]]:
    """See `exports`. Nothing is written beside the database, and no lock is taken on it."""
    with open_database(source, repairs) as database:
        try:
            tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master")}
            chats = list_chats(database) if tables >= TABLES else {}
            people = "SELECT ROWID, CAST(id AS TEXT) FROM handle"
            handles = dict(database.execute(people)) if chats else {}
        except sqlite3.Error:
            repairs[DAMAGED] += 1
            return
        if not tables >= TABLES:
            repairs[OTHER_DATABASE] += 1
        for chat, rowids in chats.values():
            yield chat, messages(database, chat, rowids, handles, repairs)
    source.progress(source.size)


def list_chats(database: sqlite3.Connection) -> dict[tuple, tuple[Chat, list[int]]]:
    """Return the chats with their rows: SMS and iMessage with one person are one chat."""
    chats: dict[tuple, tuple[Chat, list[int]]] = {}
    query = "SELECT ROWID, style, chat_identifier, display_name FROM chat ORDER BY ROWID"
    for rowid, style, identifier, display_name in database.execute(query):
        identifier = str(identifier or rowid)
        chat_type = "private_group" if style == GROUP_STYLE else "personal_chat"
        name = str(display_name or identifier)
        chat = Chat(f"imessage:{identifier}", make_id(identifier), chat_type, name, ME)
        chat, rowids = chats.setdefault((chat_type, identifier), (chat, []))
        rowids.append(rowid)
    return chats


def make_id(handle: str) -> str:
    return f"imessage:{hash_name(handle)}"


def messages(
    database: sqlite3.Connection,
    chat: Chat,
    rowids: list[int],
    handles: dict[int, str],
    repairs: collections.Counter,
) -> Iterator[Message]:
    """Yield the messages of a chat by date; of a damaged database those before the damage."""
    present = {row["name"] for row in database.execute("PRAGMA table_info(message)")} | {"ROWID"}
    columns = [f"{name if name in present else 'NULL'} AS {name}" for name in COLUMNS]
    no_reaction = NO_REACTION if "associated_message_type" in present else "TRUE"
    select = f"SELECT {', '.join(columns)} FROM message WHERE {no_reaction} AND ROWID"
    places = ", ".join(map(str, rowids))
    members = f"SELECT message_id FROM chat_message_join WHERE chat_id IN ({places})"
    other = chat.name if chat.type == "personal_chat" else None

    def read_row(row: sqlite3.Row, last: int) -> Message:
        name = "Me" if row["is_from_me"] else handles.get(row["handle_id"], other)
        return read_message(database, row, name, last)

    return read_each(read_rows(database, select, members, "date, ROWID", repairs), read_row)


def read_message(
    database: sqlite3.Connection, row: sqlite3.Row, name: str | None, last: int
) -> Message:
    """Make a Message of a row; without a date it is as late as the one before, `last`."""
    at, text, left_out = read_time(row["date"]), "", ""
    if row["item_type"]:  # joins, names of groups, shared places, calls
        left_out = Reason.SERVICE
    elif at is None or name is None:
        left_out = Reason.NO_AUTHOR
    else:
        text = as_text(row["text"])  # damage makes it a number or bytes
        text = text or string_of(row["attributedBody"]) or edited_text(row["message_summary_info"])
        text = OBJECTS.sub("", text).strip() or attachment_mark(database, row)
        if not text:
            gone = row["date_edited"] or row["date_retracted"]
            left_out = Reason.DELETED if gone else Reason.NO_TEXT
    author = ME if row["is_from_me"] else name and make_id(name)
    at = last if at is None else at
    # A row has another number on another device; its guid is the same.
    guid = str(row["guid"]).encode()
    number = int.from_bytes(hashlib.blake2b(guid, digest_size=7).digest())
    return make_message((number, author, name, at, local_time(at), text, left_out))


def read_time(date: object) -> int | None:
    """Return seconds since 1970 of a date since 2001, None of what isn't one."""
    if not isinstance(date, int) or date <= 0:
        return None
    at = APPLE_EPOCH + (date // 10**9 if date > NANOSECONDS else date)
    return at if at < 1 << 37 else None  # the year 6325


def attachment_mark(database: sqlite3.Connection, message: sqlite3.Row) -> str:
    """Return what stands for a message's first attachment; "" where it has none."""
    query = (
        "SELECT a.mime_type, a.transfer_name FROM message_attachment_join j"
        " JOIN attachment a ON a.ROWID = j.attachment_id WHERE j.message_id = ? LIMIT 1"
    )
    try:
        found = database.execute(query, (message["ROWID"],)).fetchone()
    except sqlite3.OperationalError:  # a database without these tables
        return ""
    if not found:
        return ""
    if message["is_audio_message"]:
        return "<voice>"
    return file_mark(found["transfer_name"], found["mime_type"])
