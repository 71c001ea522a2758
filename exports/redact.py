"""Replace secrets that people typed with marks before anything is written.

The marks: <phone> <email> <card> <iban> <key> <password>. Rules and words are in redact.toml; a
message without their hints costs one search. This is a sieve: names, street addresses and passwords
that nobody announces pass through it.
"""

import collections
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

TABLE = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
IBAN_LENGTHS = {
    country: int(length)
    for length, countries in TABLE["iban_lengths"].items()
    for country in countries.split()
}
STOP = frozenset(TABLE["stop"].split())  # what follows "password is" without being one
# The password is locked, expiring …
PARTICIPLE = re.compile(r"(?i)[^\W\d_]+(?:ing|ed|iert|ado|ido|ato|uto|ный|ён|ен|лся|тся)")
CLAUSE_END = re.compile(r"(?i)\s*(?:$|[.,;!?)\n]|\s(?:and|but|и|но|а|und|et|en|ve)\b)")
OTHER_DIGIT = re.compile(r"[^\D0-9]")  # Arabic, Persian, Devanagari, full-width …
has_other_digit = OTHER_DIGIT.search
FULL_WIDTH = str.maketrans("＋－−ー（）．：\u3000", "+---().: ")  # between digits of full width
PHONE_GROUPS = re.compile(
    "(?:[1-9][0-9]{0,2} )?(?:"
    + "|".join(TABLE["phone_groups"]["with_country_code"])
    + ")|"
    + "|".join(TABLE["phone_groups"]["alone"])
)
# ****, $PASSWORD, {password}, a path, a URL
PLACEHOLDER = re.compile(r"(\D)\1*|[$%][A-Z_]+%?|[/~({[-].*|.*://.*|\W*")


# --- how much of a rule's match is a secret: its length, 0 of none; named in redact.toml


def whole(match: re.Match) -> int:
    return len(match["secret"])


def card(match: re.Match) -> int:
    """Luhn-valid: all of it, or all but the last group, which may be a date."""
    secret = match["secret"]
    for length in (len(secret), secret.rfind(" "), secret.rfind("-")):
        digits = re.sub("[ -]", "", secret[: max(length, 0)]).encode()
        doubled = digits[-2::-2].translate(bytes.maketrans(b"0123456789", b"0246813579"))
        checksum = sum(digits[-1::-2] + doubled) - ord("0") * len(digits)
        if 13 <= len(digits) <= 19 and len(set(digits)) > 1 and checksum % 10 == 0:
            return length
    return 0


def iban(match: re.Match) -> int:
    """As long as its country's are, whatever follows a space, and 1 modulo 97."""
    secret = match["secret"]
    places = [at for at, letter in enumerate(secret) if letter.isalnum()]
    length = IBAN_LENGTHS.get(secret[:2].upper(), 99)
    end = places[length - 1] + 1 if len(places) >= length else 0
    if not end or match.string[match.start() + end :][:1].isalnum():
        return 0
    account = re.sub(r"\W", "", secret[:end])
    number = "".join(str(int(letter, 36)) for letter in account[4:] + account[:4])
    return end if int(number) % 97 == 1 else 0


def random_letters(match: re.Match) -> int:
    """Random text changes between lower, upper and digit at 2 letters of 3, a name at 1 of 3."""
    secret = match["secret"]
    if re.fullmatch("(?:0x)?[0-9a-fA-F]+", secret):
        # 64 are a wallet's private key, unless the message is about a checksum.
        checksum = re.search(r"(?i)sha-?\d|checksum", match.string)
        is_key = len(secret.removeprefix("0x")) == 64 and not checksum
    else:
        is_key = all(re.search(kind, secret) for kind in ("[a-z]", "[A-Z]", "[0-9].*[0-9]"))
        changes = re.findall("[a-z]+|[A-Z]+|[0-9]+", secret)
        is_key = is_key and len(changes) > 0.45 * len(secret)
    return len(secret) if is_key else 0


def assigned(match: re.Match) -> int:
    """A digit tells a key from a word of prose or of a program."""
    secret = match["secret"].rstrip(".:?!")
    return len(secret) if re.search("[0-9]", secret) and "://" not in secret else 0


def command(match: re.Match) -> int:
    return len(match["secret"]) if match["secret"].lower() not in STOP else 0


def looks_secret(word: str) -> bool:
    """A number, a digit beside a letter, a symbol or a capital inside."""
    shape = r"^[0-9]+$|[0-9].*[^\W\d_]|[^\W\d_].*[0-9]|\w[!@#$%^&*+]+\w|[a-zа-я][A-ZА-Я]"
    return len(word) >= 4 and "=" not in word and bool(re.search(shape, word))


