"""A Telegram bot: `python chat.py ckpt/ --telegram`.

It asks Telegram for updates (long polling), so no port is open. Only users on --allow are read.
Each chat has a conversation; all share the model through RequestQueue.

A message joins its chat's turns, and with --history the chat's file, before the next call to
Telegram confirms it; a message that comes twice is known by its id. The file also says whether an
answer is due. So after a crash nothing is lost and nothing answered twice. Without --history a
restart forgets the talks, and what was not answered yet isn't.

Nothing of a chat is printed or logged, nor written without --history.
"""

import asyncio
import contextlib
import datetime
import logging
import os
import re
import sys
import time
import typing
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path

import numpy as np

import cli
import data
from cli import UserError
from inference import generate
from inference.conversation import Conversation, now, reply_seed
from inference.pace import GROUPS, Pace
from inference.request_queue import ReplyRequest, RequestQueue

try:
    import telegram
    from telegram.error import (
        BadRequest,
        Conflict,
        InvalidToken,
        NetworkError,
        RetryAfter,
        TelegramError,
    )
    from telegram.request import HTTPXRequest
except ImportError as error:
    raise UserError(
        f"--telegram needs {error.name}, which is not installed",
        "pip install -r requirements-extra.txt",
    ) from None

POLL_SECONDS = 30  # that Telegram holds a request for updates until there are some
READ_SECONDS = 30  # for the confirmation of a message; repeating one that arrived doubles it
MAX_RETRY_SECONDS = 30  # between two tries to reach Telegram
JOIN_SECONDS = 1.0  # messages that follow one another so soon are answered together, at any pace
TYPING_SECONDS = 4  # Telegram shows "typing…" for five
SESSION_SECONDS = 600  # as data.py's --gap-minutes: after such a silence a new turn begins
MAX_MESSAGE = 4096  # UTF-16 units
MAX_STRANGERS = 1000  # who get a line
STATE = re.compile(r"telegram (-?\d+), message (\d+)(, unanswered)?")
COMMAND = re.compile(r"/([a-z]+)(?:@(\w+))?(?:\s+(.*))?", re.IGNORECASE | re.DOTALL)
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
    "venue": "<location>",
    "location": "<location>",
    "game": "<game>",
}
T = typing.TypeVar("T")
COMMANDS = {
    "retry": "another reply to the last message",
    "undo": "remove the last message and its reply",
    "reset": "forget this conversation",
    "temp": "sampling temperature: /temp 0.7",
}
STRANGER = "Sorry, this bot talks only to people on its list. Your id is {}."


def serve(decoder: generate.Decoder, token: str, me: str, pace: Pace, options) -> None:
    """Run the bot until Ctrl-C. `token`: from `read_token`."""
    for name in ("telegram", "httpx", "httpcore"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)  # addresses hold the token
    os.environ.setdefault("PTB_TIMEDELTA", "1")  # retry_after as the next version has it
    queue = RequestQueue(decoder, me, options, max_queue=float("inf"))
    server = os.environ.get("TELEGRAM_API_URL", "https://api.telegram.org").rstrip("/")
    api = telegram.Bot(
        token, base_url=f"{server}/bot", request=HTTPXRequest(read_timeout=READ_SECONDS)
    )
    asyncio.run(TelegramBot(api, queue, me, pace, options).run())


# --- Flags


def read_token(options) -> str:
    """Return the bot's token, from --token-file or the environment."""
    path = options.token_file
    if path and os.name == "posix" and Path(path).stat().st_mode & 0o077:
        raise UserError(f"--token-file {path} can be read by others", f"chmod 600 {path}")
    token = cli.read_text(path) if path else os.environ.get("TELEGRAM_TOKEN", "")
    token = token.strip()
    if not re.fullmatch(r"\d+:[\w-]+", token):
        place = path or "the environment variable TELEGRAM_TOKEN"
        raise UserError(
            f"--telegram needs a bot's token in {place}",
            "@BotFather gives you one, such as 123456:ABC-DEF1234 (docs/TELEGRAM.md).",
        )
    return token


