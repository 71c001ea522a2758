"""Secrets that people typed become marks, <phone> <email> <card> <iban> <key> <password>, before anything is written; the rest stays.

Rules and words are in redact.toml. A message with none of their hints costs one search. It is a sieve: names, street addresses and
passwords that nobody announced pass through it.
"""

import collections
import re
import tomllib
from pathlib import Path

TABLE = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
IBAN_LENGTHS = {
    country: int(length)
    for length, countries in TABLE["iban_lengths"].items()
    for country in countries.split()
}
STOP = frozenset(TABLE["stop"].split())
PARTICIPLE = re.compile(
    r"(?i)[^\W\d_]+(?:ing|ed|iert|ado|ido|ato|uto|ный|ён|ен|лся|тся)"
)  # the password is locked, expiring …
CLAUSE_END = re.compile(r"(?i)\s*(?:$|[.,;!?)\n]|\s(?:and|but|и|но|а|und|et|en|ve)\b)")
OTHER_DIGIT = re.compile(r"[^\D0-9]")  # Arabic, Persian, Devanagari, full-width …
has_other_digit = OTHER_DIGIT.search
FULL_WIDTH = str.maketrans(
    "＋－−ー（）．：\u3000", "+---().: "
)  # what stands between digits of full width
PHONE_GROUPS = re.compile(
    "(?:[1-9][0-9]{0,2} )?(?:"
    + "|".join(TABLE["phone_groups"]["with_country_code"])
    + ")|"
    + "|".join(TABLE["phone_groups"]["alone"])
)
PLACEHOLDER = re.compile(
    r"(\D)\1*|[$%][A-Z_]+%?|[/~({[-].*|.*://.*|\W*"
)  # ****, $PASSWORD, {password}, a path, a URL


def whole(found):
    return len(found["secret"])


def card(found):
    """Luhn-valid: all of it, or what is left when its last group goes (a date may stand behind it)."""
    secret = found["secret"]
    for length in (len(secret), secret.rfind(" "), secret.rfind("-")):
        digits = re.sub("[ -]", "", secret[: max(length, 0)]).encode()
        doubled = digits[-2::-2].translate(bytes.maketrans(b"0123456789", b"0246813579"))
        if (
            13 <= len(digits) <= 19
            and len(set(digits)) > 1
            and (sum(digits[-1::-2] + doubled) - 48 * len(digits)) % 10 == 0
        ):  # 48 is "0"
            return length
    return 0


def iban(found):
    """As long as its country's are, whatever looks like more of it behind a space, and 1 modulo 97."""
    secret = found["secret"]
    places = [at for at, letter in enumerate(secret) if letter.isalnum()]
    length = IBAN_LENGTHS.get(secret[:2].upper(), 99)
    end = places[length - 1] + 1 if len(places) >= length else 0
    if not end or found.string[found.start() + end :][:1].isalnum():
        return 0
    account = re.sub(r"\W", "", secret[:end])
    return (
        end
        if int("".join(str(int(letter, 36)) for letter in account[4:] + account[:4])) % 97 == 1
        else 0
    )


def random_letters(found):
    """Chance changes between lower, upper and digit at two letters of three; names and paths do at one of three."""
    secret = found["secret"]
    if re.fullmatch(
        "(?:0x)?[0-9a-fA-F]+", secret
    ):  # 64 are a wallet's private key, where nothing speaks of a checksum
        key = len(secret.removeprefix("0x")) == 64 and not re.search(
            r"(?i)sha-?\d|checksum", found.string
        )
    else:
        key = all(re.search(letters, secret) for letters in ("[a-z]", "[A-Z]", "[0-9].*[0-9]"))
        key = key and len(re.findall("[a-z]+|[A-Z]+|[0-9]+", secret)) > 0.45 * len(secret)
    return len(secret) if key else 0


def assigned(found):
    """A digit in it tells a key from a word of prose or of a program."""
    secret = found["secret"].rstrip(".:?!")
    return len(secret) if re.search("[0-9]", secret) and "://" not in secret else 0


def command(found):
    return len(found["secret"]) if found["secret"].lower() not in STOP else 0


def looks_secret(word):
    """A number, a digit beside a letter, a symbol or a capital inside."""
    shape = r"^[0-9]+$|[0-9].*[^\W\d_]|[^\W\d_].*[0-9]|\w[!@#$%^&*+]+\w|[a-zа-я][A-ZА-Я]"
    return len(word) >= 4 and "=" not in word and re.search(shape, word)


