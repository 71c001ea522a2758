"""Talk to a fine-tuned model in the terminal: `python chat.py ckpt/`.

Each of its messages is printed on a line of its own while it is generated. `--web` serves a page
and an API instead, see inference/server.py; `--telegram` runs a bot, see inference/telegram_bot.py.
"""

import contextlib
import dataclasses
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import cli
import data
from cli import UserError, flag
from inference import generate
from inference.context import ContextBuilder, Exchange
from inference.conversation import Conversation, now, reply_seed
from inference.pace import Pacer, hold_back
from weights import devices, hf, hub
from weights.load import choose_slots, load_for_chat
from weights.tokenizer import load_tokenizer, read_names, unknown_name_warning

LIMITS = {
    "context": (64, 1 << 31),
    "max_tokens": (1, 1 << 31),
    "temperature": (0, 10),
    "top_p": (0, 1),
    "seed": (0, 1 << 62),
    "port": (0, 65535),
    "slots": (1, 32),
    "per_client": (1, 1 << 31),
    "timeout": (1, 1 << 31),
    "max_prompt": (1, 1 << 20),
    "longest_wait": (0, 86400),
    "initiates": (0, 100),
}
MIN_COMPILE_PARAMETERS = 200e6  # on a GPU a smaller model has answered before the compiler is done


@dataclasses.dataclass(frozen=True)
class Options:
    """Talk to a fine-tuned model (an adapter, a whole model, or a plain base)."""

    ckpt: str = flag(
        "", "folder that train.py wrote, or any model folder", positional=True, group="names"
    )
    as_: tuple[str, ...] = flag(
        (), "your name; for a bot: ID=NAME", shown="the contact I write to most"
    )
    me: str | None = flag(None, "name of the person it imitates", shown="whose chats these were")
    model: str | None = flag(None, "base model, if it was moved since training")

    prompt: str | None = flag(None, "reply to this once and exit", short="-p", group="conversation")
    history: str | None = flag(
        None, "keep the conversation in this file (--telegram: folder) and continue it"
    )
    memory: str | None = flag(None, "add similar past exchanges from this folder of data.py")
    context: int = flag(2048, "context length in tokens, at most the model's own")
    max_tokens: int = flag(256, "longest reply, in tokens")
    temperature: float = flag(0.7, "sampling temperature; 0 takes the likeliest token")
    top_p: float = flag(0.95, "sample from the likeliest tokens of this total probability")
    seed: int | None = flag(None, "make replies repeatable")

    pace: str | None = flag(
        None,
        "send at once, or with my waits",
        choices=("fast", "human"),
        shown="fast; a bot: human",
        group="timing",
    )
    longest_wait: float = flag(30.0, "longest wait for a message with --pace human, in seconds")
    may_ignore: bool = flag(False, "leave messages unanswered as often as I did")

    web: bool = flag(False, "serve a page and an OpenAI-compatible API", group="server")
    host: str = flag("127.0.0.1", "address to listen on; others need --token and --as")
    allow_host: tuple[str, ...] = flag((), "accept this host name without a token (repeatable)")
    port: int = flag(8000, "port to listen on")
    token: str | None = flag(None, "bearer token that clients must send, by any host name")
    slots: int | None = flag(
        None, "answers at a time, each with its context", shown="what fits, at most 8"
    )
    per_client: int = flag(16, "requests of one address at a time, waiting ones included")
    timeout: int = flag(600, "seconds that a request may take, waiting included")
    max_prompt: int = flag(200_000, "longest conversation in a request, in characters")

    telegram: bool = flag(False, "run a Telegram bot; its token is in $TELEGRAM_TOKEN", group="bot")
    token_file: str | None = flag(None, "file with the bot's token, in place of $TELEGRAM_TOKEN")
    allow: tuple[str, ...] = flag(
        (), "Telegram ids of who may talk to it, with commas between them (repeatable)"
    )
    speaks_up: bool = flag(False, "in groups, answer as often as I did without being named")
    initiates: int = flag(0, "write first at hours when I used to, at most N times a day")

    no_compile: bool = flag(
        False, "don't compile decoding: starts sooner, 2-4 times slower", group="speed and memory"
    )
    weights: str | None = flag(
        None,
        "weight precision",
        choices=("fp32", "bf16", "int8", "int4"),
        shown="bf16, or what fits",
    )
    device: str | None = flag(None, "cuda, mps or cpu", shown="the first that is available")