def parse_allowed(options) -> set[int]:
    """Return the ids of --allow. UserError when there are none."""
    ids = [part.strip() for text in options.allow for part in text.split(",") if part.strip()]
    if not ids or not all(re.fullmatch(r"\d{1,18}", part) for part in ids):
        raise UserError(
            "--telegram needs --allow ID: the Telegram ids of those who may talk to it",
            "Don't know yours? Start with --allow 0 and write to the bot: it tells you.",
        )
    return {int(part) for part in ids}


def parse_names(options) -> dict[int, str]:
    """Return the names of --as ID=NAME, by id. UserError for another shape, or an id to ignore."""
    names = {}
    for text in options.as_:
        user, _, name = text.partition("=")
        if not user.strip().isdecimal() or not name.strip():
            raise UserError(
                f"--as {text}: with --telegram it maps an id to a contact",
                "For example: --as 123456789=Ann",
            )
        names[int(user)] = name.strip()
    if unknown := names.keys() - parse_allowed(options):
        raise UserError(f"--as {min(unknown)}=…: --allow lacks that id", "Add it to --allow.")
    return names


# --- Messages


def message_text(message: telegram.Message) -> str:
    """Return a message's text or caption; else what stands for it in training, or ""."""
    text = (message.text or message.caption or "").strip()
    if message.sticker and not text:
        return message.sticker.emoji or "<sticker>"
    return text or next((mark for field, mark in MARKS.items() if getattr(message, field)), "")


def split_text(text: str) -> Iterator[str]:
    """Yield pieces that Telegram accepts, cut at the end of a line or a word if there is one."""
    while text:
        units = text.encode("utf-16-le", "surrogatepass")
        if len(units) <= 2 * MAX_MESSAGE:
            yield text
            return
        head = units[: 2 * MAX_MESSAGE].decode("utf-16-le", "ignore")  # no half of an emoji
        end = max(head.rfind("\n"), 0) or max(head.rfind(" "), 0) or len(head)
        yield text[:end]
        text = text[end:].lstrip()


def local_time(message: telegram.Message) -> datetime.datetime:
    return message.date.astimezone()


# --- A chat


