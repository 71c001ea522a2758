"""Talk to it, in the terminal: `python chat.py ckpt/`. Each of its messages is a line of its own, as it comes. `--web`: see server.py."""

import dataclasses
import sys
from pathlib import Path

import torch

import checkpoint
import config
import data
import generate
import plan
import tokenizer as tokenizers
from config import UserError, flag


@dataclasses.dataclass(frozen=True)
class Config:
    """Talk to a fine-tuned model (an adapter, a whole model, or a plain base)."""

    ckpt: str = flag("", "the folder that train.py wrote, or any model folder", positional=True)
    prompt: str | None = flag(None, "answer this once and end", short="-p")
    as_: str | None = flag(None, "who is talking to it (default: the contact I talk to most)")
    me: str | None = flag(None, "whom it imitates (default: whose chats it learned from)")
    model: str | None = flag(None, "the base, when it lies elsewhere than the adapter says")
    temperature: float = flag(0.7, "0: always the likeliest token")
    top_p: float = flag(0.95, "draw only from the likeliest tokens that make up so much")
    max_tokens: int = flag(256, "longest answer, in tokens")
    context: int = flag(2048, "tokens it remembers, at most what the model was made for")
    weights: str | None = flag(
        None, "what the weights are held in (default: bf16; fp32 on CPUs without bf16 instructions)", choices=("bf16", "fp32")
    )
    device: str | None = flag(None, "cuda, mps or cpu (default: the first there is)")
    seed: int | None = flag(None, "the same answers each time")
    web: bool = flag(False, "a page to talk on, and an API for other programs")
    host: str = flag("127.0.0.1", "the address of the page; another one lets others in, and needs --token and --as")
    port: int = flag(8000, "its port")
    token: str | None = flag(None, "whoever asks must know this")


def main():
    options = config.parse(Config)
    folder = Path(options.ckpt)
    if not folder.is_dir():
        raise UserError(
            f"{folder}: there is no such folder",
            "Make one: python train.py --lora   (then: python chat.py ckpt/)",
        )
    if not ((folder / "config.json").exists() or checkpoint.is_adapter(folder)):
        raise UserError(
            f"{folder} holds no model: neither config.json nor adapter_config.json",
            "Give the folder that train.py wrote.",
        )
    if options.prompt is not None and not options.prompt.strip():
        raise UserError("-p is empty", "Say something, or leave it out to talk.")
    if options.prompt is not None and options.web:
        raise UserError("-p is answered here, --web elsewhere", "Leave one of them out.")
    me, you = who(folder, options)
    if options.web:
        import server

        door = server.listen(options)
    device = checkpoint.pick_device(options.device)
    weights = plan.chat_dtype(folder, options.model, options.context, device, options.weights)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[weights]
    words = tokenizers.load(folder)
    model = checkpoint.load_model(str(folder), dtype, device, options.model, words)
    size = min(options.context, model.config.max_position_embeddings)
    decoder = generate.Decoder(model, words, size)
    if options.web:
        server.serve(door, decoder, me, you, options)
        return

    def answer(turns):
        seed = None if options.seed is None else options.seed + len(turns)
        return generate.Answer(decoder, turns, me, options.max_tokens, options.temperature, options.top_p, seed)

    if options.prompt is not None:
        said = answer([turn(you, False, options.prompt)])
        list(said)
        print("\n".join(said.messages))
        return
    talk(me, you, answer)


def who(folder, options):
    """(me, the one who talks to me): as the flags say, else from `persona.json`, else plain names."""
    persona = config.read_json(folder / "persona.json", {})
    try:
        names = [persona.get("me", "Me"), *(contact["name"] for contact in persona.get("contacts", [])), "Friend"]
        assert all(isinstance(name, str) for name in names)
    except (AssertionError, KeyError, TypeError):
        raise UserError(f"{folder / 'persona.json'} holds no names", 'It is {"me": NAME, "contacts": [{"name": NAME}, …]}.') from None
    return options.me or names[0], options.as_ or names[1]


def turn(author, me, text):
    return data.Turn(author, me, "", [message for message in (line.strip() for line in text.split("\n")) if message])


def talk(me, you, answer):
    """Read lines, stream answers, until the end of input. Ctrl-C stops an answer; a second one, or one at the prompt, ends."""
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401  arrow keys and history in input()

        print(f"An AI imitation of {me}. You are {you}. Ctrl-D ends.\n")
    turns = []
    while True:
        try:
            text = input(f"{you}: " if interactive else "")
        except EOFError:
            if interactive:
                print()
            return
        if not text.strip():
            continue
        turns.append(turn(you, False, text))
        shown = Shown(me)
        try:
            for messages in answer(turns):
                shown.update(messages)
        except KeyboardInterrupt:
            pass
        shown.end()
        if shown.messages:
            turns.append(data.Turn(me, True, "", shown.messages))


class Shown:
    """Messages on the terminal while they grow, each on a line of its own after the name."""

    def __init__(self, name):
        self.name, self.messages = name, []

    def update(self, messages):
        for number, message in enumerate(messages):
            before = self.messages[number] if number < len(self.messages) else None
            if before is None:
                print(("\n" if number else "") + f"{self.name}: {message}", end="", flush=True)
            else:
                print(message[len(before) :], end="", flush=True)
        self.messages = list(messages)

    def end(self):
        print(flush=True)


if __name__ == "__main__":
    config.run(main)
