"""Draw when the clone answers, how fast it types, and when it stays silent.

The numbers are "timing" in persona.json: data.py measures them (exports/timing.py), people may edit
them (docs/CHAT.md). Where "timing" or a part of it is missing or null, DEFAULT's part is used.

    pace = Pace.load("ckpt")
    if not pace.ignores("Bob", generator):
        first = pace.delay("Bob", hour, generator)    # seconds after Bob's last message
        second = pace.gap("a message", generator)     # seconds after the first message

All times are seconds. A message is due that long after the one before it, so the time that the
model needs to write it is included. `generator` is numpy's, so draws can be seeded.
The terminal, the server and the bot have a Pacer, which makes a Schedule for each answer.
"""

import datetime
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import cli
import data
from cli import UserError

GROUPS = ""  # in place of a contact's name: any group
EDIT_HINT = 'docs/CHAT.md explains the numbers. Without "timing" defaults are used.'
# Defaults for clones without "timing". Typing speed: 36 words per minute on a phone (Palin et al.
# 2019, 10.1145/3338286.3340120). The rest is a guess.
DEFAULT: dict[str, Any] = {
    "everyone": {
        "delay": {"5%": 4, "25%": 12, "50%": 30, "75%": 120, "95%": 1800},
        "unanswered": 0.1,
        "openings_per_day": 0.1,
    },
    "groups": {"unanswered": 0.8},
    "contacts": {},
    "delay_by_hour": [1] * 24,
    "opening_hours": [0] * 8 + [1] * 15 + [0],
    "typing": {
        "pause": 1.5,
        "characters_per_second": 3,
        "spread": {"5%": 0.4, "25%": 0.7, "50%": 1, "75%": 1.5, "95%": 3},
    },
    "messages_per_turn": {"50%": 1, "75%": 2, "95%": 4},
}


class Quantiles(NamedTuple):
    """A distribution: the share `shares[i]` of it is at most `values[i]`. Both ascend."""

    shares: np.ndarray
    values: np.ndarray

    def at(self, share: float | np.ndarray) -> Any:
        """Return the value at a share: between two quantiles the logarithm is linear."""
        logs = np.log(np.maximum(self.values, 1e-3))
        return np.exp(np.interp(share, self.shares, logs))


class Pace:
    """My timing. `measured`: whether persona.json has any; else all of it is DEFAULT's.

    `timing`: as in persona.json; `path`: the file that errors name. No wait is longer than
    `longest_wait` seconds.
    """

    def __init__(self, timing: dict, longest_wait: float = 30.0, path: str | Path = "persona.json"):
        self.longest_wait = longest_wait
        self.measured = bool(timing)
        check = Checker(path)
        timing = DEFAULT | check.fields("", timing, DEFAULT)
        self.default_habits = check.habits("everyone", DEFAULT["everyone"])
        self.everyone = check.habits("everyone", timing["everyone"])
        self.habits = {}  # by contact
        for name, habits in check.fields("contacts", timing["contacts"]).items():
            self.habits[name] = check.habits(f"contacts.{name}", habits)
        groups = DEFAULT["groups"] | check.fields("groups", timing["groups"])
        self.habits[GROUPS] = check.habits("groups", groups)

        self.delay_by_hour = check.by_hour("delay_by_hour", timing["delay_by_hour"])
        weights = check.by_hour("opening_hours", timing["opening_hours"])
        self.opening_hours = weights / weights.sum() if weights.any() else np.full(24, 1 / 24)
        self.messages_per_turn = check.quantiles("messages_per_turn", timing["messages_per_turn"])

        known = DEFAULT["typing"]
        typing = known | check.fields("typing", timing["typing"], known)
        self.pause = check.number("typing.pause", typing["pause"])
        speed = typing["characters_per_second"]
        self.characters_per_second = check.number("typing.characters_per_second", speed, 0.1)
        self.spread = check.quantiles("typing.spread", typing["spread"])

    @classmethod
    def load(cls, folder: str | Path, longest_wait: float = 30.0) -> "Pace":
        """Read "timing" of a folder's persona.json. UserError for numbers that can't be."""
        path = Path(folder) / "persona.json"
        timing = cli.read_json(path, {}).get("timing")
        return cls({} if timing is None else timing, longest_wait, path)

    def delay(self, contact: str, hour: int, generator: np.random.Generator) -> float:
        """Draw the seconds from a contact's last message to the first of my answer.

        `contact`: a name in persona.json, any other name for a stranger, or GROUPS. `hour`: when
        the contact's message came, by my clock, 0 to 23. At most `longest_wait`.
        """
        seconds = self.habit(contact, "delay").at(generator.random()) * self.delay_by_hour[hour]
        return float(min(seconds, self.longest_wait))

    def gap(self, message: str, generator: np.random.Generator) -> float:
        """Draw the seconds from one message of mine to `message`, the next of the same turn.

        At most `longest_wait`.
        """
        seconds = self.typing_seconds(message) * self.spread.at(generator.random())
        return float(min(seconds, self.longest_wait))

    def typing_seconds(self, message: str) -> float:
        """Return the median of what I need for a message: how long "is typing" is shown for it."""
        return self.pause + len(message) / self.characters_per_second

    def ignores(self, contact: str, generator: np.random.Generator) -> bool:
        """Draw whether I leave a turn of a contact (as in `delay`) without an answer."""
        return bool(generator.random() < self.habit(contact, "unanswered"))

    def openings_per_day(self, contact: str) -> float:
        """Return how many talks with a contact (as in `delay`) I open on an average day.

        `opening_hours`, (24,) weights with sum 1, are when, by my clock.
        """
        return self.habit(contact, "openings_per_day")

    def habit(self, contact: str, name: str) -> Any:
        """Return a habit towards a contact; where it's unknown, towards everyone."""
        for habits in (self.habits.get(contact, {}), self.everyone):
            if name in habits:
                return habits[name]
        return self.default_habits[name]


