"""WhatsApp's exported chat: a text file in the dialect of the phone that wrote it. Some shapes:

    14/03/2021, 22:05 - Bob: On my way                Android
    3/14/21, 10:05 PM - Ann added Bob                 a system line has no `name:`
    [14.03.21, 22:05:33] ~ Bob: image omitted         iPhone; U+200E precedes WhatsApp's own text
    [2021/3/14 下午10:05:33] Bob: <附件：00000012-AUDIO-2021-03-14-22-05-33.opus>

A first pass counts the shapes that lines begin with and, for each, who wrote and what its dates can
mean. A second pass yields the messages of the commonest shape; a line that begins otherwise
continues the message before it.

- The order of day, month and year is the one with the fewest impossible dates and steps back in
  time, then with the fewest different years; then it is habit.
- A word beside the time means the hours that CLDR gives it in any language (whatsapp.toml). An
  unknown one, or one of both halves of the day, means the half in which each day runs forward; if
  nothing tells, its lines are left out and counted.
- The year tells the calendar (1442 is Islamic), and a short year the era beside it (R3). A calendar
  that isn't converted is refused by name.
- A person is a name of at most 60 characters that wrote anything but service messages. A name that
  occurs once and reads like a system line is one.
- A name ends at its first colon, unless a longer one is the chat's title, or a system line ends
  with it ("Ann added Work: Bob"), or every line that begins so has a second colon, after few
  different parts that look like names: in at least 4 lines, or 8 where there is one part.
- What WhatsApp wrote in place of a message is known by its U+200E or angle brackets, then by stems
  of words (whatsapp.toml). Only deletions, missed calls and `null`, which Android doesn't mark, are
  known by their whole text.
"""

import collections
import datetime
import functools
import hashlib
import re
import tomllib
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import NamedTuple

from cli import UserError
from exports import Chat, Message, Reason, fix_dst, make_message
from exports.source import Source

NUM_PASSES = 2  # over the file
LONGEST = 1 << 20  # characters of a message that are kept
MAX_PEOPLE = 20_000  # names that are counted; a chat has at most some thousand members
MAX_WORDS = 64  # unknown words beside the time
EPOCH = datetime.date(1970, 1, 1).toordinal()
# Where year, month and day stand.
ORDERS = {"day first": (2, 1, 0), "month first": (2, 0, 1), "year first": (0, 1, 2)}
LRM = "\u200e"
MARKS = "\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff"  # of direction
ANY_MARK = tuple(MARKS)
BLANK = MARKS + "".join(c for c in map(chr, range(0x3001)) if c.isspace())
UNSEEN = dict.fromkeys(map(ord, BLANK))


# --- the beginnings of lines

SEPARATOR = rf"[{MARKS}]{{0,3}}[-/.]\s?[{MARKS}]{{0,3}}"
DATE = rf"(?P<a>\d{{1,4}}){SEPARATOR}(?P<b>\d{{1,2}}){SEPARATOR}(?P<c>\d{{1,4}})"
# Canada: 22 h 05 min 33 s
TIME = r"(?P<hour>\d{1,2})(?:[:.]|\s?h\s?)(?P<minute>\d\d)(?:(?:[:.]|\smin\s)(?P<seconds>\d\d))?"
WORDS = r"(?:[^\d:/\[\]–-]|(?<=\w)-(?=[^\W\d])){0,24}"
ERA = r"(?P<era>ERA[01]\s|[^\W\d][^\d:/\[\]\n-]{0,15}?)?"  # 民國110/3/14
ERA_1 = r"(?:\s?[^\W\d]{2,9}[01](?!\d))?"  # of Copts and Ethiopians: `5/7/1737 ERA1`
START = rf"[{MARKS}]{{0,9}}(?P<open>\[?)[{MARKS}]{{0,3}}"
END = r"(?P<end>\]\s?|\s[-–]\s|:\s)"
FRONTS = [  # of an export, and of what WhatsApp Web copies
    re.compile(rf"{START}{ERA}{DATE}(?P<before>{ERA_1}{WORDS}){TIME}(?P<after>{WORDS}){END}"),
    re.compile(rf"{START}{TIME}(?P<after>{WORDS})(?P<before>)(?P<era>){DATE}{END}"),
]
NAMED_MONTH = re.compile(rf"{START}.{{1,40}}?[,\s]{WORDS}{TIME}{WORDS}{END}")  # `[1 Nisan 5781, …`
DIGIT = re.compile(r"(?<![^\W\d])\d")  # but not that of ERA1
LOG = re.compile(r"\W*\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d")  # of other programs
AUTHOR = re.compile(r"(.{1,90}?):(?:\s|$)")


# --- words of all languages


