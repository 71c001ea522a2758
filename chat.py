"""Talk to it, in the terminal: `python chat.py ckpt/`. Each of its messages is a line of its own, as it comes. `--web`: see server.py."""

import contextlib
import dataclasses
import datetime
import itertools
import re
import sys
from pathlib import Path

import cli
import data
from cli import UserError, flag
from inference import generate
from inference.context import ContextBuilder
from weights import devices, hf, hub
from weights.load import load_for_chat
from weights.tokenizer import load_tokenizer, read_names, unknown_name_warning

LIMITS = {
    "context": (64, 1 << 31),
    "max_tokens": (1, 1 << 31),
    "temperature": (0, 10),
    "top_p": (0, 1),
    "port": (0, 65535),
}
MIN_COMPILE_PARAMETERS = 200e6  # parameters, below which an answer is there before the compiler is


@dataclasses.dataclass(frozen=True)
class Options:
    """Talk to a fine-tuned model (an adapter, a whole model, or a plain base)."""

    ckpt: str = flag(
        "",
        "the folder that train.py wrote, or any model folder",
        positional=True,
        group="who talks",
    )
    as_: str | None = flag(None, "who is talking to it", shown="the contact I talk to most")
    me: str | None = flag(None, "whom it imitates", shown="whose chats it learned from")
    model: str | None = flag(None, "the base, when it lies elsewhere than the adapter says")

    prompt: str | None = flag(None, "answer this once and end", short="-p", group="the talk")
    history: str | None = flag(None, "keep the talk in this file, and go on with what it holds")
    memory: str | None = flag(None, "remind it of old exchanges from this folder of data.py")
    context: int = flag(2048, "tokens it remembers, at most what the model was made for")
    max_tokens: int = flag(256, "longest answer, in tokens")
    temperature: float = flag(0.7, "0: always the likeliest token")
    top_p: float = flag(0.95, "draw only from the likeliest tokens that make up so much")
    seed: int | None = flag(None, "the same answers, in the same order, at each start")

    web: bool = flag(False, "a page to talk on, and an API for other programs", group="on a page")
    host: str = flag("127.0.0.1", "its address; another needs --token and --as")
    allow_host: tuple[str, ...] = flag((), "answer to this host name without a token (repeatable)")
    port: int = flag(8000, "its port")
    token: str | None = flag(None, "bearer token that clients must send, by any host name")

    no_compile: bool = flag(
        False, "don't compile the model first: sooner ready, half as fast", group="speed and memory"
    )
    weights: str | None = flag(
        None,
        "what they're held in",
        choices=("fp32", "bf16", "int8", "int4"),
        shown="bf16, or what fits",
    )
    device: str | None = flag(None, "cuda, mps or cpu", shown="the first there is")


def main():
    options = cli.parse(Options)
    folder = validate(options)
    me, you = who(folder, options)
    opening = ContextBuilder(folder, options.memory, has_memory)
    if options.web:
        from inference import server

        door = server.listen(options)
    device = devices.pick_device(options.device)
    tokenizer = load_tokenizer(folder)
    model = load_for_chat(
        folder, options.model, options.context, device, tokenizer, options.weights
    )
    size = min(options.context, model.config.max_position_embeddings)
    compiled = not options.no_compile and model.config.num_parameters > MIN_COMPILE_PARAMETERS
    decoder = generate.Decoder(model, tokenizer, size, compiled=compiled)
    decoder.opening = opening
    if compiled and not decoder.step and device.type != "mps":
        why = "that needs g++ or clang++ and Python's headers"
        print(
            f"(not compiled: {why}; it answers at half the speed, in int8 and int4 at less)",
            file=sys.stderr,
        )
    if options.web:
        server.serve(door, decoder, me, you, options)
        return

    tries = itertools.count(1)

    def answer(turns, temperature=None, again=False):
        """With --seed an answer is repeatable by the number of turns before it, and of retries."""
        number = next(tries) if again else 0
        seed = None if options.seed is None else options.seed + len(turns) + 1_000_003 * number
        heat = options.temperature if temperature is None else temperature
        return generate.Answer(decoder, turns, me, options.max_tokens, heat, options.top_p, seed)

    if options.prompt is not None:
        said = answer([turn(you, False, options.prompt)])
        list(said)
        print("\n".join(said.messages))
        return
    Conversation(me, you, answer, options.history and Path(options.history)).run()


def validate(options):
    """→ the checkpoint's folder. UserError for what is missing or can't be, before anything is loaded."""
    for name, (least, most) in LIMITS.items():
        if not least <= (value := getattr(options, name)) <= most:
            raise UserError(
                f"--{name.replace('_', '-')} {value} is not from {least:,} to {most:,}",
                "Leave it out for the default.",
            )
    folder = Path(options.ckpt)
    hub.refuse_gguf(options.ckpt)
    if not folder.is_dir():
        raise UserError(
            f"{folder}: there is no such folder",
            "Make one: python train.py --lora   (then: python chat.py ckpt/)",
        )
    if not (hf.is_model(folder) or hf.is_adapter(folder)):
        raise UserError(
            f"{folder} holds no model: neither config.json nor adapter_config.json",
            "Give the folder that train.py wrote.",
        )
    if options.prompt is not None and not options.prompt.strip():
        raise UserError("-p is empty", "Say something, or leave it out to talk.")
    if options.prompt is not None and options.web:
        raise UserError("-p is answered here, --web elsewhere", "Leave one of them out.")
    if options.prompt is not None and options.history:
        raise UserError("-p is answered once, --history keeps a talk", "Leave one of them out.")
    if options.history and not Path(options.history).absolute().parent.is_dir():
        raise UserError(
            f"--history {options.history}: there is no such folder",
            "Make it first, or name a file in another.",
        )
    return folder


