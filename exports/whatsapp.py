"""WhatsApp's exported chat: a text file in the dialect of the phone that wrote it, which it names nowhere. Some of its shapes:

    14/03/2021, 22:05 - Bob: On my way                            Android
    3/14/21, 10:05 PM - Ann added Bob                             a system line has no `name:`
    [14.03.21, 22:05:33] ~ Bob: image omitted                     iPhone: U+200E stands before what WhatsApp itself wrote
    [2021/3/14 下午10:05:33] Bob: <附件：00000012-AUDIO-2021-03-14-22-05-33.opus>

A first pass counts the shapes that lines begin with and, for each, who wrote and what its dates can mean; a second pass yields the messages
of the commonest shape. A line that begins otherwise continues the message before it.

- The order of day, month and year makes fewest impossible dates and steps back in time, then fewest different years; then it is habit.
- A word beside the time means the hours that CLDR gives it in any language (whatsapp.toml). One that it doesn't know, or gives both halves
  of the day, means the half in which no time of a day lies before the one above it; if nothing tells, its lines are left out and counted.
- The year tells the calendar (1442 is Islamic), and a short year the era beside it (R3). What is not converted is refused by name.
- A person is a name of at most 60 characters who wrote anything but service messages. A name met once that reads like a system line is one.
- A name ends at its first colon, unless a longer one is the chat's title, or a system line ends with it ("Ann added Work: Bob"), or every
  line that begins so has a second colon, behind few different parts that look like names: of 4 lines on, or 8 where there is one part.
- What WhatsApp wrote in place of a message is known by its U+200E or angle brackets, then by word stems (whatsapp.toml). Only deletions,
  missed calls and `null`, which Android leaves unmarked, are known by their whole text.
"""

import collections
import datetime
import functools
import hashlib
import re
import tomllib
import unicodedata
from pathlib import Path, PurePath
from typing import NamedTuple

from cli import UserError
from exports import Chat, Message, fix_dst

NUM_PASSES = 2  # over the file
LONGEST = 1 << 20  # characters of a message that are kept
MOST_PEOPLE = 20_000  # names that are counted; a chat has at most some thousand members
MOST_WORDS = 64  # unknown words beside the time
EPOCH = datetime.date(1970, 1, 1).toordinal()
ORDERS = {
    "day first": (2, 1, 0),
    "month first": (2, 0, 1),
    "year first": (0, 1, 2),
}  # where year, month and day stand
LRM = "\u200e"
MARKS = "\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff"  # of direction; nobody sees them
BLANK = MARKS + "".join(c for c in map(chr, range(0x3001)) if c.isspace())
UNSEEN = dict.fromkeys(map(ord, BLANK))

SEPARATOR = rf"[{MARKS}]{{0,3}}[-/.]\s?[{MARKS}]{{0,3}}"
DATE = rf"(?P<a>\d{{1,4}}){SEPARATOR}(?P<b>\d{{1,2}}){SEPARATOR}(?P<c>\d{{1,4}})"
TIME = r"(?P<hour>\d{1,2})(?:[:.]|\s?h\s?)(?P<minute>\d\d)(?:(?:[:.]|\smin\s)(?P<seconds>\d\d))?"  # Canada: 22 h 05 min 33 s
WORDS = r"(?:[^\d:/\[\]–-]|(?<=\w)-(?=[^\W\d])){0,24}"
ERA = r"(?P<era>ERA[01]\s|[^\W\d][^\d:/\[\]\n-]{0,15}?)?"  # 民國110/3/14
ERA_1 = r"(?:\s?[^\W\d]{2,9}[01](?!\d))?"  # of Copts and Ethiopians: `5/7/1737 ERA1`
START, END = rf"[{MARKS}]{{0,9}}(?P<open>\[?)[{MARKS}]{{0,3}}", r"(?P<end>\]\s?|\s[-–]\s|:\s)"
FRONTS = [  # the second is what WhatsApp Web copies
    re.compile(rf"{START}{ERA}{DATE}(?P<before>{ERA_1}{WORDS}){TIME}(?P<after>{WORDS}){END}"),
    re.compile(rf"{START}{TIME}(?P<after>{WORDS})(?P<before>)(?P<era>){DATE}{END}"),
]
DIGIT = re.compile(r"(?<![^\W\d])\d")  # but for ERA1
LOG = re.compile(r"\W*\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d")
AUTHOR = re.compile(r"(.{1,90}?):(?:\s|$)")