def word(text: str) -> str:
    """Return `pm` for `p. m.`. Marks that combine stay: they tell පෙ.ව. from ප.ව."""
    text = unicodedata.normalize("NFC", text).casefold()
    return "".join(c for c in text if unicodedata.category(c)[0] in "LMN")


def fold(text: str) -> str:
    """Drop accents and capitals: `Médias` → `medias`."""
    text = unicodedata.normalize("NFKD", text)
    return "".join(c for c in text if unicodedata.category(c) != "Mn").casefold()


def alternatives(text: str) -> list[str]:
    return [phrase.casefold() for phrase in text.replace("\n", "|").split("|")]


def stems(text: str) -> re.Pattern:
    """Compile a pattern that finds any of these in a folded text."""
    return re.compile(fold("|".join(alternatives(text))))


PHRASES = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
FILLER = {"", *alternatives(PHRASES["filler"])}
EASTERN = {*alternatives(PHRASES["eastern"])}
HOURS: dict[str, tuple[int, ...]] = {}  # by a word beside the time
for hours, words in PHRASES["hours"].items():
    HOURS |= dict.fromkeys(alternatives(words.strip()), tuple(map(int, hours.split())))
for half, hours in ("morning", range(12)), ("evening", range(12, 24)):
    HOURS |= dict.fromkeys(map(word, alternatives(PHRASES[half])), tuple(hours))
ERAS: dict[str, str] = {}  # calendars, by a word beside the date
for calendar, words in PHRASES["eras"].items():
    ERAS |= dict.fromkeys(map(word, alternatives(words)), calendar)
HEBREW = stems(PHRASES["hebrew"])
CYCLIC = re.compile("[甲乙丙丁戊己庚辛壬癸][子丑寅卯辰巳午未申酉戌亥]")  # 辛丑/2/2
DELETED = {*alternatives(PHRASES["deleted"])}
CALLS = {*alternatives(PHRASES["calls"])}
LIVE = {*alternatives(PHRASES["live"])}
WAITING = tuple(alternatives(PHRASES["waiting"]))
BY_ADMIN = tuple(alternatives(PHRASES["by_admin"]))
OMITTED, MEDIA = stems(PHRASES["omitted"]), stems(PHRASES["media"])
ATTACHED, EDITED = stems(PHRASES["attached"]), stems(PHRASES["edited"])
KINDS = [(f"<{kind}>", stems(words)) for kind, words in PHRASES["kinds"].items()]
FILES = [(f"<{k}>", re.compile(name, re.IGNORECASE)) for k, name in PHRASES["files"].items()]
SYSTEM = re.compile(rf'["“„«「]|\w{{5,}}[.] |\b(?:{stems(PHRASES["changed"]).pattern})')
OPENED, CLOSED = "“„«「", "”»」"
OWN_NAME = re.compile(r"(?:IMG|VID|AUD|PTT|STK|DOC)-\d{8}-WA\d|\d{5,}-")  # Android's, the iPhone's
# <attached: 00000012-PHOTO-….jpg>
TAGGED = re.compile(r"<[^<>:：\n]{1,40}[:：]\s?([^<>/\\\0\n]{1,255})>")
# IMG-20210314-WA0003.jpg (file attached)
NOTED = re.compile(r"([^/\\\0]{1,255}\.\w{1,8}) [(<](.{2,60})[)>]")
# Report.pdf • 2 pages
DOCUMENT = re.compile(r"(?!www|http).{1,255}\.[a-z]\w{1,4}(?: • .{1,40})?", re.IGNORECASE)
LOCATION = re.compile(
    r"[^\n:：]{2,30}[:：] ?(?:.{0,300}\s)?"
    r"https://(?:maps\.google\.com/\?q=-?\d|foursquare\.com/v/)\S*",
    re.DOTALL,
)
OPTION = re.compile(r"[^:：]{2,25}[:：] .*\(\D{0,3}\d[^()]*\)")  # OPTION: Pizza (2 votes)
MEDIA_SIGN = re.compile(f"[<(:：{LRM}]")  # in whatever isn't a person's text
MENTION = re.compile("@\u2068([^\u2068\u2069]{0,100})\u2069")
COPY = re.compile(r"(?:\s?\(\d{1,2}\)|_\d{1,2})+$")
TITLE = re.compile(PHRASES["title"].replace("\n", ""), re.IGNORECASE)


# --- calendars

