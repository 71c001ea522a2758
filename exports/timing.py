"""Measure when I answer and how fast I type, as messages stream by: "timing" in persona.json.

    TimingStats.watch ▶ Habits of each contact, gaps, turns ─ report ▶ quantiles (inference/pace.py)

A delay is the time from a contact's last message to my answer. A gap is the time between two of my
messages in one turn. Of each at most SAMPLE are kept, a random sample, so memory doesn't grow with
the export. Messengers round times to the second or (WhatsApp) to the minute. Within half of that a
time is drawn at random, so that quantiles don't jump.
"""

import collections
import random
from array import array
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from exports import Chat, Message
from exports.report import MARK

SHARES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)  # quantiles that are written
ANSWER_SECONDS = 12 * 3600  # an answer comes within this time; what I write later opens a talk
TALK_SECONDS = 3600  # of silence end a talk
SAMPLE = 4096  # values that are kept of each contact
GAPS = 5 * SAMPLE
MIN_VALUES = 30  # to measure something by
MIN_DAYS = 14  # with a contact, to count openings a day
# Standard errors by which the share of slow answers in an hour must differ from half
SIGNIFICANT = 3
MAX_FACTOR = 10  # of an hour's delays
MAX_TURN = 100  # messages
SAME_TIME = 20  # messages of one minute, after which its times are an import's, not a talk's
MAX_SECONDS_A_CHARACTER = 10  # what takes longer isn't typed
LENGTH_BINS = 8  # bins of a message's length, to which the typing speed is fitted
DAY = 86400


class Sample:
    """A uniform random sample of pairs of numbers, of at most `size` (Vitter's algorithm R)."""

    __slots__ = ("numbers", "seen", "size")

    def __init__(self, size: int = SAMPLE):
        self.size = size
        self.seen = 0
        self.numbers = array("f")

    def add(self, first: float, second: float, draw: random.Random) -> None:
        self.seen += 1
        if self.seen <= self.size:
            self.numbers.extend((first, second))
        elif (place := draw.randrange(self.seen)) < self.size:
            self.numbers[2 * place : 2 * place + 2] = array("f", (first, second))

    def columns(self) -> np.ndarray:
        """Return the pairs as (2, n) float64."""
        return np.array(self.numbers, float).reshape(-1, 2).T


class Habits:
    """What I do with a contact: `delays` are pairs (seconds, hour of the contact's message)."""

    __slots__ = ("answered", "days", "delays", "openings", "unanswered")

    def __init__(self) -> None:
        self.delays = Sample()
        self.answered = self.unanswered = self.openings = 0
        self.days = 0.0  # from the first message to the last


class TimingStats:
    """Timing over all chats. `me`: my ids; `gap`: seconds of silence that end a turn."""

    def __init__(self, me: Iterable[str], gap: float):
        self.me = frozenset(me)
        self.gap = gap
        self.draw = random.Random(0)
        self.contacts: dict[str | None, Habits] = collections.defaultdict(Habits)
        self.groups = Habits()
        self.gaps = Sample(GAPS)  # pairs (seconds, characters of the later message)
        self.turns: collections.Counter = collections.Counter()  # by their number of messages
        self.opening_hours = np.zeros(24, int)

    def watch(self, chat: Chat, messages: Iterable[Message]) -> Iterator[Message]:
        """Yield a chat's messages, in order of time, and measure them."""
        stats = ChatTiming(self, chat)
        for message in messages:
            stats.add(message)
            yield message
        stats.end()

    def undo_rounding(self, seconds: float, unit: int) -> float:
        """Draw what two times, rounded to `unit` seconds, may have been apart."""
        return abs(seconds + unit * (self.draw.random() - 0.5))

    def report(self, names: Mapping[str | None, str]) -> dict:
        """Return "timing" of persona.json. `names`: of the contacts to list, by id.

        What too little was found of is None.
        """
        habits = {id: self.contacts[id] for id in names if id in self.contacts}
        factors, offsets = fit_hours([*self.contacts.values(), self.groups])
        own = [(names[id], item) for id, item in habits.items() if item.delays.seen >= MIN_VALUES]
        hours = self.opening_hours
        return {
            "everyone": describe_habits([*self.contacts.values()], offsets),
            "groups": describe_habits([self.groups], offsets),
            "contacts": {
                name: without_none(describe_habits([item], offsets)) for name, item in own
            },
            "delay_by_hour": factors,
            "opening_hours": hours.tolist() if hours.sum() >= MIN_VALUES else None,
            "typing": fit_typing(*self.gaps.columns()),
            "messages_per_turn": turn_quantiles(self.turns),
        }