def main() -> None:
    options = cli.parse(Options)
    folder = validate(options)
    if options.telegram:
        from inference import telegram_bot  # needs requirements-extra.txt

        api = telegram_bot.validate(options)
    default_me, default_you = read_names(folder)
    me, you = options.me or default_me, default_you
    for name in options.as_:
        you = name.partition("=")[2] if options.telegram else name
        if warning := unknown_name_warning(folder, you):
            print(warning, file=sys.stderr)
    context_builder = ContextBuilder(folder, options.memory, show_exchange)
    if options.web:
        from inference import server  # needs requirements-extra.txt

        sock = server.listen(options)
    pacer = Pacer.load(folder, options)
    decoder = load_decoder(folder, options, context_builder)
    if options.web:
        server.serve(sock, decoder, me, you, options, pacer)
        return
    if options.telegram:
        telegram_bot.serve(api, decoder, me, options, pacer)
        return

    def reply_to(turns, temperature, attempt=0):
        seed = reply_seed(options.seed, turns, attempt)
        return generate.Answer(
            decoder, turns, me, options.max_tokens, temperature, options.top_p, seed
        )

    if options.prompt is not None:
        reply = reply_to([make_turn(you, options.prompt)], options.temperature)
        for _ in reply:
            pass
        print("\n".join(reply.messages))
        return
    history = Path(options.history) if options.history else None
    TerminalChat(me, you, reply_to, history, options.temperature, pacer).run()


def validate(options: Options) -> Path:
    """Check the flags before anything is loaded; return the checkpoint's folder."""
    for name, (low, high) in LIMITS.items():
        value = getattr(options, name)
        if value is not None and not low <= value <= high:
            raise UserError(
                f"--{name.replace('_', '-')} must be from {low:,} to {high:,}, got {value}",
                "Leave it out for the default.",
            )
    texts = {"--as": "".join(options.as_), "--me": options.me or "", "-p": options.prompt or ""}
    for name, text in texts.items():
        try:
            text.encode()
        except UnicodeEncodeError:  # Python keeps bytes that are no UTF-8 as half characters
            raise UserError(f"{name} is not UTF-8 text", "Type it in a UTF-8 terminal.") from None
    folder = Path(options.ckpt)
    hub.refuse_gguf(options.ckpt)
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder",
            "Make one: python train.py --lora   (then: python chat.py ckpt/)",
        )
    if not (hf.is_model(folder) or hf.is_adapter(folder)):
        raise UserError(
            f"{folder} holds no model: neither config.json nor adapter_config.json",
            "Give the folder that train.py wrote.",
        )
    if options.prompt is not None:
        if not options.prompt.strip():
            raise UserError("-p is empty", "Give it a text, or leave it out to chat.")
        if options.web or options.history:
            other = "--web" if options.web else "--history"
            raise UserError(f"-p and {other} can't be combined", "Leave one of them out.")
    if options.telegram and (options.web or options.prompt):
        other = "--web" if options.web else "-p"
        raise UserError(f"--telegram and {other} can't be combined", "Leave one of them out.")
    if options.history and not Path(options.history).absolute().parent.is_dir():
        raise UserError(
            f"--history {options.history}: no such folder",
            "Create it first, or choose another.",
        )
    return folder


def load_decoder(
    folder: Path, options: Options, context_builder: ContextBuilder
) -> generate.Decoder:
    device = devices.pick_device(options.device)
    tokenizer = load_tokenizer(folder)
    slots = 1
    if options.web or options.telegram:
        slots = options.slots or choose_slots(
            folder, options.model, options.context, device, options.weights
        )
    model = load_for_chat(
        folder, options.model, options.context, device, tokenizer, options.weights, slots
    )
    size = min(options.context, model.config.max_position_embeddings)
    slow_compiler = device.type == "cuda" and model.config.num_parameters < MIN_COMPILE_PARAMETERS
    compile = not (options.no_compile or slow_compiler)
    decoder = generate.Decoder(
        model, tokenizer, size, compile=compile, context_builder=context_builder, slots=slots
    )
    if decoder.not_compiled:
        print(
            f"(not compiled: {decoder.not_compiled}; replies take 2 to 4 times as long)",
            file=sys.stderr,
        )
    return decoder


def show_exchange(exchange: Exchange) -> None:
    """Print a past exchange that was added to the prompt."""
    for turn in (exchange.prompt, exchange.reply):
        text = " / ".join(turn.messages)
        line = f"  ({exchange.day}  {turn.author}: {text:.200})"
        print(cli.printable(line), file=sys.stderr)


def make_turn(author: str, text: str) -> data.Turn:
    """Make a turn of typed text: each line is a message."""
    lines = [line.strip() for line in text.split("\n")]
    return data.Turn(author, False, now(), [line for line in lines if line])