COPTIC, AMETE_ALEM = "Coptic or Ethiopic", "Ethiopic (Amete Alem)"
YEARS = {  # by which a calendar is known
    "Persian": range(1388, 1430),
    "Islamic": range(1430, 1480),
    COPTIC: range(1725, 1770),
    "Indian": range(1930, 1970),
    "Buddhist": range(2401, 2700),
    "Hebrew": range(5769, 5860),
    AMETE_ALEM: range(7500, 7600),
    "Minguo": range(98, 200),
}
CENTURIES = {"Islamic": 1400, "Persian": 1400, "Buddhist": 2500, "Minguo": 100}  # of short years
YEARS_BEHIND = {"Buddhist": -543, "Minguo": 1911, "Reiwa": 2018, "Heisei": 1988}  # our own
REFUSED = {"Hebrew", "Indian", COPTIC, AMETE_ALEM, "Chinese"}
FIRST_YEAR = "2009"  # WhatsApp's
THIS_YEAR = "2026"  # at least, if this machine's clock is wrong


class Front(NamedTuple):
    """What a message's line begins with."""

    shape: str  # what all lines of a file share: `9/9/y,9:9half-`
    date: tuple[int, int, int]  # in the order of the file
    era: str  # the calendar that a word beside the date names
    half: str  # the word beside the time that tells AM from PM
    clock: tuple[int, int, int]  # hour, minute, second as written
    habit: str  # the order that such dates have where nothing else tells
    rest: str


def parse_front(line: str) -> Front | None:
    """Return the front of a message's first line; None for a line that continues a message."""
    match = FRONTS[0].match(line) or FRONTS[1].match(line)
    if not match or not (layout := parse_layout(DIGIT.sub("9", match[0]))):
        return None
    shape, era, half, habit = layout
    a, b, c, hour, minute, second = match.group("a", "b", "c", "hour", "minute", "seconds")
    if habit == "month first" and "0" in (a[0], b[0]):
        habit = "day first"
    date, clock = (int(a), int(b), int(c)), (int(hour), int(minute), int(second or 0))
    return Front(shape, date, era, half, clock, habit, line[match.end() :])


@functools.lru_cache(1 << 12)
def parse_layout(skeleton: str) -> tuple[str, str, str, str] | None:
    """Return (shape, era, half, habit) of a front with 9 for each digit; None of another line."""
    match = FRONTS[0].match(skeleton) or FRONTS[1].match(skeleton)
    if not match or bool(match["open"]) != match["end"].startswith("]"):
        return None
    words = {group: word(match[group]) for group in ("before", "after")}  # the time
    shape, half, era = match[0], "", ""
    if match["era"]:
        era = "Chinese" if CYCLIC.search(match["era"]) else ERAS.get(word(match["era"]), "")
        if not era:
            return None
    before_era = words["after"] in HOURS or words["before"] not in ("am", "ص")
    if any(map(str.isdigit, words["before"])):
        era, words["before"] = COPTIC, ""
    elif words["before"] in ERAS and before_era:  # am and ص are eras too
        era, words["before"] = ERAS[words["before"]], ""
    for group in sorted(words, key=lambda group: -match.start(group)):
        plain = words[group]
        if plain not in FILLER or group == "after" and plain in HOURS:
            half = half or plain
            shape = f"{shape[: match.start(group)]}half{shape[match.end(group) :]}"
    shape = re.sub(r"\d+", "9", re.sub(r"\d{3,}", "y", shape)).translate(UNSEEN)
    habit = "year first" if half in EASTERN or match["era"] else "day first"
    if "9/" in shape and match["after"].strip(BLANK) in ("AM", "PM"):  # the United States
        habit = "month first"
    return shape, era, half, habit


@functools.lru_cache(1 << 12)
def hour_of(half: str, hour: int) -> int | None:
    """Return the hour of 24 that an hour beside this word is; None where the word doesn't tell."""
    hours = HOURS.get(half)
    if not half or hours and hour > 12:
        return hour
    possible = [at for at in possible_hours(hour) if hours and at in hours]
    return possible[0] if len(possible) == 1 else None


def possible_hours(hour: int) -> list[int]:
    return [hour] if hour > 12 else [hour % 12, hour % 12 + 12]


@functools.lru_cache(1 << 14)
def day_of(date: tuple, era: str, order: str) -> tuple[int | None, str, str]:
    """Return (days since 1970 or None, ISO date, the calendar or "" for our own)."""
    year, month, day = (date[place] for place in ORDERS[order])
    calendar = next((name for name, years in YEARS.items() if year in years), "")
    if era and (year < 100 or era in (COPTIC, "Chinese") and 1900 < year < 2100):
        calendar = era
    if year < 100:
        if calendar in CENTURIES:
            year += CENTURIES[calendar] - 100 * (calendar in ("Persian", "Minguo") and year > 87)
        elif not calendar:
            year += 2000 if year < 52 else 1957  # Thailand's years: 2564 was 2021
    try:
        ours = ordinal(calendar, year + YEARS_BEHIND.get(calendar, 0), month, day)
        return ours - EPOCH, datetime.date.fromordinal(ours).isoformat(), calendar
    except (ValueError, OverflowError):
        return None, "", calendar