def word(text):
    """`p. m.` → `pm`. Marks that combine stay: they alone tell පෙ.ව. from ප.ව."""
    return "".join(
        c
        for c in unicodedata.normalize("NFC", text).casefold()
        if unicodedata.category(c)[0] in "LMN"
    )


def fold(text):
    """Without accents and capitals: `Médias` → `medias`."""
    return "".join(
        c for c in unicodedata.normalize("NFKD", text) if unicodedata.category(c) != "Mn"
    ).casefold()


def alternatives(text):
    return [phrase.casefold() for phrase in text.replace("\n", "|").split("|")]


def stems(text):
    """The pattern that finds any of these in a folded text."""
    return re.compile(fold("|".join(alternatives(text))))


WRITTEN = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
FILLER = {
    "",
    "a",
    "à",
    "at",
    "um",
    "kl",
    "klo",
    "alas",
    "г",
    "ч",
    "uhr",
    "h",
    "s",
    "be",
}  # `14.3.2021 klo 22.05`
HOURS = {
    half: tuple(map(int, hours.split()))
    for hours, halves in WRITTEN["hours"].items()
    for half in alternatives(halves.strip())
}
for name, hours in ("morning", range(12)), ("evening", range(12, 24)):
    HOURS |= {word(half): tuple(hours) for half in alternatives(WRITTEN[name])}
ERAS = {
    word(era): calendar for calendar, eras in WRITTEN["eras"].items() for era in alternatives(eras)
}
COPTIC, AMETE_ALEM = "Coptic or Ethiopic", "Ethiopic (Amete Alem)"
YEARS = {  # by which a calendar is known
    "Persian": range(1388, 1430), "Islamic": range(1430, 1480), COPTIC: range(1725, 1770), "Indian": range(1930, 1970),
    "Buddhist": range(2401, 2700), "Hebrew": range(5769, 5860), AMETE_ALEM: range(7500, 7600), "Minguo": range(98, 200),
}  # fmt: skip
CENTURIES = {
    "Islamic": 1400,
    "Persian": 1400,
    "Buddhist": 2500,
    "Minguo": 100,
}  # of years of two digits
AGO = {"Buddhist": -543, "Minguo": 1911, "Reiwa": 2018, "Heisei": 1988}  # years from theirs to ours
FIRST_YEAR, THIS_YEAR = (
    "2009",
    "2026",
)  # WhatsApp's, and the least that it is now, if this machine's clock is wrong
REFUSED = {"Hebrew", "Indian", COPTIC, AMETE_ALEM, "Chinese"}
NAMED_MONTH = re.compile(
    rf"{START}.{{1,40}}?[,\s]{WORDS}{TIME}{WORDS}{END}"
)  # `[1 Nisan 5781, 22:05:33] `
HEBREW = re.compile(stems(WRITTEN["hebrew"]).pattern)
CYCLIC = re.compile("[甲乙丙丁戊己庚辛壬癸][子丑寅卯辰巳午未申酉戌亥]")  # 辛丑/2/2
EASTERN = {"오전", "오후", "上午", "下午", "午前", "午後"}
DELETED, CALLS, LIVE = (set(alternatives(WRITTEN[name])) for name in ("deleted", "calls", "live"))
WAITING, BY_ADMIN = (tuple(alternatives(WRITTEN[name])) for name in ("waiting", "by_admin"))
OMITTED, MEDIA, ATTACHED, EDITED = (
    stems(WRITTEN[name]) for name in ("omitted", "media", "attached", "edited")
)
KINDS = [(f"<{kind}>", stems(words)) for kind, words in WRITTEN["kinds"].items()]
SYSTEM = re.compile(rf'["“„«「]|\w{{5,}}[.] |\b(?:{stems(WRITTEN["changed"]).pattern})')
FILES = [  # what an attachment is, by its name
    ("<gif>", re.compile(r"-GIF-|\.gif$", re.I)),
    ("<sticker>", re.compile(r"^STK-|-STICKER-|\.webp$", re.I)),
    ("<voice>", re.compile(r"^(?:PTT|AUD)-|-AUDIO-|\.opus$", re.I)),
    ("<contact>", re.compile(r"\.vcf$", re.I)),
    ("<photo>", re.compile(r"\.(?:jpe?g|png|heic)$", re.I)),
    ("<video>", re.compile(r"\.(?:mp4|mov|3gp|avi|mkv|webm)$", re.I)),
]
OPENED, CLOSED = "“„«「", "”»」"
OWN_NAME = re.compile(r"(?:IMG|VID|AUD|PTT|STK|DOC)-\d{8}-WA\d|\d{5,}-")  # Android's, the iPhone's
TAGGED = re.compile(
    r"<[^<>:：\n]{1,40}[:：]\s?([^<>/\\\0\n]{1,255})>"
)  # <attached: 00000012-PHOTO-….jpg>
NOTED = re.compile(
    r"([^/\\\0]{1,255}\.\w{1,8}) [(<](.{2,60})[)>]"
)  # IMG-20210314-WA0003.jpg (file attached)
DOCUMENT = re.compile(
    r"(?!www|http).{1,255}\.[a-z]\w{1,4}(?: • .{1,40})?", re.I
)  # Report.pdf • 2 pages
LOCATION = re.compile(
    r"[^\n:：]{2,30}[:：] ?(?:.{0,300}\s)?https://(?:maps\.google\.com/\?q=-?\d|foursquare\.com/v/)\S*",
    re.S,
)
OPTION = re.compile(r"[^:：]{2,25}[:：] .*\(\D{0,3}\d[^()]*\)")  # OPTION: Pizza (2 votes)
MENTION = re.compile("@\u2068([^\u2068\u2069]{0,100})\u2069")
COPY = re.compile(r"(?:\s?\(\d{1,2}\)|_\d{1,2})+$")
TITLE = re.compile(
    r".{0,30}?WhatsApp.{0,20}?\s(?:[-–]|with|mit|con|com|avec|met|med|amb|cu|[сз] контактом|[сз]|z|s uživatelem|s používateľom|s|"
    r"dengan|με) (.+)|(.+) ile WhatsApp.*",
    re.I,
)