class ChatTiming:
    """The state of one chat. `waiting`: others wrote last, and I haven't answered yet."""

    def __init__(self, stats: TimingStats, chat: Chat):
        self.stats = stats
        self.private = chat.type == "personal_chat"
        self.habits: Habits | None = None if self.private else stats.groups
        self.first: int | None = None
        self.last: Message | None = None
        self.waiting = False
        self.openings = 0  # of mine
        self.turn = 0  # messages of my turn
        self.same_time = 0  # messages since the time last changed

    def add(self, message: Message) -> None:
        last, self.last = self.last, message
        mine = message.author in self.stats.me
        if self.habits is None and not mine:
            self.habits = self.stats.contacts[message.author]
        if last is None:
            self.first = message.at
            silence = None
        else:
            silence = max(0, message.at - last.at)
            self.same_time = self.same_time + 1 if silence == 0 else 0
        if mine:
            self.add_mine(message, last, silence)
        else:
            self.add_theirs(message, last, silence)

    def add_theirs(self, message: Message, last: Message | None, silence: int | None) -> None:
        """Count the turn before as unanswered, if it waits and this is another turn."""
        self.end_turn()
        if self.waiting and last is not None and silence is not None:
            another = not self.private and message.author != last.author
            if (another and silence) or silence > TALK_SECONDS:
                self.count_unanswered()
        self.waiting = True

    def add_mine(self, message: Message, last: Message | None, silence: int | None) -> None:
        """Add a delay, a gap, or a talk that I open."""
        if last is None or silence is None:
            self.open_talk(message)
        elif self.waiting and silence <= ANSWER_SECONDS:
            self.answer(message, last, silence)
        elif self.waiting:
            self.count_unanswered()
            self.open_talk(message)
        elif silence > self.stats.gap:
            self.end_turn()
            if silence > TALK_SECONDS:
                self.open_talk(message)
        elif silence and (message.at % 60 or last.at % 60):
            # Times to the minute tell nothing about typing.
            self.add_gap(message.text, silence)
        self.waiting = False
        self.turn += 1

    def add_gap(self, text: str, silence: int) -> None:
        if text and not MARK.fullmatch(text):
            seconds = self.stats.undo_rounding(silence, 1)
            self.stats.gaps.add(seconds, len(text), self.stats.draw)

    def answer(self, message: Message, last: Message, silence: int) -> None:
        """Add the delay of an answer, unless both have the time of an import."""
        minutes = message.at % 60 == last.at % 60 == 0
        if self.habits is None or (silence == 0 and (not minutes or self.same_time > SAME_TIME)):
            return
        seconds = self.stats.undo_rounding(silence, 60 if minutes else 1)
        self.habits.delays.add(seconds, int(last.date[11:13]), self.stats.draw)
        self.habits.answered += 1

    def open_talk(self, message: Message) -> None:
        self.openings += 1
        self.stats.opening_hours[int(message.date[11:13])] += 1

    def count_unanswered(self) -> None:
        if self.habits is not None:
            self.habits.unanswered += 1

    def end_turn(self) -> None:
        if self.turn:
            self.stats.turns[min(self.turn, MAX_TURN)] += 1
        self.turn = 0

    def end(self) -> None:
        """Count what is known at the end alone. Whether I answer the last turn isn't known."""
        self.end_turn()
        if self.habits is not None and self.last is not None and self.first is not None:
            self.habits.openings += self.openings
            self.habits.days += (self.last.at - self.first) / DAY


# --- samples → numbers


