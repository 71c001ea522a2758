"""A Telegram bot: `python chat.py ckpt/ --telegram`.

It asks Telegram for updates (long polling), so no port is open. Only users on --allow are read.
Each chat has a conversation; all share the model through RequestQueue. Nothing of a chat is
printed or logged, nor written without --history.

A message joins its chat's turns, and with --history the chat's file, before it is confirmed to
Telegram; one that comes twice is known by its id. The file says whether an answer is due, so after
a crash nothing is lost or answered twice. Without --history a restart forgets all chats, and what
was not answered by then stays unanswered.
"""

import asyncio
import datetime
import re
import sys
import time
from pathlib import Path
from typing import Any

import cli
import data
from cli import UserError
from inference import generate
from inference.conversation import Conversation, now, reply_seed
from inference.pace import GROUPS, Pace, Pacer, Schedule
from inference.request_queue import ReplyRequest, RequestQueue
from inference.telegram_api import Api, Message, TelegramError, User, message_text, read_token

JOIN_SECONDS = 1.0  # messages that follow one another so soon are answered together, at any pace
TYPING_SECONDS = 4.0  # between two signs of it
SILENCE_SECONDS = 3600  # after it a turn or a talk begins, as in persona.json's timing
MINUTE = 60.0  # seconds
MAX_STRANGERS = 1000  # who get a line
# In a file of --history: the ids of the chat, the bot and the last message that it read
STATE = re.compile(r"telegram (-?\d+), bot (\d+), message (\d+)(, unanswered)?")
COMMAND = re.compile(r"/([a-z]+)(?:@(\w+))?(?:\s+(.*))?", re.IGNORECASE | re.DOTALL)
COMMANDS = {
    "retry": "another reply to the last message",
    "undo": "remove the last message and its reply",
    "reset": "forget this conversation",
    "temp": "sampling temperature, /temp 0.7",
}
STRANGER = "Sorry, this bot talks only to people on its list. Your id is {}."


def validate(options: Any) -> Api:
    """Check the flags, before the model loads; return the bot's account."""
    parse_names(options)
    if options.memory:
        raise UserError(
            "--memory quotes your chats, and --telegram lets others ask", "Leave --memory out."
        )
    if options.history:
        cli.make_private_dir(options.history)
    return Api(read_token(options.token_file))


def serve(api: Api, decoder: generate.Decoder, me: str, options: Any, pacer: Pacer) -> None:
    """Run the bot until Ctrl-C. `api`: from `validate`; `options`: chat.py's."""
    queue = RequestQueue(decoder, me, options, max_queue=float("inf"))
    try:
        asyncio.run(TelegramBot(api, queue, me, options, pacer).run())
    except TelegramError as error:
        raise UserError(
            f"Telegram refuses this bot: {error.message}", "Does @BotFather still list it? /mybots"
        ) from None


def parse_allowed(options: Any) -> set[int]:
    """Return the ids of --allow. UserError when there are none."""
    ids = [part.strip() for text in options.allow for part in text.split(",") if part.strip()]
    if not ids or not all(re.fullmatch(r"\d{1,18}", part, re.ASCII) for part in ids):
        raise UserError(
            "--telegram needs --allow ID: the Telegram ids of those who may talk to it",
            "Don't know yours? Start with --allow 0 and write to the bot: it tells you.",
        )
    return {int(part) for part in ids}


def parse_names(options: Any) -> dict[int, str]:
    """Return the names of --as ID=NAME, by id."""
    allowed, names = parse_allowed(options), {}
    for text in options.as_:
        id, _, name = text.partition("=")
        if not re.fullmatch(r"\d{1,18}", id, re.ASCII) or not name.strip():
            raise UserError(
                f"--as {text}: with --telegram it maps an id to a contact",
                "For example: --as 123456789=Ann",
            )
        names[int(id)] = name.strip()
    if ignored := names.keys() - allowed:
        raise UserError(f"--as {min(ignored)}=…: --allow lacks that id", "Add it to --allow.")
    return names


class GenerationError(Exception):
    """The model wrote no answer. It names the kind of error, without what people wrote."""


