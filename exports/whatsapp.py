"""WhatsApp's exported chat: a text file in the dialect of the phone that wrote it, which it names nowhere. Some of its shapes:

    14/03/2021, 22:05 - Bob: On my way                            Android
    3/14/21, 10:05 PM - Ann added Bob                             a system line has no `name:`
    [14.03.21, 22:05:33] ~ Bob: image omitted                     iPhone: U+200E stands before what WhatsApp itself wrote
    [2021/3/14 下午10:05:33] Bob: <附件：00000012-AUDIO-2021-03-14-22-05-33.opus>

A first pass counts the shapes that lines begin with and, for each, who wrote and what its dates can mean; a second pass yields the messages
of the commonest shape. A line that begins otherwise continues the message before it.

- The order of day, month and year makes fewest impossible dates and steps back in time, then fewest different years; then it is habit.
- A person is a name of at most 60 characters who wrote anything but service messages. A name met once that reads like a system line is one.
- What WhatsApp wrote in place of a message is known by its U+200E or angle brackets, then by word stems (whatsapp.toml). Only deletions,
  missed calls and `null`, which Android leaves unmarked, are known by their whole text.
"""

import collections
import datetime
import hashlib
import re
import tomllib
import unicodedata
from pathlib import Path, PurePath
from typing import NamedTuple

from exports import Chat, Message, forward

PASSES = 2  # over the file
LONGEST = 1 << 20  # characters of a message that are kept
MOST_PEOPLE = 20_000  # names that are counted; a chat has at most some thousand members
EPOCH = datetime.datetime(1970, 1, 1)
ORDERS = {"day first": (2, 1, 0), "month first": (2, 0, 1), "year first": (0, 1, 2)}  # where year, month and day stand
LRM = "\u200e"
MARKS = "\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff"  # of direction; nobody sees them
BLANK = MARKS + "".join(c for c in map(chr, range(0x3001)) if c.isspace())
UNSEEN = dict.fromkeys(map(ord, BLANK))

SEPARATOR = rf"[{MARKS}]{{0,3}}[-/.]\s?[{MARKS}]{{0,3}}"
DATE = rf"(?P<a>\d{{1,4}}){SEPARATOR}(?P<b>\d{{1,2}}){SEPARATOR}(?P<c>\d{{4}}|\d{{1,2}})"
TIME = r"(?P<hour>\d{1,2})(?:[:.]|\s?h\s?)(?P<minute>\d\d)(?:(?:[:.]|\smin\s)(?P<seconds>\d\d))?"  # Canada: 22 h 05 min 33 s
WORDS = r"[^\d:/\[\]–-]{0,24}"
START, END = rf"[{MARKS}]{{0,9}}(?P<open>\[?)[{MARKS}]{{0,3}}", r"(?P<end>\]\s?|\s[-–]\s|:\s)"
FRONTS = [  # the second is what WhatsApp Web copies
    re.compile(rf"{START}{DATE}(?P<before>{WORDS}){TIME}(?P<after>{WORDS}){END}"),
    re.compile(rf"{START}{TIME}(?P<after>{WORDS})(?P<before>){DATE}{END}"),
]
LOG = re.compile(r"\W*\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d")
AUTHOR = re.compile(r"(.{1,90}?):(?:\s|$)")


def word(text):
    """`p. m.` → `pm`."""
    return re.sub(r"[\W_]+", "", text).casefold()


def fold(text):
    """Without accents and capitals: `Médias` → `medias`."""
    return "".join(c for c in unicodedata.normalize("NFKD", text) if unicodedata.category(c) != "Mn").casefold()


def alternatives(text):
    return [phrase.casefold() for phrase in text.replace("\n", "|").split("|")]


def stems(text):
    """The pattern that finds any of these in a folded text."""
    return re.compile(fold("|".join(alternatives(text))))