def ordinal(calendar: str, year: int, month: int, day: int) -> int:
    """Return a date's proleptic ordinal (1 is 1 January of the year 1); ValueError of no date."""
    if calendar == "Persian":
        leap = (25 * year + 11) % 33 < 8
        days = 31 if month < 7 else 30 if month < 12 or leap else 29
        if not (0 < month < 13 and 0 < day <= days):
            raise ValueError
        new_year = 226894 + 365 * (year - 1) + (8 * year + 21) // 33
        return new_year + 30 * (month - 1) + min(month - 1, 6) + day
    if calendar == "Islamic":
        if not 0 < day < 31:
            raise ValueError
        return first_of_islamic_month(year, month) + day - 1
    if calendar in REFUSED or not 1970 <= year < 2100:
        raise ValueError
    return datetime.date(year, month, day).toordinal()


def first_of_islamic_month(year: int, month: int) -> int:
    """Return its ordinal as Saudi Arabia counts; other countries may be a day off."""
    try:
        from hijridate import Hijri
    except ImportError:
        raise UserError(
            "Dates of the Islamic calendar: hijridate is not installed",
            "pip install -r requirements-extra.txt",
        ) from None
    return Hijri(year, month, 1).to_gregorian().toordinal()


def seconds_of_day(front: Front, halves: Mapping[str, str] | None = None) -> int | None:
    """Return the time of a front in seconds; None where there is no such time.

    `halves`: what words that aren't in HOURS mean: am, pm, or 24 for a word that says nothing.
    """
    hour, minute, second = front.clock
    known = hour_of(front.half, hour)
    if known is None:
        half = (halves or {}).get(front.half)
        known = hour if half == "24" or hour > 12 else hour % 12 + 12 * (half == "pm")
    if known > 23 or minute > 59 or second > 59:
        return None
    return known * 3600 + minute * 60 + second


def is_date(front: Front) -> bool:
    """Return whether a front is a time in any order of day, month and year."""
    for order in ORDERS:
        days, _, calendar = day_of(front.date, front.era, order)
        if calendar in REFUSED or days is not None and seconds_of_day(front) is not None:
            return True
    return False


def lines(source: Source, repairs: collections.Counter) -> Iterator[str]:
    rest = ""
    for piece in source.text(repairs):
        *ended, rest = (rest + piece).split("\n")
        yield from (line.removesuffix("\r") for line in ended)
        rest = rest[: 2 * LONGEST]  # a line without end
    yield rest


def split_name(rest: str, with_colon: Mapping[str, set[str]] | None = None) -> tuple[str, str]:
    """Split `Bob: hi` into display name and text; the name is "" in a system line.

    `with_colon`: names with a colon in them, by what precedes it.
    """
    match = AUTHOR.match(rest)
    name = display(match[1]) if match else ""
    if not match or not 0 < len(name) <= 60:
        return "", rest
    text = rest[match.end() :]
    if with_colon and name in with_colon:
        for end in colons(text):
            longer = f"{name}: {display(text[:end])}"
            if longer in with_colon[name]:
                return longer, text[end + 2 :]
    return name, text


def colons(text: str) -> list[int]:
    """Return where, at the beginning of a text, a name with a colon in it could end."""
    return [i for i, c in enumerate(text[:60]) if c == ":" and not text[i + 1 : i + 2].strip()]


@functools.lru_cache(1 << 12)
def display(name: str) -> str:
    """Return Bob for `~ Bob`, as a group shows whom the phone has no name for."""
    name = "".join(c for c in unicodedata.normalize("NFC", name) if c not in MARKS)
    return " ".join(name.strip().removeprefix("~").split())


