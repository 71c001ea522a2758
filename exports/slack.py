"""Slack: the export of a workspace, a folder for each conversation with a file for each day."""

import collections
import html
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import PurePath
from typing import NamedTuple

from exports import Chat, Message, Reason, iso_time, local_time, make_message, mime_mark
from exports.source import Source
from exports.telegram import without_surrogates

NUM_PASSES = 1
SAME_IDS = True
LISTS = {  # the files that name the conversations
    "channels.json": "private_supergroup",
    "groups.json": "private_group",
    "mpims.json": "private_group",
    "dms.json": "personal_chat",
}
# A message of a day's file; its keys stand in any order.
MESSAGE = re.compile(r'\[\s*\{.*"type"\s*:\s*"message"', re.DOTALL)
TIME = re.compile(r"\d{9,10}\.\d{6}", re.ASCII)
USER = re.compile(r"[A-Z0-9]{2,20}", re.ASCII)
OWN_WORDS = (None, "", "thread_broadcast", "me_message", "file_share")
SLACKBOT = "USLACKBOT"
# <@U1>, <#C1|general>, <!here>, <!date^…|text>, <https://…|label>: what Slack writes of these. A <
# that somebody types is &lt;.
MARKUP = re.compile(r"<([@#!]?)([^<>|]*)(?:\|([^<>]*))?>")
MIN_DMS = 3  # so many conversations of two that share one person tell who exported them
DAMAGED_DAY = "days of a Slack conversation that aren't valid JSON, left out"


class Workspace(NamedTuple):
    names: dict[str, str]  # by user
    bots: set[str]
    conversations: dict[str, tuple[str, str, list[str]]]  # by folder: id, type, members
    channel_names: dict[str, str]  # by id
    owner: str | None


def can_read(head: str) -> bool:
    return bool(MESSAGE.match(head.removeprefix("\ufeff"))) and bool(re.search(r'"ts"\s*:', head))


def group(sources: list[Source]) -> list[list[Source]]:
    """Put the days of a conversation together."""
    folders: dict[PurePath, list[Source]] = collections.defaultdict(list)
    for source in sources:
        folders[source.path.parent].append(source)
    return [sorted(days, key=lambda day: day.path.name) for days in folders.values()]


def read(source: Source, repairs: collections.Counter) -> Iterator[tuple[Chat, Iterator[Message]]]:
    """See `exports`. Memory holds a day of a conversation, and who is in the workspace."""
    workspace = read_workspace(source)
    folder = source.path.parent.name or "Slack"
    number, chat_type, members = workspace.conversations.get(folder, (folder, "unknown", []))
    name = folder
    if chat_type == "personal_chat":
        others = [member for member in members if f"slack:{member}" != workspace.owner]
        name = ", ".join(workspace.names.get(member, member) for member in others) or folder
    chat = Chat(f"slack:{number}", number, chat_type, name, workspace.owner)
    days = (messages(day, workspace, repairs) for day in source.parts)
    yield chat, itertools.chain.from_iterable(days)


def read_list(source: Source, name: str) -> list[dict]:
    """Read one of the workspace's own files, which stand above the conversations' folders."""
    try:
        values = json.loads(source.above(name) or "[]")
    except (ValueError, RecursionError):
        return []
    values = values if isinstance(values, list) else []
    return [value for value in values if isinstance(value, dict)]


def read_workspace(source: Source) -> Workspace:
    names, bots, conversations, channel_names = {}, {SLACKBOT}, {}, {}
    pairs: list[set[str]] = []
    for user in read_list(source, "users.json") or read_list(source, "org_users.json"):
        number = str(user.get("id"))
        names[number] = name_of(user) or number
        if user.get("is_bot"):
            bots.add(number)
    for file, chat_type in LISTS.items():
        for raw in read_list(source, file):
            number = str(raw.get("id"))
            members = raw.get("members")
            members = [str(member) for member in members] if isinstance(members, list) else []
            folder = str(raw.get("name") or number)
            conversations[folder] = (number, chat_type, members)
            channel_names[number] = folder
            if chat_type == "personal_chat" and len({*members}) == 2:
                pairs.append({*members})
    return Workspace(names, bots, conversations, channel_names, find_owner(pairs))


def find_owner(pairs: list[set[str]]) -> str | None:
    """Return who is in all conversations of two: these are in an export for one of them alone."""
    common = set.intersection(*pairs) if len(pairs) >= MIN_DMS else set()
    return f"slack:{common.pop()}" if len(common) == 1 else None


def name_of(user: dict) -> str | None:
    """Return the name that people see: the display name, where one is set."""
    profile = user.get("profile")
    profile = profile if isinstance(profile, dict) else {}
    shown = profile.get("display_name") or user.get("display_name")
    name = shown or profile.get("real_name") or user.get("real_name") or user.get("name")
    return without_surrogates(str(name)) if name else None


def messages(day: Source, workspace: Workspace, repairs: collections.Counter) -> Iterator[Message]:
    """Yield the messages of a day, in order. A damaged day is left out: keys have no order."""
    try:
        text = "".join(day.text(repairs)).removeprefix("\ufeff")
        values = json.loads(text, object_pairs_hook=whole_object)
    except (ValueError, RecursionError):
        repairs[DAMAGED_DAY] += 1
        return
    made = [read_message(value, workspace) for value in values if isinstance(value, dict)]
    yield from sorted(made, key=lambda message: (message.at, message.id or 0))


def whole_object(pairs: list[tuple[str, object]]) -> dict:
    """Refuse a key written twice: two messages whose border is lost."""
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError
    return made


def read_message(raw: dict, workspace: Workspace) -> Message:
    get = raw.get
    user, subtype, ts = str(get("user")), get("subtype"), str(get("ts"))
    is_person = bool(USER.fullmatch(user)) and isinstance(get("user"), str)
    timed = bool(TIME.fullmatch(ts))
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
        text = clean_text(get("text"), workspace) or files_mark(get("files") or get("file"))
        left_out = "" if text else Reason.NO_TEXT
    name = workspace.names.get(user)
    profile = get("user_profile")
    if not name and isinstance(profile, dict):
        name = name_of(profile)
    number = int(ts.replace(".", "")) if timed else None
    date = local_time(at) if timed else iso_time(at)
    author = f"slack:{user}" if is_person else None
    return make_message((number, author, name or author and user, at, date, text, left_out))


def clean_text(written: object, workspace: Workspace) -> str:
    """Write mentions, links and entities as people see them."""
    if not isinstance(written, str):
        return ""

    def shown(match: re.Match) -> str:
        sign, target, label = match.groups()
        if sign == "@":
            return "@" + (label or workspace.names.get(target, target))
        if sign == "#":
            return "#" + (label or workspace.channel_names.get(target, target))
        if sign == "!":
            return label or "@" + target.partition("^")[0]
        return label or target.removeprefix("mailto:")

    return html.unescape(without_surrogates(MARKUP.sub(shown, written))).strip()


def files_mark(files: object) -> str:
    file = files[0] if isinstance(files, list) and files else files
    if not isinstance(file, dict):
        return ""
    if file.get("subtype") == "slack_audio":
        return "<voice>"
    return mime_mark(file.get("mimetype"), file.get("name"))
