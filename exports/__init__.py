"""What a messenger wrote, as one stream of records. A reader per messenger; the file's content says which one is asked."""

import dataclasses
from pathlib import Path

from config import UserError

DELETED = "Deleted Account"


@dataclasses.dataclass(frozen=True, slots=True)
class Chat:
    """`owner`: the id of whose export it is, None where the file doesn't say. `id` is unique together with `type`."""

    id: str
    type: str  # Telegram's names: personal_chat, private_group, public_supergroup, bot_chat, saved_messages…
    name: str
    owner: str | None


@dataclasses.dataclass(frozen=True, slots=True)
class Message:
    """`at`: seconds since 1970. `date`: local time as written. `left_out`: why this is nobody's own words ("" when it is)."""

    author: str | None  # an id, never a display name
    name: str | None
    at: int
    date: str
    text: str
    left_out: str = ""


def read(path):
    """Yield (Chat, iterator of its Messages); each chat's messages are to be read before the next chat is asked for.

    Memory grows neither with the export nor with one chat. UserError when the file is no export that we know.
    """
    from exports import telegram

    path = Path(path)
    if path.is_dir():
        path = path / "result.json"
    if not path.is_file():
        raise UserError(
            f"{path}: there is no such file",
            "Give the result.json that Telegram Desktop wrote (Settings > Advanced > Export, format JSON).",
        )
    return telegram.read(path)
