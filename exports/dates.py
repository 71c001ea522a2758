"""Times as people and programs write them: ISO, seconds since 1970, dates in the common orders."""

import datetime
import functools
import re

from cli import UserError

EPOCH = re.compile(r"\d{9,17}(?:\.\d{1,9})?", re.ASCII)
MONTHS = "jan feb mar apr may jun jul aug sep oct nov dec".split()
NUMERIC = re.compile(
    r"(?P<a>\d{1,4})(?P<sign>[-/.年년])\s?(?P<b>\d{1,2})[-/.月월]\s?(?P<c>\d{1,4})[日일.]?",
    re.ASCII,
)
NAMED = re.compile(
    r"(?:[a-z]{3,9}\.?,?\s+)?(?:(?P<day>\d{1,2})\.?\s+(?P<month>[a-z]{3})[a-z]*\.?"
    r"|(?P<month2>[a-z]{3})[a-z]*\.?\s+(?P<day2>\d{1,2})),?\s+(?P<year>\d{4})",
    re.ASCII,
)
TIME = re.compile(
    r"[,\sT]*(?:at\s)?(?:(?P<before>[ap]m|오전|오후|上午|下午|午前|午後)\s?)?(?P<hour>\d{1,2})[:.](?P<minute>\d\d)"
    r"(?:[:.](?P<second>\d\d))?(?:[.,]\d{1,9})?\s?(?P<after>[ap]\.?m\.?)?"
    r"\s?(?P<zone>z|utc|gmt|[+-]\d\d:?\d\d)?",
    re.IGNORECASE | re.ASCII,
)
AFTERNOON = ("pm", "오후", "下午", "午後")
SHOWN = {"dmy": "day/month/year", "mdy": "month/day/year"}


@functools.lru_cache(1 << 12)
def find_date(text: str) -> tuple[tuple[int, int, int], str, str] | None:
    """Return (three numbers, their order, the rest); the order "?" where two are possible."""
    if match := NAMED.match(text):
        name, day = match["month"] or match["month2"], match["day"] or match["day2"]
        if name not in MONTHS:
            return None
        numbers = int(match["year"]), MONTHS.index(name) + 1, int(day)
        return numbers, "ymd", text[match.end() :]
    match = NUMERIC.match(text)
    if not match:
        return None
    numbers = int(match["a"]), int(match["b"]), int(match["c"])
    if len(match["a"]) == 4:
        order = "ymd"
    else:
        order = "dmy" if match["sign"] == "." else "?"  # nobody writes month.day.year
    return numbers, order, text[match.end() :]


def make_date(numbers: tuple[int, int, int], order: str) -> datetime.date | None:
    fields = dict(zip(order, numbers, strict=True))
    year = fields["y"] + (2000 if fields["y"] < 70 else 1900 if fields["y"] < 100 else 0)
    try:
        return datetime.date(year, fields["m"], fields["d"])
    except ValueError:
        return None


def find_time(text: str) -> tuple[datetime.time, datetime.timedelta | None] | None:
    """Return (time of day, its zone or None); midnight of no text, None of other text."""
    if not text.strip():
        return datetime.time(), None
    match = TIME.fullmatch(text.rstrip())
    if not match:
        return None
    half = (match["before"] or match["after"] or "").lower().replace(".", "")
    hour = int(match["hour"])
    if half:
        if not 1 <= hour <= 12:
            return None
        hour = hour % 12 + 12 * (half in AFTERNOON)
    try:
        time = datetime.time(hour, int(match["minute"]), int(match["second"] or 0))
    except ValueError:
        return None
    zone = match["zone"]
    if not zone:
        return time, None
    if zone.isalpha():
        return time, datetime.timedelta()
    sign = -1 if zone[0] == "-" else 1
    minutes = int(zone[1:3]) * 60 + int(zone[-2:])
    return time, datetime.timedelta(minutes=sign * minutes)


class Clock:
    """Read times, all in one order of day and month. `add` all, then `settle`, then `read`."""

    def __init__(self):
        self.impossible = {"dmy": 0, "mdy": 0}
        self.example = ""  # a date whose day and month may be either way round
        self.order = "dmy"

    @staticmethod
    def is_time(text: str) -> bool:
        return bool(EPOCH.fullmatch(text) or find_date(text.lower()))

    def add(self, text: str) -> None:
        found = find_date(text.lower())
        if not found or found[1] != "?":
            return
        self.example = self.example or text
        for order in self.impossible:
            self.impossible[order] += make_date(found[0], order) is None

    def settle(self, file: str) -> None:
        """Choose the order with the fewer impossible dates. UserError where both have as many."""
        few, many = sorted(self.impossible, key=lambda order: self.impossible[order])
        if self.example and self.impossible[few] == self.impossible[many]:
            raise UserError(
                f"{file}: {self.example} may be {SHOWN['dmy']} or {SHOWN['mdy']}",
                "Write the times as 2024-01-31 18:05, or as seconds since 1970.",
            )
        self.order = few

    def read(self, text: str) -> tuple[int, str] | None:
        """Return (seconds since 1970, local ISO time or ""); None of what is no time.

        A time without a zone is taken as it stands, as if it were UTC's.
        """
        if EPOCH.fullmatch(text):
            at = float(text)
            for unit in (1_000_000, 1_000):  # micro- and milliseconds since 1970
                if at >= 1e8 * unit:
                    at /= unit
                    break
            return int(at), ""
        found = find_date(text.lower())
        if not found:
            return None
        numbers, order, rest = found
        date = make_date(numbers, self.order if order == "?" else order)
        time = find_time(rest)
        if date is None or time is None:
            return None
        local = datetime.datetime.combine(date, time[0])
        at = int(local.replace(tzinfo=datetime.UTC).timestamp())
        if time[1] is not None:
            at -= int(time[1].total_seconds())
        return (at, local.isoformat()) if at >= 0 else None
