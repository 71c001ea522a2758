"""Slack: the export of a workspace, a folder for each conversation with a file for each day."""

import collections
import html
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import PurePath

from exports import Chat, Message, Reason, iso_time, local_time, make_message
from exports.content import as_dict, as_text, file_mark
from exports.repair import unique_keys
from exports.slack_workspace import Workspace, name_of, read_workspace
from exports.source import Source

NUM_PASSES = 1
SAME_IDS = True
# A message of a day's file; its keys stand in any order.
MESSAGE = re.compile(r'\[\s*\{.*"type"\s*:\s*"message"', re.DOTALL)
TIME = re.compile(r"\d{9,10}\.\d{6}", re.ASCII)
USER = re.compile(r"[A-Z0-9]{2,20}", re.ASCII)
OWN_WORDS = (None, "", "thread_broadcast", "me_message", "file_share")
# <@U1>, <#C1|general>, <!here>, <!date^…|text>, <https://…|label>: what Slack writes of these. A <
# that somebody types is &lt;.
MARKUP = re.compile(r"<([@#!]?)([^<>|]*)(?:\|([^<>]*))?>")
DAMAGED_DAY = "days of a Slack conversation that aren't valid JSON, left out"


def can_read(head: str) -> bool:
    return bool(MESSAGE.match(head.removeprefix("\ufeff"))) and bool(re.search(r'"ts"\s*:', head))


def group(sources: list[Source]) -> list[list[Source]]:
    """Put the days of a conversation together, and read once who is in the workspace."""
    folders: dict[PurePath, list[Source]] = collections.defaultdict(list)
    workspaces: dict[PurePath, Workspace] = {}
    for source in sources:
        folders[source.path.parent].append(source)
    for folder, days in folders.items():
        days.sort(key=lambda day: day.path.name)
        if folder.parent not in workspaces:
            workspaces[folder.parent] = read_workspace(days[0])
        days[0].known = workspaces[folder.parent]
    return list(folders.values())


def read(source: Source, repairs: collections.Counter) -> Iterator[tuple[Chat, Iterator[Message]]]:
    """See `exports`. Memory holds a day of a conversation, and who is in the workspace."""
    workspace: Workspace = source.known
    folder = source.path.parent.name or "Slack"
    number, chat_type, members = workspace.conversations.get(folder, (folder, "unknown", []))
    name = folder
    if chat_type == "personal_chat":
        others = [member for member in members if f"slack:{member}" != workspace.owner]
        name = ", ".join(workspace.names.get(member, member) for member in others) or folder
    chat = Chat(f"slack:{number}", number, chat_type, name, workspace.owner)
    days = (messages(day, workspace, repairs) for day in source.parts)
    yield chat, itertools.chain.from_iterable(days)


def messages(day: Source, workspace: Workspace, repairs: collections.Counter) -> Iterator[Message]:
    """Yield the messages of a day, in order. A damaged day is left out: keys have no order."""
    try:
        text = "".join(day.text(repairs)).removeprefix("\ufeff")
        values = json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError):
        repairs[DAMAGED_DAY] += 1
        return
    made = [read_message(value, workspace) for value in values if isinstance(value, dict)]
    yield from sorted(made, key=lambda message: (message.at, message.id or 0))


def read_message(raw: dict, workspace: Workspace) -> Message:
    get = raw.get
    user, subtype, ts = as_text(get("user")), get("subtype"), str(get("ts"))
    is_person, timed = bool(USER.fullmatch(user)), bool(TIME.fullmatch(ts))
    at = int(ts.partition(".")[0]) if timed else 0
    text, left_out = "", ""
    if get("bot_id") or subtype == "bot_message" or user in workspace.bots:
        left_out = Reason.BOT
    elif subtype == "tombstone":
        left_out = Reason.DELETED
    elif subtype not in OWN_WORDS or get("type") != "message":
        left_out = Reason.SERVICE
    elif not is_person or not timed:
        left_out = Reason.NO_AUTHOR
    else:
        text = clean_text(as_text(get("text")), workspace)
        text = text or files_mark(get("files") or get("file"))
        left_out = "" if text else Reason.NO_TEXT
    name = workspace.names.get(user) or name_of(as_dict(get("user_profile")))
    number = int(ts.replace(".", "")) if timed else None
    date = local_time(at) if timed else iso_time(at)
    author = f"slack:{user}" if is_person else None
    return make_message((number, author, name or author and user, at, date, text, left_out))


def clean_text(written: str, workspace: Workspace) -> str:
    """Write mentions, links and entities as people see them."""

    def shown(match: re.Match) -> str:
        sign, target, label = match.groups()
        if sign == "@":
            return "@" + (label or workspace.names.get(target, target))
        if sign == "#":
            return "#" + (label or workspace.channel_names.get(target, target))
        if sign == "!":
            return label or "@" + target.partition("^")[0]
        return label or target.removeprefix("mailto:")

    return html.unescape(MARKUP.sub(shown, written)).strip()


def files_mark(files: object) -> str:
    file = files[0] if isinstance(files, list) and files else files
    if not isinstance(file, dict):
        return ""
    if file.get("subtype") == "slack_audio":
        return "<voice>"
    return file_mark(file.get("name"), file.get("mimetype"))