def has_memory(day, asked, mine):
    """Show an old exchange that is in its prompt now."""
    said = "\n".join(
        f"  ({day}  {turn.author}: {' / '.join(turn.messages):.200})" for turn in (asked, mine)
    )
    print(cli.printable(said), file=sys.stderr)


def who(folder, options):
    """(me, the one who talks to me): as the flags say, else from `persona.json`, else plain names."""
    me, you = read_names(folder)
    if stranger := unknown_name_warning(folder, options.as_):
        print(stranger, file=sys.stderr)
    return options.me or me, options.as_ or you


def turn(author, me, text):
    """Each line is a message."""
    return data.Turn(
        author,
        me,
        now(),
        [message for message in (line.strip() for line in text.split("\n")) if message],
    )


HELP = """/as NAME   you are NAME from now on
/temp X    0: always the likeliest word; 1: wilder; up to 10
/retry     another answer to the last message
/undo      take the last message and its answer back
/reset     begin anew
Ctrl-C     stops an answer; Ctrl-D ends"""


class Conversation:
    """The conversation in the terminal. `answer(turns)` → an Answer; `history`: where it is kept, or None."""

    def __init__(self, me, you, answer, history=None):
        self.me, self.you, self.answer, self.history = me, you, answer, history
        self.turns, self.temperature = [], None
        if history and history.exists():
            self.turns = [turn for session in data.load_sessions(history) for turn in session.turns]

    def run(self):
        """Read lines, stream answers, until the end of input. Ctrl-C stops an answer, two at the prompt end."""
        interactive = sys.stdin.isatty()
        if interactive:
            with contextlib.suppress(ImportError):  # Windows' own input() has them
                import readline  # noqa: F401  arrow keys and history in input()
            print(
                f"An AI imitation of {self.me}. You are {self.you}. /help says what else there is, Ctrl-D ends.\n"
            )
            for said in self.turns[-8:]:
                print("\n".join(f"{said.author}: {message}" for message in said.messages))
        stopped = False
        while True:
            try:
                text = input(f"{self.you}: " if interactive else "").strip()
                stopped = False
            except KeyboardInterrupt:
                if stopped or not interactive:
                    raise
                print("\n(once more, or Ctrl-D, ends)")
                stopped = True
                continue
            except EOFError:
                if interactive:
                    print()
                return
            if re.match("/[a-z]+( |$)", text):
                self.obey(*text[1:].split(None, 1))
            elif text:
                self.turns.append(turn(self.you, False, text))
                self.reply()

    def obey(self, name, said=""):
        if name == "as" and said:
            self.you = said
        elif name == "retry" and self.turns:
            if self.turns[-1].me:
                self.turns.pop()
            self.reply(again=True)
        elif name == "undo" and self.turns:
            while self.turns.pop().me and self.turns:
                pass
            self.keep()
            print(f"(taken back; {cli.counted(len(self.turns), 'turns')} left)")
        elif name == "reset":
            self.turns.clear()
            self.keep()
            print("(begun anew)")
        elif name == "temp" and (number := temperature(said)) is not None:
            self.temperature = number
        elif name in ("retry", "undo"):
            print("(nothing was said yet)")
        else:
            print(
                HELP
                if name == "help"
                else f"(/{name} {said}".rstrip() + " is not understood)\n" + HELP
            )

    def reply(self, again=False):
        shown = StreamPrinter(self.me)
        try:
            for messages in self.answer(self.turns, self.temperature, again):
                shown.update(messages)
        except KeyboardInterrupt:
            pass
        shown.end()
        if shown.messages:
            self.turns.append(data.Turn(self.me, True, now(), shown.messages))
        self.keep()

    def keep(self):
        if self.history:
            start = self.turns[0].at if self.turns else now()
            session = data.Session(self.you, "chat.py", "personal_chat", start, self.turns)
            cli.write_text(self.history, session.to_json() + "\n" if self.turns else "")


def now():
    return datetime.datetime.now().isoformat(timespec="seconds")


def temperature(said):
    """What /temp was given, or None."""
    try:
        return number if 0 <= (number := float(said)) <= 10 else None
    except ValueError:
        return None


class StreamPrinter:
    """Messages while they grow, each on a line of its own; on a terminal a typing mark comes before the first."""

    def __init__(self, name):
        self.name, self.messages, self.terminal = name, [], sys.stdout.isatty()
        if self.terminal:
            print(f"\r{name} is typing…", end="", flush=True)

    def update(self, messages):
        """What was shown only grows."""
        margin = " " * (len(self.name) + 2) if self.terminal else ""
        for number, message in enumerate(messages):
            before = self.messages[number] if number < len(self.messages) else None
            if before is None:
                name = f"{self.name}: " if not (number and self.terminal) else margin
                print(
                    (("\r\033[K" if self.terminal else "") if not number else "\n") + name, end=""
                )
            print(message[len(before or "") :].replace("\n", "\n" + margin), end="", flush=True)
        self.messages = list(messages)

    def end(self):
        nothing = "\r\033[K" + f"({self.name} says nothing)" if self.terminal else ""
        print("" if self.messages else nothing, flush=True)


if __name__ == "__main__":
    cli.run(main)