class Schedule:
    """When the messages of one answer are due, by time.monotonic(). It begins when it is made.

    `contact`: who wrote, as in Pace.delay.
    """

    def __init__(self, pace: Pace, contact: str, generator: np.random.Generator):
        self.pace = pace
        self.generator = generator
        self.before = time.monotonic()  # when the message before was due
        self.wait: float | None = pace.delay(contact, datetime.datetime.now().hour, generator)

    def next(self, message: str) -> tuple[float, float]:
        """Return when "is typing" is shown for the next message, and when that is due.

        A message that the model finished too late is due now, and the next one after that.
        """
        wait = self.pace.gap(message, self.generator) if self.wait is None else self.wait
        self.wait = None
        now = time.monotonic()
        self.before = max(now, self.before + wait)
        return max(now, self.before - self.pace.typing_seconds(message)), self.before


class Pacer:
    """What --pace, --may-ignore and a bot's flags ask for. `pace`: None where they ask nothing."""

    def __init__(self, pace: Pace | None, human: bool, may_ignore: bool, seed: int | None = None):
        self.pace = pace
        self.human = human
        self.may_ignore = may_ignore
        self.generator = np.random.default_rng(seed)

    @classmethod
    def load(cls, folder: str | Path, options: Any) -> "Pacer":
        """Read the pace that chat.py's Options ask for from a checkpoint. UserError for a bad edit.

        The default is human for a Telegram bot, fast elsewhere.
        """
        human = (options.pace or ("human" if options.telegram else "fast")) == "human"
        pace = None
        if human or options.may_ignore or options.speaks_up or options.initiates:
            pace = Pace.load(folder, options.longest_wait)
            if not pace.measured:
                print("(persona.json has no timing: its pace is a default)", file=sys.stderr)
        return cls(pace, human, options.may_ignore, options.seed)

    def ignores(self, contact: str) -> bool:
        return bool(self.pace and self.may_ignore and self.pace.ignores(contact, self.generator))

    def schedule(self, contact: str) -> Schedule | None:
        """Begin the schedule of an answer to a contact; None: each message is due at once."""
        return Schedule(self.pace, contact, self.generator) if self.pace and self.human else None


