"""Talk to it, in the terminal: `python chat.py ckpt/`. Each of its messages is a line of its own, as it comes."""

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


def main():
    options = config.parse(Config)
    folder = Path(options.ckpt)
    if not folder.is_dir():
        raise UserError(
            f"{folder}: there is no such folder",
            "Make one: python train.py --lora   (then: python chat.py ckpt/)",
        )
    if not (checkpoint.is_model(folder) or checkpoint.is_adapter(folder)):
        raise UserError(
            f"{folder} holds no model: neither config.json nor adapter_config.json",
            "Give the folder that train.py wrote.",
        )
    if options.prompt is not None and not options.prompt.strip():
        raise UserError("-p is empty", "Say something, or leave it out to talk.")
    me, you = who(folder, options)
    device = checkpoint.pick_device(options.device)
    weights = plan.chat_dtype(folder, options.model, options.context, device, options.weights)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[weights]
    words = tokenizers.load(folder)
    model = checkpoint.load_model(str(folder), dtype, device, options.model, words)
    size = min(options.context, model.config.max_position_embeddings)
    decoder = generate.Decoder(model, words, size)
    generator = torch.Generator().manual_seed(options.seed) if options.seed is not None else None

    def answer(turns, show):
        """The messages with which I go on after `turns`; `show(messages so far)` is called as they grow."""
        room = min(options.max_tokens, size // 2)
        ids = generate.fit(turns, me, words, size - room)
        found = []
        for found in generate.messages(decoder.generate(ids, room, options.temperature, options.top_p, generator), words):
            show(found)
        return found

    if options.prompt is not None:
        print("\n".join(answer([turn(you, False, options.prompt)], lambda found: None)))
        return
    talk(me, you, answer)


def who(folder, options):
    """(me, the one who talks to me): as the flags say, else from `persona.json`, else plain names."""
    me, you = tokenizers.names(folder)
    return options.me or me, options.as_ or you


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
            answer(turns, shown.update)
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