class TelegramChat(Conversation):
    """The conversation of one chat, private or a group.

    Ids of messages: `read` is the last; `asked` the last that expects an answer, `answered` the
    last that got one, or won't.
    """

    def __init__(self, bot: "TelegramBot", id: int, name: str, is_group: bool):
        folder = bot.options.history
        history = Path(folder) / f"{id}.jsonl" if folder else None
        super().__init__(bot.me, name, history, bot.options.temperature)
        self.bot = bot
        self.id = id
        self.is_group = is_group
        self.read = 0
        self.asked = 0
        self.answered = 0
        self.ignored = False  # the turn that the last message belongs to
        self.last_at = 0.0  # when that came, or my last message went
        self.task: asyncio.Task | None = None
        self.sending = False

    @property
    def contact(self) -> str:
        return GROUPS if self.is_group else self.you

    def session(self) -> data.Session:
        state = f"telegram {self.id}, message {self.read}"
        if self.asked > self.answered:
            state += ", unanswered"
        start = self.turns[0].at if self.turns else now()
        chat_type = "private_group" if self.is_group else "personal_chat"
        return data.Session(self.you, state, chat_type, start, self.turns)

    # What comes in

    def receive(self, message: telegram.Message, author: str) -> None:
        """Read a message or a command, unless it was read before."""
        if message.message_id <= self.read:
            return
        self.read = message.message_id
        text = message_text(message)
        if command := COMMAND.fullmatch(text):
            name, username, argument = command.groups()
            if not username or username.lower() == self.bot.username:
                self.run_command(name.lower(), (argument or "").strip())
        elif text:
            is_new = self.add(message, author, text)
            if self.expects_answer(message, text, is_new):
                self.asked = self.read
                self.schedule(self.delay(local_time(message).hour))
        self.save()

    def add(self, message: telegram.Message, author: str, text: str) -> bool:
        """Append a message to the turns; return whether it begins a turn, or follows a silence."""
        last = self.turns[-1].author if self.turns else ""
        at = message.date.timestamp()
        is_new = author != last or at - self.last_at > SESSION_SECONDS
        self.last_at = at
        if author != last:
            start = local_time(message).strftime("%Y-%m-%dT%H:%M:%S")
            self.turns.append(data.Turn(author, False, start, []))
        self.turns[-1].messages.append(text)
        return is_new

    def expects_answer(self, message: telegram.Message, text: str, is_new: bool) -> bool:
        """Return whether to answer a message. A turn is ignored, or not, as a whole."""
        bot, reply = self.bot, message.reply_to_message
        if not self.is_group:
            if is_new:
                self.ignored = bot.options.may_ignore and self.ignores()
            return not self.ignored
        if reply and reply.from_user and reply.from_user.id == bot.api.id:
            return True
        if bot.my_names.search(text):
            return True
        return bot.options.speaks_up and is_new and not self.ignores()

    def ignores(self) -> bool:
        return self.bot.pace.ignores(self.contact, self.bot.random)

    def delay(self, hour: int) -> float:
        """Draw the seconds before an answer to what came at this hour."""
        if not self.bot.is_human:
            return JOIN_SECONDS
        return max(JOIN_SECONDS, self.bot.pace.delay(self.contact, hour, self.bot.random))

    def run_command(self, name: str, argument: str) -> None:
        if name == "retry" and self.turns:
            self.stop()
            self.drop_reply()
            self.asked = self.read
            self.schedule(0)
            return
        if name in ("undo", "reset"):
            self.stop()
            self.answered = self.asked
        notice = self.change(name, argument)
        text = f"({notice})" if notice else self.introduction()
        self.bot.tasks.create_task(self.bot.send(self.id, text))

    def introduction(self) -> str:
        kept = "Whoever runs this bot keeps it." if self.history else "It is not kept on disk."
        leave = "remove this bot from the group" if self.is_group else "block this bot"
        commands = [f"/{name}: {what}" for name, what in COMMANDS.items()]
        return (
            f"This is an AI imitation of {self.me}, not {self.me}. It makes things up. "
            f"Telegram can read this chat. {kept} To stop, {leave}.\n\n" + "\n".join(commands)
        )

    # What goes out

    def schedule(self, delay: float, opening: bool = False) -> None:
        """Answer in `delay` seconds. An answer of which nothing was sent yet begins anew."""
        if not self.sending:  # else `answer` looks again at its end
            self.stop()
            self.task = self.bot.tasks.create_task(self.answer(delay, opening))

    def stop(self) -> None:
        """Cancel the answer under way."""
        if self.task:
            self.task.cancel()
        self.task, self.sending = None, False

    async def answer(self, delay: float, opening: bool) -> None:
        """Write my next turn, and send it after `delay` seconds."""
        task, asked = self.task, self.asked
        due = time.monotonic() + delay
        messages = await self.generate(due, opening)
        if messages is None:
            return
        if messages:
            await self.type(due, messages[0])
        self.sending = True
        turn = data.Turn(self.me, True, now(), [])
        self.turns.append(turn)  # what others write from here on stands behind it
        try:
            for index, message in enumerate(messages):
                if index:
                    await self.type(time.monotonic() + self.gap(message), message)
                for piece in split_text(message):
                    await self.bot.send(self.id, piece)
                turn.messages.append(message)
                self.answered = asked
                self.last_at = time.time()
                self.save()
        finally:
            self.turns = [other for other in self.turns if other.messages or other is not turn]
            if self.task is task:  # else it was stopped
                self.task, self.sending = None, False
        self.answered = asked  # if the model says nothing, too
        self.save()
        if self.asked > self.answered:
            self.schedule(self.delay(datetime.datetime.now().hour))

    async def generate(self, due: float, opening: bool) -> list[str] | None:
        """Return the messages of my next turn; None if there is an error. Type when it's late."""
        options = self.bot.options
        seed = reply_seed(options.seed, self.turns, self.attempts)
        request = ReplyRequest(
            [] if opening else list(self.turns),
            options.max_tokens,
            self.temperature,
            options.top_p,
            seed,
            chat=(self.you, self.is_group),
        )
        job = self.bot.queue.submit(request, str(self.id))
        try:
            await asyncio.wait({job.result}, timeout=due - time.monotonic())
            while not job.result.done():
                await self.show_typing()
                await asyncio.wait({job.result}, timeout=TYPING_SECONDS)
            job.result.result()
        except Exception as error:  # no memory left, or none of --slots was free for too long
            print(f"(no answer: {type(error).__name__})", file=sys.stderr)
            return None
        finally:
            job.result.cancel()
        assert job.answer is not None, job
        return job.answer.messages

    def gap(self, message: str) -> float:
        return self.bot.pace.gap(message, self.bot.random) if self.bot.is_human else 0

    async def type(self, due: float, message: str) -> None:
        """Wait until a message is due; show "typing…" as long as I need for it, at least once."""
        typing = self.bot.pace.typing_seconds(message)
        await asyncio.sleep(due - typing - time.monotonic())
        await self.show_typing()
        while (left := due - time.monotonic()) > TYPING_SECONDS:
            await asyncio.sleep(TYPING_SECONDS)
            await self.show_typing()
        await asyncio.sleep(left)

    async def show_typing(self) -> None:
        with contextlib.suppress(TelegramError):
            await self.bot.api.send_chat_action(self.id, "typing")