def password(match: re.Match) -> int:
    """After a colon any word not in STOP; after `is` one that ends its clause; else by its look."""
    word, gap = match["secret"], match["gap"]
    if not match["quote"]:
        word = re.sub(r"[\s.,:;?)\]}>»”’\"'`…]+$", "", word)
    if len(word) < 3 or word.lower() in STOP or PLACEHOLDER.fullmatch(word):
        return 0
    ends = match["quote"] or CLAUSE_END.match(match.string, match.start("secret") + len(word))
    if match["sign"]:
        announced = ends or not gap
    elif match["verb"]:
        announced = ends and not match["weak"] and not PARTICIPLE.fullmatch(word)
    elif match["weak"] or " " in word or (gap and (len(word) < 6 or not re.search("[0-9]", word))):
        return 0
    else:
        announced = False
    return len(word) if announced or looks_secret(word) else 0


def phone(match: re.Match) -> int:
    """Bare digits aren't one in a row of numbers, as whole sectors, or of one or two digits."""
    secret = match["secret"]
    if secret.isdigit():
        start, end = match.span("secret")
        before, after = match.string[max(0, start - 12) : start], match.string[end : end + 12]
        in_row = re.search(r"(?<![0-9])[0-9]{1,9} $", before)
        in_row = in_row or re.match(r" [0-9]{1,9}(?![0-9])", after)
        is_size = int(secret) % 512 == 0 or int(secret) >> 4 == 0xFFFFFFF
        if in_row or is_size or len(set(secret)) < 3:
            return 0
    return len(secret)


def grouped_phone(match: re.Match) -> int:
    """Grouped as phone numbers are, without rows (20 25 30 35) and ranges (6881-6999)."""
    secret = match["secret"]
    groups = re.findall("[0-9]+", secret)
    if not PHONE_GROUPS.fullmatch(" ".join(groups)):
        return 0
    if len(groups) > 2:
        pairs = len(groups[1]) == len(groups[-2]) == len(groups[-1]) == 2
        in_row = pairs and groups[-4:] == sorted(groups[-4:], key=int)
    else:
        first, last = groups
        alike = len(first) == len(last) and first[0] == last[0]
        in_row = " " not in secret and alike and first <= last
    return 0 if in_row else len(secret)


LENGTHS = (
    whole, card, iban, random_letters, assigned, command, password, phone, grouped_phone
)  # fmt: skip


# --- rules

# Each alternative of a hint begins with a literal, so that `re` leaps from one possible first
# letter to the next; a word is known by a rare letter of it.
MANY = r"(?:\W{0,3}[0-9]){6}"  # after a digit: six more
LONG = r"\S{8}|(?<=\S{9})"  # around a digit: a long token


def after_digit(pattern: str) -> str:
    return "|".join(f"{digit}(?:{pattern})" for digit in "0123456789")


HINTS = {name: "|".join(parts) for name, parts in TABLE["hints"].items()}
HINTS |= {"number": after_digit(MANY), "token": after_digit(LONG)}


class Rule(NamedTuple):
    kind: str
    hint: Callable  # finds what a text with such a secret has
    pattern: re.Pattern  # its group `secret`; a match without it is stepped over
    length: Callable[[re.Match], int]


def compile_rule(rule: dict) -> Rule:
    length = next(f for f in LENGTHS if f.__name__ == rule.get("length", "whole"))
    hint = re.compile("|".join(HINTS[name] for name in rule["hints"])).search
    pattern = re.compile(rule["pattern"].replace("GAP", rule.get("gap", "")))
    return Rule(rule["kind"], hint, pattern, length)


RULES = list(map(compile_rule, TABLE["rules"]))
ANY_HINT = [HINTS["names"], HINTS["words"], HINTS["at"], after_digit(f"{MANY}|{LONG}")]
has_hint = re.compile("|".join(ANY_HINT)).search


def redact(text: str, counts: collections.Counter[str]) -> str:
    """Replace the secrets in a text and count them by kind; redacting twice changes nothing."""
    # Search `plain`, the text with ASCII digits, letter for letter as long as the text.
    plain = text if text.isascii() or not has_other_digit(text) else to_ascii_digits(text)
    before = None
    # Until nothing changes, for a secret may hide the next one.
    while before != text and has_hint(low := plain.lower()):
        before = text
        for rule in RULES:
            if rule.hint(low):
                text, plain = replace(text, plain, rule, counts)
    return text


def to_ascii_digits(text: str) -> str:
    return OTHER_DIGIT.sub(lambda digit: str(int(digit[0])), text).translate(FULL_WIDTH)


def replace(text: str, plain: str, rule: Rule, counts: collections.Counter[str]) -> tuple[str, str]:
    """Replace what a rule finds. Each mark goes in before the search goes on after it."""
    at = 0
    mark = f"<{rule.kind}>"
    while match := rule.pattern.search(plain, at):
        start = match.start("secret")
        if start < 0:
            at = match.end()
        elif size := rule.length(match):
            text = text[:start] + mark + text[start + size :]
            plain = plain[:start] + mark + plain[start + size :]
            counts[rule.kind] += 1
            at = start + len(mark)
        else:
            at = max(start, match.start() + 1)
    return text, plain
