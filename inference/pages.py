"""The pages that evaluate.py writes: the report, and a blind test for a friend."""

import collections
import json
import sys
from pathlib import Path

import numpy as np

import cli
import data
from cli import UserError
from inference import generate, scoring, style

EXAMPLES = 8  # on the report's page


def fill(template: str, value: dict) -> str:
    """Put JSON into a template, in which no text can end the script that it stands in."""
    text = json.dumps(value, ensure_ascii=False).replace("<", "\\u003c")
    return cli.read_text(Path(__file__).parent / template).replace("{{DATA}}", text)


def report_page(report: dict, replies: dict, examples: list[scoring.Example]) -> str:
    """Fill report.html with the report, and with some examples and what the models replied."""
    shown = []
    for i in scoring.sample(range(len(examples)), EXAMPLES, report["seed"]):
        asked = examples[i].before[-1]
        row = {"author": asked.author, "messages": asked.messages, "mine": examples[i].mine}
        shown.append(row | {name: written[i] for name, written in replies.items()})
    return fill("report.html", report | {"examples": shown})


def chat_with(name: str, held_out: list[data.Session]) -> list[data.Session]:
    """Return the held-out sessions of my chat with `name` alone. UserError unless there is one."""
    private = [session for session in held_out if session.type == "personal_chat"]
    names = {s.chat_id: (s.chat.casefold(), friend_in(s).casefold()) for s in private}
    chats = [chat for chat in names if name.casefold() in names[chat]]
    if len(chats) != 1:
        known = ", ".join(sorted({friend_in(session) for session in private})) or "none"
        raise UserError(
            f"--with {name}: {len(chats)} held-out chats have that name", f"There are: {known}."
        )
    return [session for session in private if session.chat_id == chats[0]]


def friend_in(session: data.Session) -> str:
    """Return the other's name in a chat of two: two chats may have the same one."""
    turns = data.without_header(session).turns
    return next((turn.author for turn in turns if not turn.me), session.chat)


def blind_test(
    decoder: generate.Decoder,
    sessions: list[data.Session],
    elsewhere: set[tuple],
    friend: str,
    count: int,
    seed: int,
) -> str:
    """Show items of my reply and the clone's, one by one, and fill a page with those I approve.

    `elsewhere`: the runs of words in other chats, which the friend must not read.
    """
    examples, draw = scoring.find_examples(sessions), np.random.default_rng(seed)
    items: list[dict] = []
    print(f"What {friend} will see, item by item. y: take it, n: leave it out, q: enough.")
    for i, example in enumerate(scoring.sample(examples, count, seed)):
        answer = generate.Answer(
            decoder, example.before, example.author, scoring.LONGEST, seed=1000 * seed + i
        )
        collections.deque(answer, maxlen=0)  # write it to its end
        reply = data.text_messages(data.Turn("", True, "", answer.messages))
        if reply in ([], example.mine):
            continue
        before = [[turn.author, turn.messages] for turn in example.before[-3:]]
        lines = ["", *(f"{author}: {' / '.join(messages)}" for author, messages in before)]
        lines += [f"  you wrote:  {' / '.join(example.mine)}", f"  the clone:  {' / '.join(reply)}"]
        if style.copied_words(reply, elsewhere):
            lines.append("  ! the clone copies words from another chat")
        print(cli.printable("\n".join(lines)))
        print("Take it? [y/n/q] ", end="", flush=True)
        choice = (sys.stdin.readline() or "q")[0].lower()
        if choice == "q":
            break
        if choice == "y":
            real = int(draw.integers(2))
            replies = [reply, example.mine] if real else [example.mine, reply]
            items.append({"before": before, "replies": replies, "real": real})
    if not items:
        raise UserError(
            "no item was taken: nothing is written", "Say y to those that the friend may see."
        )
    return fill("blind_test.html", {"me": examples[0].author, "items": items})
