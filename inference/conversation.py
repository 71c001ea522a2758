"""A conversation with the clone: its turns, the commands that change it, the file that keeps it.

The terminal (chat.py) and the Telegram bot share it.
"""

import datetime
import re
from pathlib import Path

import cli
import data

MAX_TEMPERATURE = 10


def now() -> str:
    return datetime.datetime.now().isoformat(timespec="seconds")


class Conversation:
    """The turns of `me` and `you`. `history`: the file that keeps them, or None."""

    def __init__(self, me: str, you: str, history: Path | None = None, temperature: float = 0.7):
        self.me = me
        self.you = you
        self.history = history
        self.temperature = temperature
        self.attempts = 0  # retries since the start
        self.turns: list[data.Turn] = []
        if history and history.exists():
            for session in data.load_sessions(history):
                self.turns += session.turns

    def add(self, turn: data.Turn) -> None:
        """Add another's turn, to the one before if that was left unanswered."""
        if self.turns and self.turns[-1].author == turn.author:
            self.turns[-1].messages += turn.messages
        else:
            self.turns.append(turn)

    def change(self, command: str, argument: str = "") -> str | None:
        """Run /temp, /undo or /reset; return what to say, None if the command isn't understood."""
        if command == "temp" and re.fullmatch(r"\d*\.?\d+", argument):
            if float(argument) > MAX_TEMPERATURE:
                return None
            self.temperature = float(argument)
            return f"temperature {self.temperature:g}"
        if command == "reset":
            self.turns.clear()
            self.save()
            return "new conversation"
        if command in ("retry", "undo") and not self.turns:
            return "there are no messages yet"
        if command != "undo":
            return None
        while self.turns.pop().me and self.turns:
            pass
        self.save()
        return f"removed; {cli.counted(len(self.turns), 'turns')} left"

    def drop_reply(self) -> int:
        """Remove my last turn, if the last is mine; return the number of the next attempt."""
        if self.turns[-1].me:
            self.turns.pop()
        self.attempts += 1
        return self.attempts

    def session(self) -> data.Session | None:
        """Return what the file keeps, None for an empty file."""
        if not self.turns:
            return None
        return data.Session(self.you, "chat.py", "personal_chat", self.turns[0].at, self.turns)

    def save(self) -> None:
        if self.history:
            session = self.session()
            cli.write_text(self.history, session.to_json() + "\n" if session else "")


def reply_seed(seed: int | None, turns: list[data.Turn], attempt: int) -> int | None:
    """With --seed a reply depends on the number of turns before it and of retries."""
    return None if seed is None else seed + len(turns) + 1_000_003 * attempt