class Survey:
    """What the lines of one shape tell together."""

    def __init__(self):
        self.count, self.habits = 0, set()
        self.names: collections.Counter[str] = collections.Counter()
        self.authors: set[str] = set()
        self.wrong: collections.Counter[str] = collections.Counter()  # by order
        self.last = dict.fromkeys(ORDERS, 0)  # by order
        self.years: dict[str, set[str]] = {order: set() for order in ORDERS}
        self.calendars: collections.Counter = collections.Counter()  # by order and calendar
        self.halves, self.colons = Halves(), Colons()

    def add(self, front: Front) -> None:
        self.count += 1
        self.habits.add(front.habit)
        seconds = seconds_of_day(front)
        for order in ORDERS:
            days, date, calendar = day_of(front.date, front.era, order)
            if calendar:
                self.calendars[order, calendar] += 1
            if days is None or seconds is None:
                self.wrong[order] += 1
                _, month, day = (front.date[place] for place in ORDERS[order])
                self.calendars[order, "Chinese"] += (month, day) == (2, 30)
                continue
            at = days * 86400 + seconds
            self.wrong[order] += at < self.last[order]
            self.last[order] = at
            self.years[order].add(date[:4])
        if front.half:
            self.halves.add(front)
        name, text = split_name(front.rest)
        if name and (name in self.names or len(self.names) < MAX_PEOPLE):
            self.names[name] += 1
            self.colons.add(name, text)
            if name not in self.authors and read_text(text, front.shape)[1] != Reason.SERVICE:
                self.authors.add(name)

    def order(self) -> str:
        """Return the order of day, month and year; the rule is at the top of this file."""
        habit = "day first" if len(self.habits) > 1 else next(iter(self.habits), "")

        def unlikely(order):
            years = max(2, len(self.years[order]))
            return self.wrong[order], self.is_odd(order), years, order != habit

        return min(ORDERS, key=unlikely)

    def is_odd(self, order: str) -> bool:
        """Return whether all dates are before WhatsApp, or in the future."""
        years, this_year = self.years[order], max(THIS_YEAR, str(datetime.date.today().year))
        return bool(years) and (max(years) < FIRST_YEAR or min(years) > this_year)

    def refused_calendar(self) -> str:
        """Return the calendar of the dates where it isn't read, else ""."""
        # A second month of 30 days; else Chinese dates look like ours.
        if self.calendars[self.order(), "Chinese"] > 1:
            return "Chinese"
        for (_, calendar), count in self.calendars.items():
            if calendar in REFUSED and 2 * count > self.count:
                return calendar
        return ""

    def people(self, title: str = "") -> tuple[set[str], dict[str, set[str]]]:
        """Return (who wrote, the names with a colon by what precedes it)."""
        systems = [name for name in self.names if SYSTEM.search(fold(name))]
        with_colon = self.colons.names(title, systems)
        people = {name for name in self.authors if is_person(name, self.names[name])}
        for first, names in with_colon.items():
            people -= {name for name in systems if name.endswith(f" {first}")}
            if not self.colons.wrote(first):
                people.discard(first)
            people |= names
        return people, with_colon


class Halves:
    """What words that no language of ours has mean beside the time."""

    def __init__(self):
        # By word: how many lines have it, and how many show that it means am, pm or nothing.
        self.votes: dict[str, collections.Counter] = {}
        self.last: Front | None = None

    def add(self, front: Front) -> None:
        """Of two lines of one day, count what lets the first one be the earlier one."""
        last, self.last = self.last, front
        hour = hour_of(front.half, front.clock[0])
        if hour is None and (front.half in self.votes or len(self.votes) < MAX_WORDS):
            votes = self.votes.setdefault(front.half, collections.Counter())
            votes["lines"] += 1
            # After a short year the word may be an era.
            votes["nothing"] += front.clock[0] > 12 and max(front.date) > 99
        if not last or last.date != front.date or last.half == front.half:
            return
        last_hour = hour_of(last.half, last.clock[0])
        if None not in (last_hour, hour):
            return
        first = possible_hours(last.clock[0]) if last_hour is None else [last_hour]
        second = possible_hours(front.clock[0]) if hour is None else [hour]
        pairs = []
        for a in first:
            for b in second:
                if (a, *last.clock[1:]) <= (b, *front.clock[1:]):
                    pairs.append((a, b))
        for half, known, hours in zip((last.half, front.half), (last_hour, hour), zip(*pairs)):
            if known is None and len({*hours}) == 1 and half in self.votes:
                self.votes[half]["pm" if hours[0] > 11 else "am"] += 1

    def meanings(self) -> dict[str, str]:
        """Return what each word means: am, pm, 24 (nothing), or "" where nothing tells."""
        meanings = {}
        for half, votes in self.votes.items():
            if votes["nothing"] and half not in HOURS:
                meanings[half] = "24"
            elif votes["am"] > 3 * votes["pm"]:
                meanings[half] = "am"
            else:
                meanings[half] = "pm" if votes["pm"] > 3 * votes["am"] else ""
        return meanings