class TelegramChat(Conversation):
    """The conversation of one chat, private or a group.

    Ids of messages: `read` is the last; `asked` the last that expects an answer, `answered` the
    last that got one, or never will.
    """

    def __init__(self, bot: "TelegramBot", id: int, name: str, is_group: bool):
        folder = bot.options.history
        history = Path(folder) / f"{id}.jsonl" if folder else None
        super().__init__(bot.me, name, history, bot.options.temperature)
        self.bot = bot
        self.id = id
        self.is_group = is_group
        self.read = self.asked = self.answered = 0
        self.ignored = False  # the turn that the last message belongs to
        self.last_at = 0.0  # when that came, or my last message went
        self.task: asyncio.Task | None = None
        self.sending = False

    @property
    def contact(self) -> str:
        return GROUPS if self.is_group else self.you

    def session(self) -> data.Session:
        state = f"telegram {self.id}, bot {self.bot.api.bot.id}, message {self.read}"
        if self.asked > self.answered:
            state += ", unanswered"
        start = self.turns[0].at if self.turns else now()
        chat_type = "private_group" if self.is_group else "personal_chat"
        return data.Session(self.you, state, chat_type, start, self.turns)

    # --- what comes in

    def receive(self, message: Message, author: str) -> None:
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
            at = message.date.timestamp()
            is_new = at - self.last_at > SILENCE_SECONDS
            is_new = is_new or not self.turns or self.turns[-1].author != author
            self.last_at = at
            start = message.date.astimezone().strftime("%Y-%m-%dT%H:%M:%S")
            self.add(data.Turn(author, False, start, [text]))
            if self.expects_answer(message, text, is_new):
                self.asked = self.read
                self.start_answer(self.bot.pacer.schedule(self.contact))
        self.save()

    def expects_answer(self, message: Message, text: str, is_new: bool) -> bool:
        """Return whether to answer a message. `is_new`: it begins a turn, or ends a silence."""
        bot, reply = self.bot, message.reply_to_message
        if not self.is_group:
            if is_new:  # a turn is ignored as a whole
                self.ignored = bot.pacer.ignores(self.contact)
            return not self.ignored
        if reply and reply.from_user and reply.from_user.id == bot.api.bot.id:
            return True
        if bot.my_names.search(text):
            return True
        generator = bot.pacer.generator
        return is_new and bot.options.speaks_up and not bot.pace.ignores(GROUPS, generator)

    def run_command(self, name: str, argument: str) -> None:
        if name == "retry" and self.turns:
            self.stop_answer()
            self.drop_reply()
            self.asked = self.read
            self.start_answer()
            return
        if name in ("undo", "reset"):
            self.stop_answer()
            self.answered = self.asked
        notice = self.change(name, argument)
        text = f"({notice})" if notice else self.introduction()
        self.bot.tasks.create_task(self.bot.api.send(self.id, text))

    def introduction(self) -> str:
        kept = "The bot's owner keeps it." if self.history else "It is not kept on disk."
        leave = "remove this bot from the group" if self.is_group else "block this bot"
        commands = [f"/{name}: {what}" for name, what in COMMANDS.items()]
        return (
            f"This is an AI imitation of {self.me}, not {self.me}. It makes things up. "
            f"Telegram can read this chat. {kept} To stop, {leave}.\n\n" + "\n".join(commands)
        )

    # --- what goes out

    def start_answer(self, schedule: Schedule | None = None, opening: bool = False) -> None:
        """Start generating my next turn. `opening`: a new session, without the earlier turns.

        An answer that isn't being sent yet is started again; one that is being sent ends first.
        """
        if not self.sending:
            self.stop_answer()
            self.task = self.bot.tasks.create_task(self.answer(schedule, opening))

    def stop_answer(self) -> None:
        if self.task:
            self.task.cancel()
        self.task, self.sending = None, False

    async def answer(self, schedule: Schedule | None, opening: bool) -> None:
        """Write my next turn and send its messages when they are due."""
        task, asked = self.task, self.asked
        turn = data.Turn(self.me, True, now(), [])
        try:
            await asyncio.sleep(JOIN_SECONDS)
            for message in await self.generate(schedule, [] if opening else list(self.turns)):
                await self.wait_for(message, schedule)
                if not self.sending:
                    self.sending = True
                    self.turns.append(turn)  # what others write from now on comes behind it
                await self.bot.api.send(self.id, message)
                turn.messages.append(message)
                self.answered, self.last_at = asked, time.time()
                self.save()
            self.answered = asked  # also when the model says nothing
            self.save()
        except GenerationError as error:  # the next message, or a restart, tries again
            print(f"(no answer: {error})", file=sys.stderr)
        finally:
            self.turns = [other for other in self.turns if other.messages or other is not turn]
            if self.task is task:  # else it was stopped
                self.task, self.sending = None, False
        if self.asked > asked:
            self.start_answer(self.bot.pacer.schedule(self.contact))

    async def generate(self, schedule: Schedule | None, turns: list[data.Turn]) -> list[str]:
        """Return the messages of my next turn. Show "typing…" from when they are due."""
        options = self.bot.options
        seed = reply_seed(options.seed, self.turns, self.attempts)
        chat = (self.you, self.is_group)
        request = ReplyRequest(
            turns, options.max_tokens, self.temperature, options.top_p, seed, chat=chat
        )
        job = self.bot.queue.submit(request, str(self.id))
        due = schedule.before + (schedule.wait or 0) if schedule else 0
        try:
            await asyncio.wait({job.result}, timeout=due - time.monotonic())
            while not job.result.done():
                await self.bot.api.show_typing(self.id)
                await asyncio.wait({job.result}, timeout=TYPING_SECONDS)
            job.result.result()
        except Exception as error:  # no memory is left, or --timeout is over
            raise GenerationError(type(error).__name__) from None
        finally:
            job.result.cancel()
        assert job.answer is not None, job.client  # not the job: an error must not show a chat
        return job.answer.messages

    async def wait_for(self, message: str, schedule: Schedule | None) -> None:
        """Show "typing…" before a message, until it is due."""
        typing, due = schedule.next(message) if schedule else (0.0, 0.0)
        await asyncio.sleep(typing - time.monotonic())
        await self.bot.api.show_typing(self.id)
        while (left := due - time.monotonic()) > TYPING_SECONDS:
            await asyncio.sleep(TYPING_SECONDS)
            await self.bot.api.show_typing(self.id)
        await asyncio.sleep(left)