def fit_hours(habits: Iterable[Habits]) -> tuple[list[float] | None, np.ndarray]:
    """Fit how much slower I am at each hour of the day than a contact's median.

    Returns the 24 factors, 1 where chance explains the difference, and their logarithms; None in
    place of factors where too little is known.
    """
    ratios, hours = [], []
    for item in habits:
        seconds, hour = item.delays.columns()
        if len(seconds) >= MIN_VALUES:
            ratios.append(np.log(seconds) - np.median(np.log(seconds)))
            hours.append(hour)
    offsets = np.zeros(24)
    if not ratios:
        return None, offsets
    all_ratios, all_hours = np.concatenate(ratios), np.concatenate(hours)
    for number in range(24):
        here = all_ratios[all_hours == number]
        # A sign test: it needs no normal distribution.
        if len(here) >= MIN_VALUES:
            errors = abs(np.mean(here > 0) - 0.5) / (0.5 / np.sqrt(len(here)))
            if errors > SIGNIFICANT:
                offsets[number] = np.median(here)
    limit = np.log(MAX_FACTOR)
    offsets = np.clip(offsets, -limit, limit)
    factors = [rounded(factor) for factor in np.exp(offsets)]
    return factors, np.log(factors)


def describe_habits(habits: list[Habits], offsets: np.ndarray) -> dict:
    """Return the habits towards contacts; `delay` without what the hour adds to it."""
    logs, weights = [np.zeros(0)], [np.zeros(0)]
    for item in habits:
        seconds, hours = item.delays.columns()
        logs.append(np.log(seconds) - offsets[hours.astype(int)])
        weights.append(np.full(len(seconds), item.delays.seen / max(1, len(seconds))))
    unanswered = sum(item.unanswered for item in habits)
    turns = unanswered + sum(item.answered for item in habits)
    days = sum(item.days for item in habits)
    openings = sum(item.openings for item in habits)
    return {
        "delay": quantiles(np.concatenate(logs), np.concatenate(weights)),
        "unanswered": rounded(unanswered / turns) if turns >= MIN_VALUES else None,
        "openings_per_day": rounded(openings / days) if days >= MIN_DAYS else None,
    }


def without_none(habits: dict) -> dict:
    return {name: value for name, value in habits.items() if value is not None}


def quantiles(logs: np.ndarray, weights: np.ndarray | None = None) -> dict[str, float] | None:
    """Return the quantiles of values, given their logarithms; None of too few."""
    if len(logs) < MIN_VALUES:
        return None
    order = np.argsort(logs)
    weights = np.ones(len(logs)) if weights is None else weights[order]
    shares = (np.cumsum(weights) - weights / 2) / weights.sum()
    values = np.exp(np.interp(SHARES, shares, logs[order]))
    return {percent(share): rounded(value) for share, value in zip(SHARES, values)}


def percent(share: float) -> str:
    return f"{100 * share:g}%"


def turn_quantiles(turns: Mapping[int, int]) -> dict[str, int] | None:
    """Return the quantiles of my turns' lengths in messages; None of too few."""
    lengths = np.array(sorted(turns), int)
    counts = np.array([turns[int(length)] for length in lengths])
    if counts.sum() < MIN_VALUES:
        return None
    places = np.searchsorted(np.cumsum(counts), np.array(SHARES) * counts.sum())
    return {percent(share): int(lengths[place]) for share, place in zip(SHARES, places)}


def fit_typing(seconds: np.ndarray, lengths: np.ndarray) -> dict | None:
    """Fit gaps (n,) to messages' lengths (n,): pause + length / speed, times a random factor.

    Medians of bins of length are fitted, so that no outlier counts. None where too little is known.
    """
    if len(seconds) < MIN_VALUES:
        return None
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, LENGTH_BINS + 1)[1:-1]))
    bins = np.searchsorted(edges, lengths)
    used = np.unique(bins)
    if len(used) < 2:
        return None
    x = np.array([np.mean(lengths[bins == number]) for number in used])
    y = np.array([np.median(seconds[bins == number]) for number in used])
    # The error of a bin's median grows with the median.
    weights = np.sqrt([np.sum(bins == number) for number in used]) / y
    slope, pause = np.polyfit(x, y, 1, w=weights)
    if pause < 0:
        slope, pause = np.average(y / x, weights=(weights * x) ** 2), 0.0
    if slope < 1e-3:  # longer messages take no longer: pasted, or dictated
        slope, pause = 1e-3, np.median(seconds)
    slope = min(slope, MAX_SECONDS_A_CHARACTER)
    speed = rounded(1 / slope)
    pause = rounded(pause)
    spread = quantiles(np.log(seconds) - np.log(pause + lengths / speed))
    return {"pause": pause, "characters_per_second": speed, "spread": spread}


def rounded(value: float) -> float:
    """Round to three digits: nobody edits 12.483920."""
    number = float(f"{value:.3g}")
    return int(number) if number.is_integer() else number
