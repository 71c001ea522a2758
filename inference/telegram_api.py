"""What the bot needs of Telegram's Bot API, through python-telegram-bot.

The library logs addresses, which hold the token, and updates: it is muted.
"""

import asyncio
import contextlib
import json
import logging
import os
import re
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import cli
from cli import UserError

try:
    from httpx import InvalidURL
    from telegram import Bot, Message, Update, User
    from telegram import error as errors
    from telegram.request import HTTPXRequest
except ImportError as error:
    raise UserError(
        f"--telegram needs {error.name}, which is not installed",
        "pip install -r requirements-extra.txt",
    ) from None

POLL_SECONDS = 30  # that Telegram holds a request for updates until there are some
READ_SECONDS = 30  # for the confirmation of a message: to send one again doubles it
CONNECT_SECONDS = 10
CONNECTIONS = 16  # at a time; further calls wait: 200 at once would be slow, and time out
RETRY_SECONDS = 1.0  # between two tries to reach Telegram, then twice as long, and so on
MAX_RETRY_SECONDS = 30
MAX_MESSAGE = 4096  # UTF-16 units
# A message's field → the mark that training had, as in exports/telegram.py. A GIF is a file too.
MARKS = {
    "voice": "<voice>",
    "video_note": "<video>",
    "video": "<video>",
    "animation": "<gif>",
    "audio": "<audio>",
    "photo": "<photo>",
    "document": "<file>",
    "poll": "<poll>",
    "checklist": "<list>",
    "contact": "<contact>",
    "location": "<location>",
    "venue": "<location>",
    "game": "<game>",
}
REFUSALS = (errors.BadRequest, errors.Forbidden, errors.ChatMigrated)
TelegramError = errors.TelegramError
FAILURES = (TelegramError, KeyError, TypeError)  # the latter: the answer is not the Bot API's
__all__ = ["Api", "Message", "TelegramError", "User", "message_text", "read_token"]


class Api:
    """A bot's account. Calls wait out flood limits and lost connections.

    TELEGRAM_API_URL in the environment: one's own Bot API server.
    """

    def __init__(self, token: str):
        for name in ("telegram", "httpx", "httpcore"):
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
        server = os.environ.get("TELEGRAM_API_URL") or "https://api.telegram.org"
        try:
            request = HTTPXRequest(
                CONNECTIONS, READ_SECONDS, connect_timeout=CONNECT_SECONDS, pool_timeout=None
            )
            self.bot = Bot(token, base_url=f"{server.rstrip('/')}/bot", request=request)
        except (RuntimeError, ValueError, InvalidURL):  # their texts may hold a password
            raise UserError(
                "The proxy in HTTPS_PROXY or ALL_PROXY can't be used",
                'Give it as http://HOST:PORT; socks5://HOST:PORT needs pip install "httpx[socks]".',
            ) from None
        self.trouble = ""  # what keeps us from Telegram

    async def start(self, commands: dict[str, str]) -> None:
        """Log in, and set the menu of commands."""
        await self.request(self.bot.initialize)
        await self.request(lambda: self.bot.set_my_commands(list(commands.items())))

    async def updates(self, offset: int | None) -> list[tuple[int, Message | None]]:
        """Return new updates from this number on, as (number, message); those before are confirmed.

        One that the library can't read has no message: it must not come again at each start.
        """
        updates = await self.post(
            "getUpdates",
            read_seconds=POLL_SECONDS + READ_SECONDS,
            offset=offset,
            timeout=POLL_SECONDS,
            allowed_updates=["message"],
        )
        return [(update["update_id"], self.parse(update)) for update in updates]

    def parse(self, update: dict) -> Message | None:
        """Return the message of an update, None if there is none or it can't be read."""
        try:
            json.dumps(update, ensure_ascii=False).encode()  # half a character can't be written
            return Update.de_json(update, self.bot).message
        except Exception as error:  # a field that is missing, or of a kind yet unknown
            print(f"(a message can't be read: {type(error).__name__})", file=sys.stderr)
            return None

    async def send(self, chat_id: int, text: str) -> None:
        """Send a text, in pieces if it's long. What Telegram refuses is dropped."""
        for piece in split_text(text):
            try:
                await self.post("sendMessage", chat_id=chat_id, text=piece)
            except TelegramError as error:  # for example, the bot is blocked
                print(f"(Telegram refuses a message: {type(error).__name__})", file=sys.stderr)

    async def show_typing(self, chat_id: int) -> None:
        """Show "typing…" for five seconds, or until the next message."""
        with contextlib.suppress(*FAILURES):
            await self.bot.send_chat_action(chat_id, "typing")

    async def post(self, method: str, read_seconds: float = READ_SECONDS, **fields: Any) -> Any:
        """Call a method of the Bot API; return its result, not parsed.

        The library's send_message raises when it can't parse the result, though it has sent.
        """
        return await self.request(lambda: self.bot._post(method, fields, read_timeout=read_seconds))

    async def request(self, call: Callable[[], Awaitable[Any]]) -> Any:
        """Call until Telegram answers. TelegramError when it refuses, UserError for a bad token."""
        wait = RETRY_SECONDS
        while True:
            try:
                result = await call()
                self.report("")
                return result
            except errors.RetryAfter as error:
                # Its public form is an int or a timedelta, by an environment variable
                await asyncio.sleep(error._retry_after.total_seconds())
                continue
            except errors.InvalidToken:
                raise UserError(
                    "Telegram doesn't know this bot's token", "@BotFather shows it: /mybots."
                ) from None
            except REFUSALS:
                raise
            except errors.Conflict:
                self.report("another program reads this bot's messages")
            except FAILURES:
                self.report("no connection to Telegram")
            await asyncio.sleep(wait)
            wait = min(2 * wait, MAX_RETRY_SECONDS)

    def report(self, trouble: str) -> None:
        """Print what keeps us from Telegram, once."""
        if trouble != self.trouble:
            text = f"{trouble}; trying again" if trouble else "connected to Telegram again"
            print(f"({text})", file=sys.stderr)
        self.trouble = trouble


def read_token(path: str | None) -> str:
    """Return the bot's token, from --token-file or the environment."""
    if path and os.name == "posix" and Path(path).stat().st_mode & 0o077:
        raise UserError(f"--token-file {path} can be read by others", f"chmod 600 {path}")
    token = (cli.read_text(path) if path else os.environ.get("TELEGRAM_TOKEN", "")).strip()
    if not re.fullmatch(r"\d+:[\w-]+", token):
        place = path or "the environment variable TELEGRAM_TOKEN"
        raise UserError(
            f"--telegram needs the bot's token in {place}",
            "@BotFather gives you one, such as 123456:ABC-DEF1234 (docs/TELEGRAM.md).",
        )
    return token


def message_text(message: Message) -> str:
    """Return a message's text or caption; else what stands for it in training, or ""."""
    text = (message.text or message.caption or "").strip()
    if message.sticker:
        text = message.sticker.emoji or "<sticker>"
    return text or next((mark for field, mark in MARKS.items() if getattr(message, field)), "")


def split_text(text: str) -> Iterator[str]:
    """Yield pieces that fit a message, cut at the end of a line or a word if there is one."""
    while text:
        units = text.encode("utf-16-le", "replace")
        head = units[: 2 * MAX_MESSAGE].decode("utf-16-le", "ignore")  # no half of an emoji
        end = len(head)
        if len(units) > 2 * MAX_MESSAGE:
            end = max(head.rfind("\n"), 0) or max(head.rfind(" "), 0) or end
        yield text[:end]
        text = text[end:].lstrip()
