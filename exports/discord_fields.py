"""What Discord's messages hold, in DiscordChatExporter's files and in Discord's own package."""

import datetime
import re

from exports.content import as_dict, as_list, as_text, file_mark, without_surrogates

MARKUP = re.compile(r"<(?:a?(:\w+:)\d+|@!?(\d+)|[@#]&?\d+|t:-?\d+(?::\w)?)>")
GIF = re.compile(r"https://(?:tenor\.com/view|giphy\.com/gifs|media\.giphy\.com)/\S+$")
CHAT_TYPES = {  # of a channel; numbers in the package until 2023. Others are a server's
    "DirectTextChat": "personal_chat",
    "DirectGroupTextChat": "private_group",
    "DM": "personal_chat",
    "GROUP_DM": "private_group",
    "1": "personal_chat",
    "3": "private_group",
}


def chat_type(channel: dict) -> str:
    return CHAT_TYPES.get(str(channel.get("type")), "private_supergroup")


def author_id(author: dict) -> str | None:
    number = str(author.get("id"))
    return f"discord:{number}" if re.fullmatch(r"\d{1,20}", number) else None


def snowflake(written: object) -> int | None:
    """Return an id of Discord's as a number; None where it isn't one."""
    number = int(written) if re.fullmatch(r"[0-9]{1,19}", written := str(written)) else 0
    return number if 0 < number < 1 << 62 else None


def read_time(written: object, last: int) -> tuple[int, str]:
    """Return (seconds since 1970, local time as written); (`last`, "") of what isn't a time."""
    try:
        time = datetime.datetime.fromisoformat(str(written))
        at = int((time if time.tzinfo else time.replace(tzinfo=datetime.UTC)).timestamp())
    except (ValueError, OverflowError):
        return last, ""
    return (at, time.isoformat()[:19]) if 0 <= at < 1 << 37 else (last, "")


def clean_text(content: object, mentions: object = None) -> str:
    """Write mentions and Discord's own emojis as people see them; those unknown are dropped."""
    content = as_text(content).strip()
    if GIF.match(content):
        return "<gif>"
    if "<" not in content:
        return content
    names = {}
    for person in map(as_dict, as_list(mentions)):
        names[str(person.get("id"))] = f"@{person.get('nickname') or person.get('name')}"
    text = MARKUP.sub(lambda match: match[1] or names.get(match[2], ""), content)
    return without_surrogates(text).strip()


def attachment_mark(name: str) -> str:
    return "<voice>" if name.endswith("voice-message.ogg") else file_mark(name)
