"""The files of an export of Facebook's or Instagram's: what belongs together, and whose it is."""

import collections
import contextlib
import json
import re
from pathlib import PurePath

from exports import Chat
from exports.content import as_list, hash_name, value_behind, without_surrogates
from exports.source import Source

TITLE = re.compile(r'"(title|thread_path|threadName)"\s*:\s*("(?:[^"\\]|\\.)*+")')
PROFILES = (  # where the owner's name is, of Facebook and of Instagram, in old exports and new
    "personal_information/profile_information/profile_information.json",
    "profile_information/profile_information.json",
    "personal_information/personal_information/personal_information.json",
    "personal_information/personal_information.json",
)
TAIL = 1 << 14  # bytes at the end of a file in which its title stands


def group_chats(sources: list[Source]) -> list[list[Source]]:
    """Put the files of a chat together, newest first, and find whose export it is.

    In that order no part overlaps another in time, so MessageStore merges without much memory.
    """
    chats: dict[PurePath, list[Source]] = collections.defaultdict(list)
    roots: dict[str, list[Source]] = collections.defaultdict(list)
    for source in sources:
        split = re.fullmatch(r"message_\d+\.json", source.path.name)
        chats[source.path.parent if split else source.path].append(source)
    for parts in chats.values():
        parts.sort(key=file_number)
        # A folder may hold several exports, each with its own folder `messages`.
        roots[parts[0].path.as_posix().rpartition("/messages/")[0]].append(parts[0])
    for firsts in roots.values():
        owner = find_owner(firsts)
        for source in firsts:
            source.known = owner
    return list(chats.values())


def file_number(source: Source) -> int:
    digits = re.findall(r"\d{1,9}", source.path.stem)
    return int(digits[-1]) if digits else 0


def find_owner(chats: list[Source]) -> str | None:
    """Return the name of the account's owner: a participant whom the profile names.

    Without a profile it is the only one who is in all chats of two people, if there are several.
    """
    people = [set(participants(chat.head())) for chat in chats]
    mine = profile_names(chats[0]) & set().union(*people)
    pairs = [names for names in people if len(names) == 2]
    if not mine and len(pairs) > 1:
        mine = set.intersection(*pairs)
    return mine.pop() if len(mine) == 1 else None


def profile_names(source: Source) -> set[str]:
    """Return what may be the owner's name, by the profile in a folder above.

    On Instagram that is all that it says: its labels are in the account's language.
    """
    for path in PROFILES:
        try:
            profile = json.loads(source.above(path) or "")
            if "profile_user" in profile:
                fields = profile["profile_user"][0]["string_map_data"].values()
                return {undo_mojibake(field.get("value", "")) for field in fields}
            profile = profile.get("profile_v2") or profile.get("profile")
            return {undo_mojibake(profile["name"]["full_name"])}
        except (ValueError, LookupError, TypeError, AttributeError):
            continue
    return set()


def participants(head: str) -> list[str]:
    """Return the names of a chat's people, from the beginning of its file."""
    people = as_list(value_behind(head, "participants"))
    names = [person.get("name") if isinstance(person, dict) else person for person in people]
    return [undo_mojibake(name) for name in names if isinstance(name, str)]


def read_chat(source: Source) -> Chat:
    """Make the Chat of its files from what stands before and behind the messages."""
    head, end = source.head(), tail(min(source.parts, key=lambda part: part.size))
    people = participants(head)
    fields: dict[str, str] = {}
    for key, value in TITLE.findall(end) + TITLE.findall(head):
        with contextlib.suppress(ValueError):
            fields.setdefault(key, undo_mojibake(json.loads(value, strict=False)))
    secure = re.sub(r"_\d+$", "", fields.get("threadName", ""))
    name = fields.get("title") or secure or next(iter(people), "Deleted Account")
    folder = source.path.parent.name if source.parts != [source] else source.path.stem
    thread = fields.get("thread_path") or fields.get("threadName") or folder
    thread = thread.rpartition("/")[2]  # without the folder, which changes: it may be archived
    chat_id = hash_name(thread)
    owner = source.known
    if owner is None and len(people) == 2 and people.count(name) == 1:
        owner = people[1 - people.index(name)]  # two people's chat is called as the other one is
    kind = "private_group" if len(people) > 2 else "personal_chat"
    owner = f"messenger:{owner}" if owner else None
    return Chat(f"messenger:{chat_id}", chat_id, kind, name, owner)


def tail(source: Source) -> str:
    end = b""
    for block in source.blocks(collections.Counter()):
        end = block if len(block) >= TAIL else (end + block)[-TAIL:]
    return end[-TAIL:].decode("utf-8", "replace")


def undo_mojibake(text: str) -> str:
    """Read characters up to U+00FF as the bytes of UTF-8, where they are; else leave the text."""
    if text.isascii():
        return text
    try:
        return text.encode("latin-1").decode()
    except UnicodeError:  # it was never broken, or another tool has mended it
        return without_surrogates(text)