class Colons:
    """Which names may have a colon in them; the rule is at the top of this file."""

    def __init__(self):
        self.plain = set()  # names that began many lines without another colon
        self.bare = collections.defaultdict(list)  # the first of these lines: `Work: Bob left`
        # By name: what stood between its colon and the next.
        self.parts = collections.defaultdict(collections.Counter)

    def add(self, name: str, text: str) -> None:
        if name in self.plain:
            return
        ends = colons(text)
        if not ends:
            self.bare[name].append(text[:200])
            if len(self.bare[name]) > 20:
                self.plain.add(name)
        for end in ends[:2]:
            if len(self.parts[name]) < 1000:
                self.parts[name][display(text[:end])] += 1

    def names(self, title: str, systems: list[str]) -> dict[str, set[str]]:
        """Return {what precedes the colon: names}. `systems`: as `Ann added Work`, of `…: Bob`."""
        with_colon = {}
        for name, parts in self.parts.items():
            known = set()
            for part in parts:
                if word(f"{name}{part}") == word(title) or self.is_added(name, part, systems):
                    known.add(part)
            firsts = [part for part in parts if ": " not in part]
            total = sum(parts[part] for part in firsts)
            few = total >= (4 if len(firsts) > 1 else 8) and total >= 2 * len(firsts)
            other = not self.wrote(name) and word(name) != word(title)
            if few and other and all(map(looks_like_name, firsts)):
                known = known or {*firsts}
            if known:
                with_colon[name] = {f"{name}: {part}" for part in known}
        return with_colon

    def wrote(self, name: str) -> bool:
        """Return whether a name began lines without another colon that aren't system lines."""
        parts = tuple(f"{part} " for part in self.parts[name])
        for text in self.bare[name]:
            if not text.startswith(parts) or not SYSTEM.search(fold(text)):
                return True
        return name in self.plain

    def is_added(self, name: str, part: str, systems: list[str]) -> bool:
        """Return whether a system line ends with a name and a colon and this part."""
        for system in systems:
            if system.endswith(f" {name}") and part in map(display, self.bare[system]):
                return True
        return False


def looks_like_name(text: str) -> bool:
    few_words = len(text.split()) < 5 and "://" not in text
    return few_words and not text[:1].islower() and any(map(str.isalpha, text))


def is_person(name: str, times: int) -> bool:
    opened, closed = (sum(map(name.count, quotes)) for quotes in (OPENED, CLOSED))
    unclosed = opened > closed or name.count('"') % 2
    return not (unclosed and len(name.split()) > 3) and (times > 1 or not SYSTEM.search(fold(name)))


def can_read(head: str) -> bool:
    full_lines = [line for line in head.split("\n") if line.strip(BLANK)]
    if named_calendar(full_lines[:40]):
        return True
    fronts = []
    for line in full_lines:
        front = parse_front(line)
        fronts.append(front if front and is_date(front) else None)
    unknown = collections.Counter(front.half for front in fronts if front)
    for i, front in enumerate(fronts):
        if front and front.half and front.half not in HOURS:
            # An unknown word stands in several lines, beside hours up to 12.
            if unknown[front.half] < 2 or front.clock[0] > 12 or front.shape.endswith(":"):
                fronts[i] = None
    dated = [front for front in fronts if front]
    if not dated or not (fronts[0] or sum(map(bool, fronts[:40])) > 2):
        return False
    # WhatsApp begins a chat with a line of its own, a log doesn't.
    first = full_lines[fronts.index(dated[0])]
    is_log = LOG.match(first) and LRM not in head
    return not is_log and any(split_name(front.rest)[0] for front in dated)


def named_calendar(head: list[str]) -> str:
    """Return the calendar whose months these lines' dates name in words; "" of numbers."""
    dates = [match[0] for line in head if (match := NAMED_MONTH.match(line))]
    for calendar, months in ("Hebrew", HEBREW), ("Chinese", CYCLIC):
        if dates and 2 * sum(bool(months.search(fold(date))) for date in dates) > len(head):
            return calendar
    return ""


def read(source: Source, repairs: collections.Counter) -> Iterator[tuple[Chat, Iterator[Message]]]:
    """See `exports`. The file is read twice."""
    surveys: dict[str, Survey] = collections.defaultdict(Survey)
    head: list[str] = []
    for line in lines(source, collections.Counter()):
        if front := parse_front(line):
            surveys[front.shape].add(front)
        elif len(head) < 40 and line.strip(BLANK):
            head.append(line)
    shape, survey = max(surveys.items(), key=lambda item: item[1].count, default=("", Survey()))
    layout = Layout(shape, survey.order(), survey.halves.meanings())
    calendar = survey.refused_calendar() if survey.count else named_calendar(head)
    refuse(source, survey, layout, calendar)
    name = chat_name(source)
    people, with_colon = survey.people(name)
    known = name or ", ".join(sorted(people))
    # The id is written into data/: it holds no name and no number of a contact.
    id = hashlib.blake2b(known.encode(), digest_size=8).hexdigest()
    chat_type = "personal_chat" if len(people) < 3 else "private_group"
    if source.attached:
        repairs["files that were sent in a chat, not read as chats"] += source.attached
    chat = Chat(f"whatsapp:{known}", f"whatsapp:{id}", chat_type, name or "WhatsApp", None)
    yield chat, messages(source, repairs, layout, people, with_colon)