class Front(NamedTuple):
    """What a message's line begins with."""

    shape: str  # what is the same in every line of one file: `9/9/y,9:9half-`
    date: tuple  # three numbers, in the order of the file
    era: str  # the calendar that a word beside the date names
    word: str  # the word beside the time that tells AM from PM
    clock: tuple  # hour, minute, second as written
    habit: str  # the order that such lines have where nothing else says it
    rest: str


def front(line: str) -> Front | None:
    """None for a line that continues a message."""
    match = FRONTS[0].match(line) or FRONTS[1].match(line)
    if not match or not (found := layout(DIGIT.sub("9", match[0]))):
        return None
    shape, era, half, habit = found
    a, b, c, hour, minute, seconds = match.group("a", "b", "c", "hour", "minute", "seconds")
    if habit == "month first" and "0" in (a[0], b[0]):
        habit = "day first"
    return Front(
        shape,
        (int(a), int(b), int(c)),
        era,
        half,
        (int(hour), int(minute), int(seconds or 0)),
        habit,
        line[match.end() :],
    )


@functools.lru_cache(1 << 12)
def layout(skeleton):
    """What lines have in common that differ in digits only → (shape, era, word beside the time, habit), None where none begins so.

    `skeleton`: such a line's front with 9 for each digit.
    """
    match = FRONTS[0].match(skeleton) or FRONTS[1].match(skeleton)
    if not match or bool(match["open"]) != match["end"].startswith("]"):
        return None
    before, after = map(word, match.group("before", "after"))
    shape, half, era = match[0], "", ""
    if match["era"]:
        era = "Chinese" if CYCLIC.search(match["era"]) else ERAS.get(word(match["era"]), "")
        if not era:
            return None
    if any(map(str.isdigit, before)):
        era, before = COPTIC, ""
    elif before in ERAS and (
        after in HOURS or before not in ("am", "ص")
    ):  # which are eras too: of the Hebrew calendar
        era, before = ERAS[before], ""
    for group, plain in sorted(
        [("before", before), ("after", after)], key=lambda pair: -match.start(pair[0])
    ):
        if plain not in FILLER or group == "after" and plain in HOURS:
            half = half or plain
            shape = f"{shape[: match.start(group)]}half{shape[match.end(group) :]}"
    shape = re.sub(r"\d+", "9", re.sub(r"\d{3,}", "y", shape)).translate(UNSEEN)
    american = "9/" in shape and match["after"].strip(BLANK) in ("AM", "PM")
    return (
        shape,
        era,
        half,
        "month first"
        if american
        else "year first"
        if half in EASTERN or match["era"]
        else "day first",
    )