# --- The bot


class TelegramBot:
    """All chats of a bot. `queue`: has the model; `pace`: when to answer."""

    def __init__(
        self, api: telegram.Bot, queue: RequestQueue, me: str, pace: Pace, options: typing.Any
    ):
        self.api = api
        self.queue = queue
        self.me = me
        self.pace = pace
        self.is_human = options.pace != "fast"
        self.options = options
        self.allowed = parse_allowed(options)
        self.names = parse_names(options)  # of users, by id
        self.taken = {name.casefold() for name in (me, data.HEADER, *self.names.values())}
        self.random = np.random.default_rng(options.seed)
        self.chats: dict[int, TelegramChat] = {}
        self.strangers: set[int] = set()
        self.trouble = ""  # what keeps us from Telegram
        self.tasks = asyncio.TaskGroup()

    async def run(self) -> None:
        """Answer until cancelled."""
        try:
            await self.request(self.api.initialize)
            self.username = self.api.username.lower()
            self.my_names = name_pattern(self.me, self.api.first_name, f"@{self.username}")
            commands = list(COMMANDS.items())
            await self.request(lambda: self.api.set_my_commands(commands))
            print(f"An AI imitation of {self.me}: https://t.me/{self.username} (Ctrl-C exits)")
            async with self.tasks:
                self.load_chats()
                if self.options.initiates:
                    self.tasks.create_task(self.initiate())
                await self.poll()
        except ExceptionGroup as group:  # a full disk, for example
            raise group.exceptions[0] from None
        finally:
            await self.api.shutdown()

    def load_chats(self) -> None:
        """Load what --history keeps; answer what a restart has left unanswered."""
        folder = self.options.history
        for path in sorted(Path(folder).glob("*.jsonl")) if folder else []:
            sessions = data.load_sessions(path)
            state = STATE.fullmatch(sessions[-1].chat_id) if sessions else None
            if not state:
                raise UserError(
                    f"{path} is not a chat of --telegram", "Name another folder for --history."
                )
            id, is_group = int(state[1]), sessions[-1].type == "private_group"
            chat = TelegramChat(self, id, self.names.get(id, sessions[-1].chat), is_group)
            chat.read = int(state[2])
            self.chats[id] = chat
            if state[3] and (is_group or id in self.allowed):
                chat.asked = chat.read
                chat.schedule(JOIN_SECONDS)

    async def poll(self) -> None:
        """Read updates. Asking for the next ones confirms those before them."""
        offset = None
        while True:
            updates = await self.request(
                lambda offset=offset: self.api.get_updates(
                    offset, timeout=POLL_SECONDS, allowed_updates=["message"]
                )
            )
            for update in updates:
                offset = update.update_id + 1
                if update.message and update.message.from_user:
                    self.receive(update.message, update.message.from_user)

    def receive(self, message: telegram.Message, user: telegram.User) -> None:
        id, is_group = message.chat.id, message.chat.type != "private"
        if user.id not in self.allowed:
            if (
                not is_group
                and user.id not in self.strangers
                and len(self.strangers) < MAX_STRANGERS
            ):
                self.strangers.add(user.id)
                self.tasks.create_task(self.send(id, STRANGER.format(user.id)))
            return
        if user.id not in self.names:
            self.names[user.id] = data.unique_name(user.full_name, self.taken)
        author = self.names[user.id]
        if id not in self.chats:
            self.chats[id] = TelegramChat(self, id, author, is_group)
        if is_group:
            self.chats[id].you = data.unique_name(message.chat.title, set())
        self.chats[id].receive(message, author)

    async def initiate(self) -> None:
        """Open talks at the hours when I used to, at most --initiates a day."""
        day, opened = None, 0
        while True:
            await asyncio.sleep(60)
            moment = datetime.datetime.now()
            if moment.date() != day:
                day, opened = moment.date(), 0
            for chat in self.chats.values():
                daily = self.pace.openings_per_day(chat.contact)
                share = self.pace.opening_hours[moment.hour] / 60  # of a day's, in this minute
                silent = not chat.task and time.time() - chat.last_at > SESSION_SECONDS
                if opened < self.options.initiates and silent and not chat.is_group:
                    if self.random.random() < daily * share:
                        chat.schedule(0, opening=True)
                        opened += 1

    async def send(self, chat_id: int, text: str) -> None:
        """Send a message, when Telegram can be reached. One that it refuses is dropped."""
        try:
            await self.request(lambda: self.api.send_message(chat_id, text))
        except TelegramError as error:  # for example, the bot is blocked
            print(f"(Telegram refuses a message: {type(error).__name__})", file=sys.stderr)

    async def request(self, call: Callable[[], Coroutine[typing.Any, typing.Any, T]]) -> T:
        """Call Telegram; wait out flood limits and lost connections.

        TelegramError when it refuses, UserError for a token that it doesn't know.
        """
        wait = 1.0
        while True:
            try:
                result = await call()
                if self.trouble:
                    self.report("")
                return result
            except RetryAfter as error:
                await asyncio.sleep(error._retry_after.total_seconds())
                continue
            except InvalidToken:
                raise UserError(
                    "Telegram doesn't know this bot's token", "@BotFather shows it: /mybots."
                ) from None
            except BadRequest:  # a NetworkError for the library
                raise
            except Conflict:
                self.report("another program reads this bot's messages")
            except NetworkError:
                self.report("no connection to Telegram")
            await asyncio.sleep(wait)
            wait = min(2 * wait, MAX_RETRY_SECONDS)

    def report(self, trouble: str) -> None:
        """Print what keeps us from Telegram, once."""
        if trouble != self.trouble:
            text = f"{trouble}; trying again" if trouble else "connected to Telegram again"
            print(f"({text})", file=sys.stderr)
        self.trouble = trouble


def name_pattern(*names: str) -> re.Pattern:
    """Return a pattern of names, or their first words, in a text."""
    words = {word for name in names for word in (name, name.split()[0]) if len(word) > 2}
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, words))})(?!\w)", re.IGNORECASE)
