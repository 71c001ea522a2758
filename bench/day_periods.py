"""Add every CLDR language's words for halves and parts of the day to exports/whatsapp.toml.

    python -m bench.day_periods            needs babel (requirements-dev.txt)

Existing words stay, because older phones write older words: the table joins babel 2.6.0, 2.9.1 and
2.18.0.
"""

import collections
import re
from collections.abc import Iterator
from pathlib import Path

TABLE = Path(__file__).parent.parent / "exports" / "whatsapp.toml"
BEGIN = (
    "[hours] # of CLDR, by `python -m bench.day_periods`: "
    "the hours of the day that a word may mean\n"
)
FIXED = {"am": range(12), "pm": range(12, 24), "noon": range(12, 13), "midnight": range(1)}
WIDTHS = ("wide", "abbreviated")  # of narrow ones no phone's date is made


def day_periods() -> Iterator[tuple[str, str, str, frozenset[int]]]:
    """Yield (locale, period, word, the hours that it means in that locale)."""
    from babel import Locale, localedata

    for name in localedata.locale_identifiers():
        locale = Locale.parse(name)
        hours = {period: frozenset(span) for period, span in FIXED.items()}
        for period, rules in dict(locale.day_period_rules.get(None, {})).items():
            for rule in rules:
                if "from" in rule:
                    begin, end = (rule[edge] // 3600 for edge in ("from", "before"))
                    span = range(begin, end + 24 * (end <= begin))
                    hours[period] = hours.get(period, frozenset()) | {hour % 24 for hour in span}
        for widths in locale.day_periods.values():
            for width in WIDTHS:
                for period, word in dict(widths.get(width, {})).items():
                    if period in hours:
                        yield name, period, word, hours[period]


def table() -> str:
    """The section of the .toml: words by the hours that they mean in all languages together."""
    from exports.whatsapp import FILLER, PHRASES, alternatives, word

    meanings = collections.defaultdict(set)
    for hours, words in PHRASES.get("hours", {}).items():
        for plain in alternatives(words.strip()):
            meanings[plain] |= set(map(int, hours.split()))
    for _, _, text, hours in day_periods():
        if plain := word(text):
            meanings[plain] |= hours
    lines = collections.defaultdict(list)
    for plain, hours in sorted(meanings.items()):
        if (plain not in FILLER or plain == "a") and not re.search(r"[\d/]", plain):
            lines[" ".join(map(str, sorted(hours)))].append(plain)
    return BEGIN + "".join(
        f"'{hours}' = '''\n{wrapped(words)}'''\n" for hours, words in sorted(lines.items())
    )


def wrapped(words: list[str]) -> str:
    text = ""
    for plain in words:
        room = len(text) - text.rfind("\n") + len(plain) < 130
        text += ("|" if room else "\n") * bool(text) + plain
    return text


def main() -> None:
    text = TABLE.read_text(encoding="utf-8")
    before, found, after = text.partition(BEGIN)
    rest = after[after.index("\n[") :] if found else ""
    TABLE.write_text(before + table() + rest, encoding="utf-8")


if __name__ == "__main__":
    main()