def password(found):
    """After a colon any word that isn't in STOP, after `is` one that ends its clause, after nothing what looks like a password."""
    word, gap = found["secret"], found["gap"]
    if not found["quote"]:
        word = re.sub(r"[\s.,:;?)\]}>»”’\"'`…]+$", "", word)
    if len(word) < 3 or word.lower() in STOP or PLACEHOLDER.fullmatch(word):
        return 0
    ends = found["quote"] or CLAUSE_END.match(found.string, found.start("secret") + len(word))
    if found["sign"]:
        told = ends or not gap
    elif found["verb"]:
        told = ends and not found["weak"] and not PARTICIPLE.fullmatch(word)
    elif found["weak"] or " " in word or (gap and (len(word) < 6 or not re.search("[0-9]", word))):
        return 0
    else:
        told = False
    return len(word) if told or looks_secret(word) else 0


def phone(found):
    """Bare digits are none when they count bytes (whole sectors), repeat one or two digits, or stand in a row of numbers."""
    secret, start, end = found["secret"], *found.span("secret")
    if secret.isdigit():
        before, after = found.string[max(0, start - 12) : start], found.string[end : end + 12]
        in_row = re.search(r"(?<![0-9])[0-9]{1,9} $", before) or re.match(
            r" [0-9]{1,9}(?![0-9])", after
        )
        if (
            int(secret) % 512 == 0
            or int(secret) >> 4 == 0xFFFFFFF
            or len(set(secret)) < 3
            or in_row
        ):
            return 0
    return len(secret)


def grouped_phone(found: re.Match[str]) -> int:
    """Grouped as phone numbers are; 20 25 30 35, 5 12 19 33 41 and 6881-6999 are rows and ranges."""
    secret = found["secret"]
    groups = re.findall("[0-9]+", secret)
    if not PHONE_GROUPS.fullmatch(" ".join(groups)):
        return 0
    if len(groups) > 2:
        in_row = len(groups[1]) == len(groups[-2]) == len(groups[-1]) == 2 and groups[
            -4:
        ] == sorted(groups[-4:], key=int)
    else:
        in_row = (
            " " not in secret
            and len(groups[0]) == len(groups[1])
            and secret[0] == groups[1][0]
            and groups[0] <= groups[1]
        )
    return 0 if in_row else len(secret)


# Each alternative of a hint begins with a literal, so that `re` leaps from one possible first letter to the next; a word is known by a rare
# letter of it. Behind a digit: six more; a long token around it.
MANY, LONG = r"(?:\W{0,3}[0-9]){6}", r"\S{8}|(?<=\S{9})"
NUMBER, TOKEN, EITHER = (
    "|".join(f"{digit}(?:{then})" for digit in "0123456789")
    for then in (MANY, LONG, f"{MANY}|{LONG}")
)
HINTS = {name: "|".join(parts) for name, parts in TABLE["hints"].items()} | {
    "number": NUMBER,
    "token": TOKEN,
}
LENGTHS = {
    function.__name__: function
    for function in (
        whole,
        card,
        iban,
        random_letters,
        assigned,
        command,
        password,
        phone,
        grouped_phone,
    )
}
RULES = [
    (
        rule["kind"],
        re.compile("|".join(HINTS[name] for name in rule["hints"])).search,
        re.compile(rule["pattern"].replace("GAP", rule.get("gap", ""))),
        LENGTHS[rule.get("length", "whole")],
    )
    for rule in TABLE["rules"]
]
SUSPECT = re.compile("|".join([HINTS["names"], HINTS["words"], HINTS["at"], EITHER])).search


def redact(text: str, counts: collections.Counter[str]) -> str:
    """`text` with its secrets replaced; counts[kind] grows by one for each. What is redacted already stays as it is."""
    # Searched is `plain`, the text with ASCII digits, letter for letter as long as the text.
    plain = text if text.isascii() or not has_other_digit(text) else to_ascii_digits(text)
    before = None
    while before != text and SUSPECT(
        low := plain.lower()
    ):  # until nothing changes: what stood behind another secret is found; idempotent
        before = text
        for kind, hint, pattern, length in RULES:
            if hint(low):
                text, plain = replace(text, plain, kind, pattern, length, counts)
    return text


def to_ascii_digits(text: str) -> str:
    return OTHER_DIGIT.sub(lambda digit: str(int(digit[0])), text).translate(FULL_WIDTH)


def replace(text, plain, kind, pattern, length, counts):
    """A mark goes in before the search goes on, so that what stands behind a secret isn't taken for more of it."""
    at = 0
    mark = f"<{kind}>"
    while found := pattern.search(plain, at):
        start = found.start("secret")
        if start < 0:
            at = found.end()
        elif size := length(found):
            text = text[:start] + mark + text[start + size :]
            plain = plain[:start] + mark + plain[start + size :]
            counts[kind] += 1
            at = start + len(mark)
        else:
            at = max(start, found.start() + 1)
    return text, plain