def hold_back(
    stream: Iterable[list[str]], schedule: Schedule, show_typing: Callable[[], object]
) -> Iterator[list[str]]:
    """Yield the messages of a growing answer one more at a time, each whole and when it is due.

    Until then the model goes on only as far as the beginning of the next message.
    """
    messages: list[str] = []
    shown = 0

    def wait_for(message: str) -> None:
        typing, due = schedule.next(message)
        time.sleep(max(0, typing - time.monotonic()))
        show_typing()
        time.sleep(max(0, due - time.monotonic()))

    for messages in stream:
        while shown < len(messages) - 1:
            wait_for(messages[shown])
            shown += 1
            yield messages[:shown]
    while shown < len(messages):
        wait_for(messages[shown])
        shown += 1
        yield messages[:shown]


def timing_table(
    folders: Mapping[str, str | Path],
    replies: Mapping[str, list[list[str]]],
    prompts: list[data.Turn],
    seed: int,
) -> dict[str, dict]:
    """Draw when replies come to `prompts`, by the timing in each folder: {name: quantiles, …}.

    No wait is cut. A folder without timing isn't in the table.
    """
    table = {}
    for name, folder in folders.items():
        pace, draw = Pace.load(folder, math.inf), np.random.default_rng(seed)
        delays: list[float] = []
        gaps: list[float] = []
        for prompt in prompts:
            hour = int(prompt.at[11:13] or 12)
            delays.append(pace.delay(prompt.author, hour, draw))
        for messages in replies[name]:
            gaps += [pace.gap(message, draw) for message in messages[1:]]
        counts = [len(messages) for messages in replies[name]]
        if pace.measured:
            table[name] = {
                "delay": summary(delays),
                "gap": summary(gaps),
                "messages": summary(counts),
            }
    return table


def summary(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    median, high = np.quantile(values, [0.5, 0.9])
    return {"50%": float(median), "90%": float(high), "mean": float(np.mean(values))}


class Checker:
    """Parse what a person may have edited. UserError names the file and the place in it."""

    def __init__(self, path: str | Path):
        self.path = path

    def error(self, place: str, wanted: str, value: Any) -> UserError:
        place = f"timing.{place}".rstrip(".")
        return UserError(f"{self.path}: {place} must be {wanted}, got {value!r:.60}", EDIT_HINT)

    def fields(self, place: str, value: Any, known: Any = None) -> dict:
        """Return an object's fields that aren't null. `known`: the names there may be."""
        if not isinstance(value, dict):
            raise self.error(place, "an object", value)
        for name in value:
            if known is not None and name not in known:
                raise self.error(place, f"an object of {', '.join(known)}", name)
        return {name: item for name, item in value.items() if item is not None}

    def number(self, place: str, value: Any, least: float = 0, most: float = 1e6) -> float:
        if type(value) not in (int, float) or not least <= value <= most:
            raise self.error(place, f"a number from {least:g} to {most:g}", value)
        return float(value)

    def by_hour(self, place: str, values: Any) -> np.ndarray:
        """Return a list of 24 numbers, from midnight on."""
        if not isinstance(values, list) or len(values) != 24:
            raise self.error(place, "a list of 24 numbers", values)
        return np.array([self.number(f"{place}[{i}]", value) for i, value in enumerate(values)])

    def quantiles(self, place: str, value: Any) -> Quantiles:
        """Parse {"50%": 12, "90%": 60}: in any order, but a larger share has no smaller value."""
        wanted = 'quantiles such as {"50%": 12, "90%": 60}'
        pairs = []
        for name, number in self.fields(place, value).items():
            try:
                share = float(name.removesuffix("%")) / 100
            except ValueError:
                raise self.error(place, wanted, name) from None
            if not 0 <= share <= 1:
                raise self.error(place, "quantiles from 0% to 100%", name)
            pairs.append((share, self.number(f"{place}.{name}", number)))
        if not pairs:
            raise self.error(place, wanted, value)
        shares, values = np.array(sorted(pairs)).T
        if (np.diff(values) < 0).any():
            raise self.error(place, "quantiles that rise", value)
        return Quantiles(shares, values)

    def habits(self, place: str, value: Any) -> dict:
        """Parse the habits towards a contact, towards everyone or in groups."""
        habits = self.fields(place, value, DEFAULT["everyone"])
        if "delay" in habits:
            habits["delay"] = self.quantiles(f"{place}.delay", habits["delay"])
        for name, most in (("unanswered", 1), ("openings_per_day", 1000)):
            if name in habits:
                habits[name] = self.number(f"{place}.{name}", habits[name], 0, most)
        return habits