@functools.lru_cache(1 << 12)
def hour_of(half, hour):
    """The hour of 24 that an hour beside this word is; None where the word doesn't say it."""
    hours = HOURS.get(half)
    if not half or hours and hour > 12:
        return hour
    possible = [at for at in half_hours(hour) if hours and at in hours]
    return possible[0] if len(possible) == 1 else None


@functools.lru_cache(1 << 14)
def day_of(date, era, order):
    """→ (days since 1970 or None where there is no such date, the date in ISO's form, the calendar or "" for our own)."""
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
        days = ordinal(calendar, year + AGO.get(calendar, 0), month, day) - EPOCH
        return days, datetime.date.fromordinal(days + EPOCH).isoformat(), calendar
    except (ValueError, OverflowError):
        return None, "", calendar


def ordinal(calendar, year, month, day):
    """The proleptic ordinal (1 is 1 January of the year 1) of a date; ValueError where there is none."""
    if calendar in REFUSED:
        raise ValueError
    if calendar == "Persian":
        leap = (25 * year + 11) % 33 < 8
        if not (
            0 < month < 13 and 0 < day <= (31 if month < 7 else 30 if month < 12 or leap else 29)
        ):
            raise ValueError
        return (
            226894
            + 365 * (year - 1)
            + (8 * year + 21) // 33
            + 30 * (month - 1)
            + min(month - 1, 6)
            + day
        )
    if calendar == "Islamic":
        if not 0 < day < 31:
            raise ValueError
        return islamic(year, month) + day - 1
    if not 1970 <= year < 2100:
        raise ValueError
    return datetime.date(year, month, day).toordinal()


def islamic(year, month):
    """The ordinal of a month's first day as Saudi Arabia counts; other countries may be a day off."""
    try:
        from hijridate import Hijri
    except ImportError:
        raise UserError(
            "Dates of the Islamic calendar: hijridate is not installed",
            "pip install -r requirements-extra.txt",
        ) from None
    return Hijri(year, month, 1).to_gregorian().toordinal()


def moment(found: Front, order: str, halves: dict[str, str] | None = None) -> int | None:
    """The local time of a front in that order of day, month and year, in seconds since 1970; None where there is no such time.

    `halves`: what unknown words mean (am, pm, or 24 for a word that says nothing).
    """
    hour, minute, second = found.clock
    known = hour_of(found.word, hour)
    if known is None:
        half = (halves or {}).get(found.word)
        known = hour if half == "24" or hour > 12 else hour % 12 + 12 * (half == "pm")
    days = day_of(found.date, found.era, order)[0]
    return (
        None
        if days is None or known > 23 or minute > 59 or second > 59
        else days * 86400 + known * 3600 + minute * 60 + second
    )


def lines(source, notes):
    rest = ""
    for piece in source.pieces(notes):
        *ended, rest = (rest + piece).split("\n")
        yield from (line.removesuffix("\r") for line in ended)
        rest = rest[: 2 * LONGEST]  # a line without end
    yield rest


def signed(rest: str, longer: dict[str, set[str]] | None = None) -> tuple[str, str]:
    """`Bob: hi` → (display name, text); the name is "" where there is none, as in a system line.

    `longer`: the names with a colon in them, by what stands before it.
    """
    match = AUTHOR.match(rest)
    name = display(match[1]) if match else ""
    if not 0 < len(name) <= 60:
        return "", rest
    text = rest[match.end() :]
    if longer and name in longer:
        whole = name
        for end in (
            i for i, c in enumerate(text[:60]) if c == ":" and not text[i + 1 : i + 2].strip()
        ):
            whole = f"{name}: {display(text[:end])}"
            if whole in longer[name]:
                return whole, text[end + 2 :]
    return name, text