WRITTEN = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
FILLER = {"", "a", "à", "at", "um", "kl", "klo", "alas", "г", "ч", "uhr", "h", "s", "be"}  # `14.3.2021 klo 22.05`
MORNING, EVENING = ({word(half) for half in alternatives(WRITTEN[name])} for name in ("morning", "evening"))
HALVES = MORNING | EVENING
EASTERN = {"오전", "오후", "上午", "下午", "午前", "午後"}
DELETED, CALLS, LIVE = (set(alternatives(WRITTEN[name])) for name in ("deleted", "calls", "live"))
WAITING, BY_ADMIN = (tuple(alternatives(WRITTEN[name])) for name in ("waiting", "by_admin"))
OMITTED, MEDIA, ATTACHED, EDITED = (stems(WRITTEN[name]) for name in ("omitted", "media", "attached", "edited"))
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
TAGGED = re.compile(r"<[^<>:：\n]{1,40}[:：]\s?([^<>/\\\0\n]{1,255})>")  # <attached: 00000012-PHOTO-….jpg>
NOTED = re.compile(r"([^/\\\0]{1,255}\.\w{1,8}) [(<](.{2,60})[)>]")  # IMG-20210314-WA0003.jpg (file attached)
DOCUMENT = re.compile(r"(?!www|http).{1,255}\.[a-z]\w{1,4}(?: • .{1,40})?", re.I)  # Report.pdf • 2 pages
LOCATION = re.compile(r"[^\n:：]{2,30}[:：] ?(?:.{0,300}\s)?https://(?:maps\.google\.com/\?q=-?\d|foursquare\.com/v/)\S*", re.S)
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
    clock: tuple  # hour of 24, minute, second
    habit: str  # the order that such lines have where nothing else says it
    rest: str


def front(line):
    """→ Front, or None for a line that continues a message."""
    match = FRONTS[0].match(line) or FRONTS[1].match(line)
    if not match or bool(match["open"]) != match["end"].startswith("]"):
        return None
    shape, half = match[0].translate(UNSEEN), ""
    for words in match.group("before", "after"):
        if (plain := word(words)) in HALVES:
            half, shape = plain, shape.replace(words.translate(UNSEEN).strip(",،"), "half")
        elif plain not in FILLER:
            return None
    shape = re.sub(r"\d+", "9", re.sub(r"\d{3,}", "y", shape))
    hour = int(match["hour"]) % 12 + 12 * (half in EVENING) if half else int(match["hour"])
    american = "9/" in shape and match["after"].strip(BLANK) in ("AM", "PM") and "0" not in (match["a"][0], match["b"][0])
    habit = "month first" if american else "year first" if half in EASTERN else "day first"
    date = tuple(map(int, match.group("a", "b", "c")))
    return Front(shape, date, (hour, int(match["minute"]), int(match["seconds"] or 0)), habit, line[match.end() :])


def moment(found, order):
    """The local time in that order of day, month and year; None where there is no such date."""
    year, month, day = (found.date[place] for place in ORDERS[order])
    if year < 100:
        year += 2000 if year < 52 else 1957  # Thailand's years: 2564 was 2021
    elif year > 2400:
        year -= 543
    try:
        return datetime.datetime(year, month, day, *found.clock) if 1970 <= year < 2100 else None
    except ValueError:
        return None


def lines(source, notes):
    rest = ""
    for piece in source.pieces(notes):
        *ended, rest = (rest + piece).split("\n")
        yield from (line.removesuffix("\r") for line in ended)
        rest = rest[: 2 * LONGEST]  # a line without end
    yield rest


def signed(rest):
    """`Bob: hi` → (display name, text); the name is "" where there is none, as in a system line."""
    match = AUTHOR.match(rest)
    name = display(match[1]) if match else ""
    return (name, rest[match.end() :]) if 0 < len(name) <= 60 else ("", rest)


def display(name):
    """Of `~ Bob`, as a group shows whom the phone has no name for, and of what marks of direction wrap: Bob."""
    name = "".join(c for c in unicodedata.normalize("NFC", name) if c not in MARKS)
    return " ".join(name.strip().removeprefix("~").split())


class Survey:
    """What the lines of one shape say together."""

    def __init__(self):
        self.count, self.habits, self.names, self.wrote = 0, set(), collections.Counter(), set()
        self.wrong, self.last, self.years = collections.Counter(), {}, {order: set() for order in ORDERS}

    def add(self, found):
        self.count += 1
        self.habits.add(found.habit)
        for order in ORDERS:
            at = moment(found, order)
            self.wrong[order] += not at or at < self.last.get(order, at)
            if at:
                self.last[order] = at
                self.years[order].add(at.year)
        name, text = signed(found.rest)
        if name and (name in self.names or len(self.names) < MOST_PEOPLE):
            self.names[name] += 1
            if name not in self.wrote and content(text, found.shape)[1] != "service messages":
                self.wrote.add(name)

    def order(self):
        habit = "day first" if len(self.habits) > 1 else next(iter(self.habits), "")
        return min(ORDERS, key=lambda order: (self.wrong[order], max(2, len(self.years[order])), order != habit))

    def people(self):
        return {name for name in self.wrote if is_person(name, self.names[name])}