HELP = """/as NAME   change your name
/temp X    sampling temperature: 0 takes the likeliest token; at most 10
/retry     another reply to the last message
/undo      remove the last message and its reply
/reset     start a new conversation
Ctrl-C     stops a reply; Ctrl-D exits"""


class TerminalChat(Conversation):
    """A conversation in the terminal.

    `reply_to(turns, temperature, attempt)` makes a generate.Answer. `history`: the file that the
    conversation is kept in, or None. `pacer`: when messages are printed; None: at once.
    """

    def __init__(
        self,
        me: str,
        you: str,
        reply_to: Callable[..., generate.Answer],
        history: Path | None = None,
        temperature: float = 0.7,
        pacer: Pacer | None = None,
    ):
        super().__init__(me, you, history, temperature)
        self.pacer = pacer or Pacer(None, human=False, may_ignore=False)
        self.reply_to = reply_to

    def run(self) -> None:
        """Read lines and stream replies until the end of input.

        Ctrl-C stops a reply; at the prompt, two of them exit.
        """
        interactive = sys.stdin.isatty()
        if interactive:
            with contextlib.suppress(ImportError):  # Windows' own input() can do it
                import readline  # noqa: F401  arrow keys in input()
            print(
                f"An AI imitation of {self.me}. You are {self.you}. "
                "/help lists the commands, Ctrl-D exits.\n"
            )
            for turn in self.turns[-8:]:
                print("\n".join(f"{turn.author}: {message}" for message in turn.messages))
        interrupted = False
        while True:
            try:
                text = input(f"{self.you}: " if interactive else "").strip()
            except EOFError:
                if interactive:
                    print()
                return
            except KeyboardInterrupt:
                if interrupted or not interactive:
                    raise
                print("\n(Ctrl-C again, or Ctrl-D, exits)")
                interrupted = True
                continue
            interrupted = False
            if re.match("/[a-z]+( |$)", text):
                name, _, argument = text[1:].partition(" ")
                self.run_command(name, argument.strip())
            elif text:
                self.add(make_turn(self.you, text))
                if self.pacer.ignores(self.you):
                    self.save()
                    print("(read)")
                else:
                    self.reply()

    def run_command(self, name: str, argument: str = "") -> None:
        if name == "help":
            print(HELP)
        elif name == "as" and argument:
            self.you = argument
        elif name == "retry" and self.turns:
            self.reply(self.drop_reply())
        elif notice := self.change(name, argument):
            print(f"({notice})")
        else:
            command = f"/{name} {argument}".rstrip()
            print(f"({command} is not understood)\n{HELP}")

    def reply(self, attempt: int = 0) -> None:
        printer, schedule = StreamPrinter(self.me), self.pacer.schedule(self.you)
        with contextlib.suppress(KeyboardInterrupt):
            replies: Iterable[list[str]] = self.reply_to(self.turns, self.temperature, attempt)
            if schedule:
                replies = hold_back(replies, schedule, printer.show_typing)
            else:
                printer.show_typing()
            for messages in replies:
                printer.update(messages)
        printer.end()
        if printer.messages:
            self.turns.append(data.Turn(self.me, True, now(), printer.messages))
        self.save()


class StreamPrinter:
    """Print messages while they grow, each on a line of its own."""

    def __init__(self, name: str):
        self.name = name
        self.messages: list[str] = []
        self.typing = False  # whether the last line says so
        terminal = sys.stdout.isatty()
        self.indent = " " * len(f"{name}: ") if terminal else ""
        self.clear_line = "\r\033[K" if terminal else ""

    def show_typing(self) -> None:
        """Say "is typing" until the next message begins, in a terminal."""
        if self.clear_line:
            start = "\n" if self.messages else "\r"
            print(f"{start}{self.name} is typing…", end="", flush=True)
            self.typing = True

    def update(self, messages: list[str]) -> None:
        """Print what is new in `messages`: what was printed before only grows."""
        text = self.clear_line if self.typing else ""
        newline = "" if self.typing else "\n"
        for index, message in enumerate(messages):
            printed = 0
            if index < len(self.messages):
                printed = len(self.messages[index])
            elif index == 0:
                text += f"{self.name}: "
            else:
                text += newline + (self.indent or f"{self.name}: ")
                newline = "\n"
            text += message[printed:].replace("\n", "\n" + self.indent)
        print(text, end="", flush=True)
        self.typing = False
        self.messages = list(messages)

    def end(self) -> None:
        text = self.clear_line if self.typing else ""
        if self.indent and not self.messages:
            text += f"({self.name} says nothing)"
        print(text, end="" if self.typing and self.messages else "\n", flush=True)


if __name__ == "__main__":
    cli.run(main)