@functools.lru_cache(1 << 12)
def display(name):
    """Of `~ Bob`, as a group shows whom the phone has no name for, and of what marks of direction wrap: Bob."""
    name = "".join(c for c in unicodedata.normalize("NFC", name) if c not in MARKS)
    return " ".join(name.strip().removeprefix("~").split())


def half_hours(hour):
    return [hour] if hour > 12 else [hour % 12, hour % 12 + 12]


class Survey:
    """What the lines of one shape say together."""

    def __init__(self):
        self.count, self.habits, self.names, self.wrote = 0, set(), collections.Counter(), set()
        self.wrong, self.last, self.years = (
            collections.Counter(),
            {},
            {order: set() for order in ORDERS},
        )
        self.calendars = collections.Counter()
        self.votes, self.before = (
            {},
            None,
        )  # of unknown words: [for AM, for PM, for neither, lines]; the front before
        self.colons = Colons()

    def add(self, found):
        self.count += 1
        self.habits.add(found.habit)
        for order in ORDERS:
            at = moment(found, order)
            self.wrong[order] += at is None or at < self.last.get(order, at)
            days, date, calendar = day_of(found.date, found.era, order)
            if calendar:
                self.calendars[order, calendar] += 1
            if at is None:
                _, month, day = (found.date[place] for place in ORDERS[order])
                self.calendars[order, "Chinese"] += (month, day) == (2, 30)
            else:
                self.last[order] = at
                self.years[order].add(date[:4])
        if found.word:
            self.vote(found)
            self.before = found
        name, text = signed(found.rest)
        if name and (name in self.names or len(self.names) < MOST_PEOPLE):
            self.names[name] += 1
            self.colons.add(name, text)
            if name not in self.wrote and content(text, found.shape)[1] != "service messages":
                self.wrote.add(name)

    def vote(self, found):
        """Of two lines of one day, what the halves of the day can be for the first one to be the earlier one."""
        pair = [front for front in (self.before, found) if front]
        known = [hour_of(front.word, front.clock[0]) for front in pair]
        if known[-1] is None and (found.word in self.votes or len(self.votes) < MOST_WORDS):
            votes = self.votes.setdefault(found.word, [0, 0, 0, 0])
            votes[2] += (
                found.clock[0] > 12 and max(found.date) > 99
            )  # behind a short year it may be an era
            votes[3] += 1
        if None not in known:
            return
        if len(pair) < 2 or pair[0].date != found.date or pair[0].word == found.word:
            return
        first, second = (
            [hour] if hour is not None else half_hours(f.clock[0]) for f, hour in zip(pair, known)
        )
        possible = [
            (a, b)
            for a in first
            for b in second
            if (a, *pair[0].clock[1:]) <= (b, *found.clock[1:])
        ]
        for front, hour, found_hours in zip(pair, known, zip(*possible)):
            if hour is None and len(set(found_hours)) == 1 and front.word in self.votes:
                self.votes[front.word][found_hours[0] > 11] += 1

    def halves(self):
        """What each unknown word means: am, pm, 24 (nothing), or "" where nothing tells."""
        meaning = {}
        for half, (am, pm, neither, _) in self.votes.items():
            meaning[half] = (
                "24"
                if neither and half not in HOURS
                else "am"
                if am > 3 * pm
                else "pm"
                if pm > 3 * am
                else ""
            )
        return meaning

    def order(self):
        habit = "day first" if len(self.habits) > 1 else next(iter(self.habits), "")
        return min(
            ORDERS,
            key=lambda order: (
                self.wrong[order],
                self.odd(order),
                max(2, len(self.years[order])),
                order != habit,
            ),
        )

    def odd(self, order):
        """Whether all dates are older than WhatsApp, or yet to come."""
        years = self.years[order]
        return bool(years) and (
            max(years) < FIRST_YEAR or min(years) > max(THIS_YEAR, str(datetime.date.today().year))
        )

    def refused(self):
        """The calendar that dates are of and that isn't read, "" where there is none."""
        if (
            self.calendars[self.order(), "Chinese"] > 1
        ):  # a second month of 30 days: else its dates look like ours
            return "Chinese"
        counts = {calendar: n for (_, calendar), n in self.calendars.items() if calendar in REFUSED}
        return next((calendar for calendar, n in counts.items() if 2 * n > self.count), "")

    def people(self, title=""):
        """→ (who wrote, the names with a colon in them by what stands before it)."""
        systems = [name for name in self.names if SYSTEM.search(fold(name))]
        longer = self.colons.names(title, systems)
        people = {name for name in self.wrote if is_person(name, self.names[name])}
        for first, names in longer.items():
            people -= {name for name in systems if name.endswith(f" {first}")}
            people -= set() if self.colons.wrote(first) else {first}
            people |= names
        return people, longer