class Layout(NamedTuple):
    """How a file's messages begin."""

    shape: str
    order: str  # of day, month and year
    halves: dict[str, str]  # what unknown words beside the time mean

    def half_of(self, front: Front) -> str:
        """Return what an unknown word of a front means, "24" of a known one."""
        known = not self.halves or hour_of(front.half, front.clock[0]) is not None
        return "24" if known else self.halves.get(front.half, "")

    def time_of(self, front: Front | None) -> tuple[int, str] | None:
        """Return (seconds since 1970, ISO time), local; None of a line that begins otherwise."""
        if not front or front.shape != self.shape:
            return None
        days, date, _ = day_of(front.date, front.era, self.order)
        seconds = seconds_of_day(front, self.halves)
        if days is None or seconds is None:
            return None
        clock = f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"
        return days * 86400 + seconds, f"{date}T{clock}"


def refuse(source: Source, survey: Survey, layout: Layout, calendar: str) -> None:
    """Raise UserError where most lines can't be dated."""
    hint = (
        "Set the phone to the Gregorian calendar and a language whose dates are numbers, "
        "then export again."
    )
    if calendar:
        raise UserError(f"{source} has dates of the {calendar} calendar, which is not read", hint)
    if survey.is_odd(layout.order):
        year = max(survey.years[layout.order])
        raise UserError(
            f"{source} has dates of the year {year}: they are of a calendar that is not known", hint
        )
    unknown = [half for half, meaning in layout.halves.items() if not meaning]
    if 2 * sum(survey.halves.votes[half]["lines"] for half in unknown) > survey.count:
        names = " and ".join(f"“{half}”" for half in sorted(unknown)[:4])
        raise UserError(
            f"{source}: {names} beside the time, is that AM or PM?",
            "Set the phone to 24 hours, then export again.",
        )


def messages(
    source: Source,
    repairs: collections.Counter,
    layout: Layout,
    people: set[str],
    with_colon: dict[str, set[str]],
) -> Iterator[Message]:
    last = None
    for (at, date), text in blocks(source, repairs, layout):
        if len(text) > LONGEST:
            repairs["messages cut to a million characters"] += 1
            text = text[:LONGEST]
        last = fix_dst(at, last)
        name, body = split_name(text, with_colon)
        if name in people:
            body, reason = read_text(body, layout.shape, source.beside)
            yield make_message((None, f"whatsapp:{name}", name, last, date, body, reason))
        else:
            text = text.strip(BLANK)
            yield make_message((None, None, None, last, date, text, Reason.SERVICE))


def blocks(
    source: Source, repairs: collections.Counter, layout: Layout
) -> Iterator[tuple[tuple[int, str], str]]:
    """Yield (time, text) of each message: what follows the front, with the lines that continue."""
    time, text, size, skipped = None, [], 0, False
    for line in lines(source, repairs):
        front = parse_front(line)
        new_time = layout.time_of(front)
        if front and new_time:
            if time:
                yield time, "\n".join(text)
            half = layout.half_of(front)
            skipped = not half
            time, text, size = None if skipped else new_time, [front.rest], len(front.rest)
            if half != "24":
                outcome = f"taken for {half.upper()}" if half else "which may be AM or PM: left out"
                repairs[f"lines with “{front.half}” beside the time, {outcome}"] += 1
        elif not skipped:
            if front:
                repairs["lines with a date of another format, kept as text"] += 1
            if not time:
                repairs["lines before the first message"] += 1
            elif size <= LONGEST:
                text.append(line)
                size += 1 + len(line)
    if time:
        yield time, "\n".join(text)


def read_text(text: str, shape: str, beside: Callable = lambda name: None) -> tuple[str, str]:
    """Return (text, why it is left out) of what follows a name.

    `beside`: reads the transcript of a voice message, see Source.beside.
    """
    text = MENTION.sub(r"@\1", without_edited(text))
    plain = text.strip(BLANK)
    key = plain[:200].casefold().rstrip(".。।")
    if key in DELETED or key.startswith(BY_ADMIN):
        return plain, Reason.DELETED
    if key in CALLS or (len(plain) < 200 and key.startswith(WAITING)):
        return plain, Reason.SERVICE
    mark, file, caption = find_media(text, plain, key)
    if caption and not (mark == "<file>" and DOCUMENT.fullmatch(caption)):
        return caption, ""
    if mark == "<voice>" and file:
        mark = (beside(PurePath(file).stem + ".txt") or "")[:LONGEST].strip(BLANK) or mark
    if mark:
        return mark, ""
    iphone = shape.startswith("[") or shape.endswith(":")  # new or old
    # The first line of a poll, which is all that a Survey sees, is `POLL:`.
    if iphone and text.startswith(LRM) and not plain.endswith(":"):
        return plain, Reason.SERVICE
    return plain, "" if plain else Reason.NO_TEXT


def without_edited(text: str) -> str:
    """Cut off the `<This message was edited>` that WhatsApp adds."""
    if ">" not in text:
        return text
    body, _, tail = text.rstrip(BLANK).rpartition("<")
    tail = tail.strip(MARKS)
    phrase = 4 < len(tail) < 60 and tail.endswith(">") and (" " in tail or not tail.isascii())
    return body if phrase and EDITED.search(fold(tail)) else text