def is_person(name, times):
    unclosed = sum(name.count(c) for c in OPENED) > sum(name.count(c) for c in CLOSED) or name.count('"') % 2
    return not (unclosed and len(name.split()) > 3) and (times > 1 or not SYSTEM.search(fold(name)))


def recognises(head):
    """Whether a file that begins so is a WhatsApp chat."""
    whole_lines = [line for line in head.split("\n") if line.strip(BLANK)]
    fronts = [f if (f := front(line)) and any(moment(f, order) for order in ORDERS) else None for line in whole_lines]
    dated = [f for f in fronts if f]
    if not dated or not (fronts[0] or sum(map(bool, fronts[:40])) > 2):
        return False
    log = LOG.match(whole_lines[fronts.index(dated[0])]) and LRM not in head  # WhatsApp begins a chat with a line of its own
    return not log and any(signed(f.rest)[0] for f in dated)


def read(source, notes):
    """See `exports.read`; the file is read twice. What is odd in it is counted in `notes`."""
    surveys = collections.defaultdict(Survey)
    for line in lines(source, collections.Counter()):
        if found := front(line):
            surveys[found.shape].add(found)
    shape, survey = max(surveys.items(), key=lambda item: item[1].count, default=("", Survey()))
    people = survey.people()
    name = chat_name(source)
    known = name or ", ".join(sorted(people))
    number = hashlib.blake2b(known.encode(), digest_size=8).hexdigest()  # the id is written into data/: no name, no number of a contact
    kind = "personal_chat" if len(people) < 3 else "private_group"
    chat = Chat(f"whatsapp:{known}", f"whatsapp:{number}", kind, name or "WhatsApp", None)
    yield chat, messages(source, notes, shape, survey.order(), people)


def blocks(source, notes, shape, order):
    """Each message of the file: its local time, and its text behind the front, continued lines too."""
    time, text = None, []
    for line in lines(source, notes):
        found = front(line)
        new = moment(found, order) if found and found.shape == shape else None
        if new and time:
            yield time, "\n".join(text)
        if new:
            time, text, size = new, [found.rest], len(found.rest)
            continue
        if found:
            notes["lines with a date of another format, kept as text"] += 1
        if not time:
            notes["lines before the first message"] += 1
        elif size <= LONGEST:
            text.append(line)
            size += 1 + len(line)
    if time:
        yield time, "\n".join(text)


def messages(source, notes, shape, order, people):
    last = None
    for time, text in blocks(source, notes, shape, order):
        if len(text) > LONGEST:
            notes["messages cut to a million characters"] += 1
            text = text[:LONGEST]
        last = forward(int((time - EPOCH).total_seconds()), last)
        name, said = signed(text)
        if name in people:
            said, left_out = content(said, shape, source.beside)
            yield Message(None, f"whatsapp:{name}", name, last, time.isoformat(), said, left_out)
        else:
            yield Message(None, None, None, last, time.isoformat(), text.strip(BLANK), "service messages")


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
    iphone = shape.startswith("[")
    if iphone and text.startswith(LRM) and not plain.endswith(":"):  # of a poll the first pass sees `POLL:` only
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
    if several and len(first) < 30 and first.endswith((":", "：")) and first == first.upper() and OPTION.fullmatch(option):
        return "<poll>", "", ""
    written = text.startswith(tuple(MARKS))
    if match := TAGGED.search(text):
        if text[match.start() - 1 : match.start()] in tuple(MARKS) or OWN_NAME.match(match[1]):
            return by_name(match[1]), match[1], (text[: match.start()] + text[match.end() :]).strip(BLANK)
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
    return next((mark for mark, kind in KINDS if kind.search(phrase)), "") if OMITTED.search(phrase) else ""


def chat_name(source):
    """As the file's name says; where that is always the same, as the zip's or the folder's does; "" where none says WhatsApp."""
    stem = source.path.stem
    if re.fullmatch(r"_?chat[\s\d()_-]*", stem, re.I):
        outer = [source.archive.stem if source.archive else "", source.path.parent.name]
        stem = next((name for name in outer if "whatsapp" in name.casefold()), "")
    stem = display(COPY.sub("", stem.replace("_", " ") if " " not in stem and "whatsapp" in stem.casefold() else stem))
    match = TITLE.fullmatch(stem)
    return display(match[1] or match[2]) if match else stem