class Colons:
    """What may be a name with a colon in it. See the top of this file for the rule."""

    def __init__(self):
        self.whole = set()  # names that began lines without another colon
        self.bare = collections.defaultdict(list)  # the first such lines: `Work: Bob left`
        self.parts = collections.defaultdict(
            collections.Counter
        )  # name → what stood between its colon and the next

    def add(self, name, text):
        if name in self.whole:
            return
        ends = [i for i, c in enumerate(text[:60]) if c == ":" and not text[i + 1 : i + 2].strip()]
        if not ends:
            self.bare[name].append(text[:200])
            if len(self.bare[name]) > 20:
                self.whole.add(name)
        for end in ends[:2]:
            if len(self.parts[name]) < 1000:
                self.parts[name][display(text[:end])] += 1

    def names(self, title, systems):
        """→ {what stands before the colon: whole names}. `systems`: names so far that look like system lines: `Ann added Work`."""
        found = {}
        for name, parts in self.parts.items():
            known = {
                part
                for part in parts
                if word(f"{name}{part}") == word(title) or self.added(name, part, systems)
            }
            firsts = [part for part in parts if ": " not in part]
            total = sum(parts[part] for part in firsts)
            few = total >= (4 if len(firsts) > 1 else 8) and total >= 2 * len(firsts)
            likely = (
                few
                and not self.wrote(name)
                and word(name) != word(title)
                and all(map(looks_like_name, firsts))
            )
            if whole := known or (set(firsts) if likely else set()):
                found[name] = {f"{name}: {part}" for part in whole}
        return found

    def wrote(self, name):
        """Whether a name began lines that have no other colon and are not WhatsApp's (`Work: Bob left`)."""
        parts = tuple(f"{part} " for part in self.parts[name])
        return name in self.whole or not all(
            text.startswith(parts) and SYSTEM.search(fold(text)) for text in self.bare[name]
        )

    def added(self, name, part, systems):
        return any(
            said.endswith(f" {name}") and part in (display(text) for text in self.bare[said])
            for said in systems
        )


def looks_like_name(text):
    return (
        len(text.split()) < 5
        and not text[:1].islower()
        and any(map(str.isalpha, text))
        and "://" not in text
    )


def is_person(name, times):
    unclosed = (
        sum(name.count(c) for c in OPENED) > sum(name.count(c) for c in CLOSED)
        or name.count('"') % 2
    )
    return not (unclosed and len(name.split()) > 3) and (times > 1 or not SYSTEM.search(fold(name)))


def can_read(head):
    """Whether a file that begins so is a WhatsApp chat."""
    whole_lines = [line for line in head.split("\n") if line.strip(BLANK)]
    if named_calendar(whole_lines[:40]):
        return True
    fronts = [
        f if (f := front(line)) and any(is_date(f, order) for order in ORDERS) else None
        for line in whole_lines
    ]
    words = collections.Counter(f.word for f in fronts if f and f.word and f.word not in HOURS)
    fronts = [
        f
        and (
            not f.word
            or f.word in HOURS
            or words[f.word] > 1
            and f.clock[0] < 13
            and f.shape[-1] != ":"
        )
        and f
        for f in fronts
    ]
    dated = [f for f in fronts if f]
    if not dated or not (fronts[0] or sum(map(bool, fronts[:40])) > 2):
        return False
    log = (
        LOG.match(whole_lines[fronts.index(dated[0])]) and LRM not in head
    )  # WhatsApp begins a chat with a line of its own
    return not log and any(signed(f.rest)[0] for f in dated)


def is_date(found, order):
    return moment(found, order) is not None or day_of(found.date, found.era, order)[2] in REFUSED


def named_calendar(some_lines):
    """The calendar whose months these lines' dates name in words; "" where they don't."""
    dates = [match[0] for line in some_lines if (match := NAMED_MONTH.match(line))]
    for calendar, months in ("Hebrew", HEBREW), ("Chinese", CYCLIC):
        if dates and 2 * sum(bool(months.search(fold(date))) for date in dates) > len(some_lines):
            return calendar
    return ""