class TelegramBot:
    """All chats of a bot. `queue`: has the model."""

    def __init__(self, api: Api, queue: RequestQueue, me: str, options: Any, pacer: Pacer):
        self.api = api
        self.queue = queue
        self.me = me
        self.options = options
        self.pacer = pacer
        self.pace = pacer.pace or Pace({})
        self.allowed = parse_allowed(options)
        self.names = parse_names(options)  # of users, by id
        self.taken = {name.casefold() for name in (me, data.HEADER, *self.names.values())}
        self.chats: dict[int, TelegramChat] = {}
        self.strangers: set[int] = set()
        self.username = ""
        self.my_names = re.compile("")
        self.tasks = asyncio.TaskGroup()

    async def run(self) -> None:
        """Answer until cancelled."""
        try:
            await self.api.start(COMMANDS)
            bot = self.api.bot
            self.username = bot.username.lower()
            self.my_names = name_pattern(self.me, bot.first_name, f"@{self.username}")
            print(
                f"An AI imitation of {self.me}: https://t.me/{bot.username} (Ctrl-C exits)",
                flush=True,
            )
            async with self.tasks:
                self.load_chats()
                if self.options.initiates:
                    self.tasks.create_task(self.initiate())
                await self.poll()
        except ExceptionGroup as group:  # a full disk, for example
            raise group.exceptions[0] from None
        finally:
            await self.api.bot.shutdown()

    def load_chats(self) -> None:
        """Load what --history keeps; answer what a restart has left unanswered."""
        folder = self.options.history
        for path in sorted(Path(folder).glob("*.jsonl")) if folder else []:
            sessions = data.load_sessions(path)
            state = STATE.fullmatch(str(sessions[-1].chat_id)) if sessions else None
            if not state or state[1] != path.stem:
                raise UserError(
                    f"{path} is not a chat of --telegram", "Name another folder for --history."
                )
            self.load_chat(state, sessions[-1], path.stat().st_mtime)

    def load_chat(self, state: re.Match, session: data.Session, at: float) -> None:
        """Load a chat. `state`: a match of STATE; `at`: when it was saved."""
        id, is_group = int(state[1]), session.type == "private_group"
        name = session.chat
        if not is_group:
            name = self.names.setdefault(id, name)
            self.taken.add(name.casefold())
        chat = self.chats[id] = TelegramChat(self, id, name, is_group)
        chat.last_at = at
        if int(state[2]) != self.api.bot.id:
            return  # another bot kept it, and numbered its messages otherwise
        chat.read = int(state[3])
        if state[4] and (is_group or id in self.allowed):
            chat.asked = chat.read
            chat.start_answer()

    async def poll(self) -> None:
        """Read updates for ever. To ask for the next ones confirms those before."""
        offset = None
        while True:
            for number, message in await self.api.updates(offset):
                offset = number + 1
                if message and message.from_user:
                    self.receive(message, message.from_user)

    def receive(self, message: Message, user: User) -> None:
        """Hand a message to its chat; a stranger gets one line."""
        id, is_group = message.chat.id, message.chat.type != "private"
        if user.id not in self.allowed:
            known = is_group or id in self.strangers or len(self.strangers) >= MAX_STRANGERS
            if not known:
                self.strangers.add(id)
                self.tasks.create_task(self.api.send(id, STRANGER.format(id)))
            return
        if user.id not in self.names:
            self.names[user.id] = data.unique_name(user.full_name, self.taken)
        author = self.names[user.id]
        if id not in self.chats:
            name = data.unique_name(message.chat.title, set()) if is_group else author
            self.chats[id] = TelegramChat(self, id, name, is_group)
        self.chats[id].receive(message, author)

    async def initiate(self) -> None:
        """Open talks at the hours when I used to, at most --initiates a day."""
        day, opened = None, 0
        while True:
            await asyncio.sleep(MINUTE)
            moment = datetime.datetime.now()
            if moment.date() != day:
                day, opened = moment.date(), 0
            for chat in self.chats.values():
                silent = not chat.task and time.time() - chat.last_at > SILENCE_SECONDS
                if opened < self.options.initiates and silent and self.opens(chat, moment.hour):
                    chat.start_answer(self.pacer.schedule(chat.contact), opening=True)
                    opened += 1

    def opens(self, chat: TelegramChat, hour: int) -> bool:
        """Draw whether I open a talk in this minute."""
        if chat.is_group or chat.id not in self.allowed:
            return False
        rate = self.pace.openings_per_day(chat.contact) * self.pace.opening_hours[hour] / 60
        return bool(self.pacer.generator.random() < rate)


def name_pattern(*names: str) -> re.Pattern:
    """Return a regular expression that finds the names, or their first words, in a text."""
    words = {word for name in names for word in (name, name.split()[0]) if len(word) > 2}
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, words))})(?!\w)", re.IGNORECASE)
