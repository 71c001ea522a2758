"""Discord's own data package: `messages/c123/messages.json`, until 2024 `messages.csv`.

It has my messages alone, so no session comes of it. It tells who I am in DiscordChatExporter's
files, and adds to these what I wrote in the same channels.
"""

import collections
import csv
import io
import re
from collections.abc import Iterable, Iterator

from exports import Chat, Message, Reason, discord_fields, local_time, make_message
from exports.content import as_text, parse_object, without_surrogates
from exports.repair import read_messages
from exports.source import Source, full_lines

NUM_PASSES = 1
SAME_IDS = True
# Where a message begins. The array of them has no key.
BEGINS = re.compile(r'\{\s*"ID"\s*:\s*"?\d|(?P<type>(?!))')
HEAD = re.compile(r'\s*(?:\[\s*\{\s*"ID"\s*:|ID,Timestamp,Contents)')
ROW = re.compile(r"\d{15,20},\d{4}-\d\d-\d\d ")  # how a row of CSV begins
ONLY_MINE = "files of Discord's data package: your own messages alone, nothing that they answer"


def can_read(head: str) -> bool:
    return bool(HEAD.match(head.removeprefix("\ufeff")))


def read(source: Source, repairs: collections.Counter) -> Iterator[tuple[Chat, Iterator[Message]]]:
    """See `exports`. Everything in it is by the account's owner."""
    repairs[ONLY_MINE] += 1
    user = parse_object(source.above("account/user.json") or source.above("Account/user.json"))
    me = discord_fields.author_id(user) or "discord:me"
    name = as_text(user.get("global_name") or user.get("username")) or None
    yield read_channel(source, me), messages(source, me, name, repairs)


def read_channel(source: Source, owner: str) -> Chat:
    """Make the Chat of `messages/c123/` of the files beside and above its messages."""
    channel = parse_object(source.beside("channel.json"))
    number = str(channel.get("id") or source.path.parent.name.removeprefix("c"))
    name = parse_object(source.above("index.json")).get(number) or channel.get("name") or number
    name, kind = without_surrogates(str(name)), discord_fields.chat_type(channel)
    return Chat(f"discord:c{number}", number, kind, name, owner)


def messages(
    source: Source, me: str, name: str | None, repairs: collections.Counter
) -> Iterator[Message]:
    if source.head().lstrip("\ufeff \r\n").startswith("["):
        rows: Iterable[dict] = read_messages(source, BEGINS, repairs)
    else:
        rows = csv_rows(full_lines(source, repairs))
    last = 0
    for row in rows:
        get = row.get
        last, date = discord_fields.read_time(get("Timestamp"), last)
        identity = discord_fields.snowflake(get("ID"))
        text = discord_fields.clean_text(get("Contents"))
        if not text and (urls := str(get("Attachments") or "").split()):
            text = discord_fields.attachment_mark(urls[0].partition("?")[0])
        left_out = "" if text else Reason.NO_TEXT
        if not date or identity is None:
            text, left_out = "", Reason.DAMAGED
        # The package has UTC alone.
        yield make_message((identity, me, name, last, local_time(last), text, left_out))


def csv_rows(lines: Iterator[str]) -> Iterator[dict]:
    """Yield the rows, empty where one is damaged. A lost quote costs the row that it was in."""
    names = next(csv.reader([next(lines, "").removeprefix("\ufeff")]), [])
    row = ""
    for line in lines:
        if row and ROW.match(line):
            yield parse_row(names, row)
            row = ""
        row += line
    if row:
        yield parse_row(names, row)


def parse_row(names: list[str], text: str) -> dict:
    try:
        [cells] = csv.reader(io.StringIO(text, newline=""), strict=True)
    except (csv.Error, ValueError):
        return {}
    # What follows a hole in the file belongs to something else.
    return dict(zip(names, cells)) if len(cells) == len(names) and "\0" not in text else {}