def read(source, notes):
    """See `exports.read`; the file is read twice. What is odd in it is counted in `notes`."""
    surveys = collections.defaultdict(Survey)
    first_lines = []
    for line in lines(source, collections.Counter()):
        if found := front(line):
            surveys[found.shape].add(found)
        elif len(first_lines) < 40 and line.strip(BLANK):
            first_lines.append(line)
    shape, survey = max(surveys.items(), key=lambda item: item[1].count, default=("", Survey()))
    order, halves = survey.order(), survey.halves()
    refuse(
        source,
        survey,
        order,
        halves,
        survey.refused() if survey.count else named_calendar(first_lines),
    )
    name = chat_name(source)
    people, longer = survey.people(name)
    known = name or ", ".join(sorted(people))
    number = hashlib.blake2b(
        known.encode(), digest_size=8
    ).hexdigest()  # the id is written into data/: no name, no number of a contact
    kind = "personal_chat" if len(people) < 3 else "private_group"
    chat = Chat(f"whatsapp:{known}", f"whatsapp:{number}", kind, name or "WhatsApp", None)
    if source.attached:
        notes["files that were sent in a chat, not read as chats"] += source.attached
    yield chat, messages(source, notes, shape, order, halves, people, longer)


def refuse(source, survey, order, halves, calendar):
    """UserError where no line can be dated."""
    gregorian = "Set the phone to the Gregorian calendar and a language whose dates are numbers, then export again."
    if calendar:
        raise UserError(
            f"{source} has dates of the {calendar} calendar, which is not read", gregorian
        )
    if survey.odd(order):
        raise UserError(
            f"{source} has dates of the year {max(survey.years[order])}: they are of a calendar that is not known",
            gregorian,
        )
    unknown = [half for half, meaning in halves.items() if not meaning]
    if 2 * sum(survey.votes[half][3] for half in unknown) > survey.count:
        unknown = " and ".join(f"“{half}”" for half in sorted(unknown)[:4])
        raise UserError(
            f"{source}: {unknown} beside the time, is that AM or PM?",
            "Set the phone to 24 hours, then export again.",
        )


def blocks(source, notes, shape, order, halves):
    """Each message of the file: its local time in seconds and in ISO's form, and its text behind the front, continued lines too."""
    time, text, skipped = None, [], False
    for line in lines(source, notes):
        found = front(line)
        new = moment(found, order, halves) if found and found.shape == shape else None
        if new is not None and time:
            yield *time, "\n".join(text)
        if (
            new is not None
            and halves
            and not halves.get(found.word)
            and hour_of(found.word, found.clock[0]) is None
        ):
            notes[
                f"lines with “{found.word}” beside the time, which may be AM or PM: left out"
            ] += 1
            time, skipped = None, True
            continue
        if new is not None:
            if (
                halves
                and hour_of(found.word, found.clock[0]) is None
                and (half := halves.get(found.word, "")) != "24"
            ):
                notes[f"lines with “{found.word}” beside the time, taken for {half.upper()}"] += 1
            hour, minute, second = new // 3600 % 24, new // 60 % 60, new % 60
            time = (
                new,
                f"{day_of(found.date, found.era, order)[1]}T{hour:02}:{minute:02}:{second:02}",
            )
            text, size, skipped = [found.rest], len(found.rest), False
            continue
        if skipped:
            continue
        if found:
            notes["lines with a date of another format, kept as text"] += 1
        if not time:
            notes["lines before the first message"] += 1
        elif size <= LONGEST:
            text.append(line)
            size += 1 + len(line)
    if time:
        yield *time, "\n".join(text)


def messages(source, notes, shape, order, halves, people, longer):
    last = None
    for at, date, text in blocks(source, notes, shape, order, halves):
        if len(text) > LONGEST:
            notes["messages cut to a million characters"] += 1
            text = text[:LONGEST]
        last = fix_dst(at, last)
        name, body = signed(text, longer)
        if name in people:
            body, left_out = content(body, shape, source.beside)
            yield Message(None, f"whatsapp:{name}", name, last, date, body, left_out)
        else:
            yield Message(None, None, None, last, date, text.strip(BLANK), "service messages")


