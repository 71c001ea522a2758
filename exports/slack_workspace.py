"""Who and what is in a Slack workspace: the files above its conversations' folders."""

import json
from typing import NamedTuple

from exports.content import as_dict, as_list, without_surrogates
from exports.source import Source

LISTS = {  # the files that name the conversations
    "channels.json": "private_supergroup",
    "groups.json": "private_group",
    "mpims.json": "private_group",
    "dms.json": "personal_chat",
}
SLACKBOT = "USLACKBOT"
MIN_DMS = 3  # so many conversations of two that share one person tell who exported them


class Workspace(NamedTuple):
    names: dict[str, str]  # by user
    bots: set[str]
    conversations: dict[str, tuple[str, str, list[str]]]  # by folder: id, type, members
    channel_names: dict[str, str]  # by id
    owner: str | None


def read_workspace(source: Source) -> Workspace:
    names: dict[str, str] = {}
    bots, conversations, channel_names = {SLACKBOT}, {}, {}
    pairs: list[set[str]] = []
    # The second is of an Enterprise Grid: all of the organization's people.
    for user in read_list(source, "users.json") + read_list(source, "org_users.json"):
        number = str(user.get("id"))
        names.setdefault(number, name_of(user) or number)
        if user.get("is_bot"):
            bots.add(number)
    for file, chat_type in LISTS.items():
        for raw in read_list(source, file):
            number = str(raw.get("id"))
            members = [str(member) for member in as_list(raw.get("members"))]
            folder = str(raw.get("name") or number)
            conversations[folder] = (number, chat_type, members)
            channel_names[number] = without_surrogates(folder)
            if chat_type == "personal_chat" and len({*members}) == 2:
                pairs.append({*members})
    return Workspace(names, bots, conversations, channel_names, find_owner(pairs))


def read_list(source: Source, name: str) -> list[dict]:
    """Read one of the workspace's own files, which stand above the conversations' folders."""
    try:
        values = as_list(json.loads(source.above(name) or "[]"))
    except (ValueError, RecursionError):
        return []
    return [value for value in values if isinstance(value, dict)]


def find_owner(pairs: list[set[str]]) -> str | None:
    """Return who is in all conversations of two: these are in an export for one of them alone."""
    common = set.intersection(*pairs) if len(pairs) >= MIN_DMS else set()
    return f"slack:{common.pop()}" if len(common) == 1 else None


def name_of(user: dict) -> str | None:
    """Return the name that people see: the display name, where one is set."""
    profile = as_dict(user.get("profile"))
    shown = profile.get("display_name") or user.get("display_name")
    name = shown or profile.get("real_name") or user.get("real_name") or user.get("name")
    return without_surrogates(str(name)) if name else None