def find_media(text: str, plain: str, key: str) -> tuple[str, str, str]:
    """Return (mark, the file's name, caption), each "" where there is none.

    `plain`: `text` stripped; `key`: that in small letters.
    """
    if key in LIVE:
        return "<location>", "", ""
    if not MEDIA_SIGN.search(text):  # nearly always
        return "", "", ""
    if LOCATION.fullmatch(plain[:1000]):
        return "<location>", "", ""
    first, _, rest = plain.partition("\n")
    _, several, option = rest.rpartition("\n")
    is_title = len(first) < 30 and first.endswith((":", "：")) and first == first.upper()
    if several and is_title and OPTION.fullmatch(option):
        return "<poll>", "", ""
    marked = text.startswith(ANY_MARK)
    if match := TAGGED.search(text):
        start, end = match.span()
        if text[start - 1 : start] in ANY_MARK or OWN_NAME.match(match[1]):
            return file_mark(match[1]), match[1], (text[:start] + text[end:]).strip(BLANK)
    if len(first) < 400 and (match := NOTED.fullmatch(first)):
        if marked or OWN_NAME.match(match[1]) or ATTACHED.search(fold(match[2])):
            return file_mark(match[1]), match[1], rest.strip(BLANK)
    if len(first) < 80 and first.startswith("<") and first.endswith(">"):
        if mark := omitted_mark(first) or MEDIA.search(fold(first)) and "<file>":
            return mark, "", rest.strip(BLANK)
    before, mark, phrase = text.rstrip(BLANK).rpartition(LRM)
    phrase, _, rest = phrase.partition("\n")
    if mark and len(phrase) < 60 and (mark := omitted_mark(phrase)):
        return mark, "", f"{before}\n{rest}".strip(BLANK)
    return "", "", ""


def file_mark(file: str) -> str:
    return next((mark for mark, name in FILES if name.search(file)), "<file>")


def omitted_mark(phrase: str) -> str:
    """Return the mark of `Bild weggelassen`; "" of any other phrase."""
    phrase = fold(phrase)
    if not OMITTED.search(phrase):
        return ""
    return next((mark for mark, kind in KINDS if kind.search(phrase)), "")


# --- names of files


def chat_name(source: Source) -> str:
    """Return the chat's name by its file, its zip or its folder; "" where none says WhatsApp."""
    stem = source.path.stem
    if re.fullmatch(r"_?chat[\s\d()_-]*", stem, re.IGNORECASE):
        outer = [source.archive.stem if source.archive else "", source.path.parent.name]
        stem = next((name for name in outer if "whatsapp" in name.casefold()), "")
    if " " not in stem and "whatsapp" in stem.casefold():
        stem = stem.replace("_", " ")
    stem = display(COPY.sub("", stem))
    match = TITLE.fullmatch(stem)
    return display(match[1] or match[2]) if match else stem


def title(name: str) -> str:
    """Return a file's name without what tells copies apart: `Chat (1)`, `Chat_1`."""
    return COPY.sub("", unicodedata.normalize("NFC", name)).replace("_", " ").casefold()


def is_chat(source: Source) -> bool:
    return source.path.suffix == ".txt" and "whatsapp" in title(source.path.stem)


def chat_of_container(container: str, sources: list[Source]) -> list[Source]:
    """Return the one file called as its zip or folder is, or as an iPhone calls it; else [].

    Chats that were sent in it lie beside it: `… with Eve.txt` in `WhatsApp Chat with Bob.zip`.
    """
    name = title(container)
    own = [source for source in sources if is_chat(source) and title(source.path.stem) == name]
    if not own and TITLE.fullmatch(name):
        own = [source for source in sources if source.path.name.startswith("_chat")]
        own = [source for source in own if source.path.suffix == ".txt"]
    if len(own) != 1:
        return []
    own[0].attached = sum(is_chat(source) for source in sources if source is not own[0])
    return own


def drop_attached_chats(sources: list[Source]) -> list[Source]:
    """Drop the chats of which another one says that they were sent in it."""
    names = [source.path.name for source in sources if is_chat(source)]
    if not names or len(sources) < 2:
        return sources
    escaped = b"|".join(re.escape(name.encode()) for name in names)
    pattern = re.compile(b"(?:%s)(?= ?[>(])" % escaped)
    sent: set[str] = set()
    for source in sources:
        if source.path.suffix != ".txt":
            continue
        rest = b""
        for block in source.blocks(collections.Counter()):
            others = {match.decode() for match in pattern.findall(rest + block)}
            others -= {source.path.name, *sent}
            source.attached += len(others)
            sent |= others
            rest = block[-1024:]
    return [source for source in sources if source.path.name not in sent]