def content(text, shape, beside=lambda name: None):
    """What stands behind a name → (text, why it is left out). `beside`: reads the transcript of a voice message, see `Source.beside`."""
    text = MENTION.sub(r"@\1", unedited(text))
    plain = text.strip(BLANK)
    key = plain[:200].casefold().rstrip(".。।")
    if key in DELETED or key.startswith(BY_ADMIN):
        return plain, "deleted messages"
    if key in CALLS or (len(plain) < 200 and key.startswith(WAITING)):
        return plain, "service messages"
    mark, file, caption = media(text, plain, key)
    if caption and not (mark == "<file>" and DOCUMENT.fullmatch(caption)):
        return caption, ""
    if mark == "<voice>" and file:
        mark = (beside(PurePath(file).stem + ".txt") or "")[:LONGEST].strip(BLANK) or mark
    if mark:
        return mark, ""
    iphone = shape.startswith("[") or shape.endswith(":")  # the old ones' too
    if (
        iphone and text.startswith(LRM) and not plain.endswith(":")
    ):  # of a poll the first pass sees `POLL:` only
        return plain, "service messages"
    return plain, "" if plain else "messages without text"


def unedited(text):
    """Without the `<This message was edited>` that WhatsApp hangs on."""
    body, _, tail = text.rstrip(BLANK).rpartition("<")
    tail = tail.strip(MARKS)
    phrase = 4 < len(tail) < 60 and tail.endswith(">") and (" " in tail or not tail.isascii())
    return body if phrase and EDITED.search(fold(tail)) else text


def media(text, plain, key):
    """→ (the mark of what was sent or "", its file's name or "", the caption or ""). `plain`: `text` stripped; `key`: in small letters."""
    if key in LIVE or LOCATION.fullmatch(plain[:1000]):
        return "<location>", "", ""
    first, _, rest = plain.partition("\n")
    _, several, option = rest.rpartition("\n")
    if (
        several
        and len(first) < 30
        and first.endswith((":", "："))
        and first == first.upper()
        and OPTION.fullmatch(option)
    ):
        return "<poll>", "", ""
    written = text.startswith(tuple(MARKS))
    if match := TAGGED.search(text):
        if text[match.start() - 1 : match.start()] in tuple(MARKS) or OWN_NAME.match(match[1]):
            return (
                by_name(match[1]),
                match[1],
                (text[: match.start()] + text[match.end() :]).strip(BLANK),
            )
    if len(first) < 400 and (match := NOTED.fullmatch(first)):
        if written or OWN_NAME.match(match[1]) or ATTACHED.search(fold(match[2])):
            return by_name(match[1]), match[1], rest.strip(BLANK)
    if len(first) < 80 and first.startswith("<") and first.endswith(">"):
        if found := omitted(first) or MEDIA.search(fold(first)) and "<file>":
            return found, "", rest.strip(BLANK)
    before, mark, phrase = text.rstrip(BLANK).rpartition(LRM)
    phrase, _, rest = phrase.partition("\n")
    if mark and len(phrase) < 60 and (found := omitted(phrase)):
        return found, "", f"{before}\n{rest}".strip(BLANK)
    return "", "", ""


def by_name(file):
    return next((mark for mark, name in FILES if name.search(file)), "<file>")


def omitted(phrase):
    """The mark of `Bild weggelassen`; "" where the phrase is none of these."""
    phrase = fold(phrase)
    return (
        next((mark for mark, kind in KINDS if kind.search(phrase)), "")
        if OMITTED.search(phrase)
        else ""
    )


def chat_name(source):
    """As the file's name says; where that is always the same, as the zip's or the folder's does; "" where none says WhatsApp."""
    stem = source.path.stem
    if re.fullmatch(r"_?chat[\s\d()_-]*", stem, re.I):
        outer = [source.archive.stem if source.archive else "", source.path.parent.name]
        stem = next((name for name in outer if "whatsapp" in name.casefold()), "")
    stem = display(
        COPY.sub(
            "",
            stem.replace("_", " ") if " " not in stem and "whatsapp" in stem.casefold() else stem,
        )
    )
    match = TITLE.fullmatch(stem)
    return display(match[1] or match[2]) if match else stem
