"""Secrets that people typed become marks, <phone> <email> <card> <iban> <key> <password>, before anything is written; the rest stays.

Each rule of RULES has a kind, a cheap hint, a pattern with a group `secret` (a match without it is something to step over: a URL), and a
function that says how many characters of that group are the secret, 0 when it only looked like one. A message with none of the hints
costs one search. It is a sieve: names, street addresses and passwords that nobody announced pass through it.
"""

import re

# How long the accounts of a country are.
IBAN_LENGTHS = {15: "NO", 16: "BE", 18: "DK FI FK FO GL NL SD", 19: "MK SI", 20: "AT BA EE KZ LT LU MN XK", 21: "CH HR LI LV",
    22: "BG BH CR DE GB GE IE ME RS VA", 23: "AE GI IL IQ OM SO TL", 24: "AD CZ ES MD PK RO SA SE SK TN VG", 25: "LY PT ST", 26: "IS TR",
    27: "BI DJ FR GR IT MC MR SM", 28: "AL AZ BY CY DO GT HN HU LB NI PL SV", 29: "BR EG PS QA UA", 30: "JO KW MU YE", 31: "MT SC",
    32: "LC", 33: "RU"}  # fmt: skip
IBAN_LENGTHS = {country: length for length, countries in IBAN_LENGTHS.items() for country in countries.split()}

# What follows "the password is" or "password:" without being one.
STOP = """
    a about above again all already also always an and any are as ask asked at bad be because before below blank but by can cannot case
    change click correct coz default did different do does don't empty enter field fine first for forgotten free from given gone good has
    have here how i i'm if in incorrect invalid is isn't it it's its just known later least like long lost me my new no none not nothing now
    of off ok okay old on one only open or our please press prompt required reset right same see sent set setup should simple so some
    something still sudo sure tell than that the their them then there they this to too try type unknown up use user valid very was we weak
    what when where which while who why will with without works would write wrong yes you your
    а без в вам введи введите верный все всё вы где да дам для его ее её если есть ещё еще забыл забыла забыли зачем и из или как какой
    когда мне мой мы на надо нет не неверный неправильный ни никому новый ну нужен он от по подходит потом правильный прежний простой скажу
    скинь смотри снова старый стандартный такой там твой тебе теперь то тот тоже тут ты у уже устарел что этот я який немає знаю
    aber auf auch bei bitte das dein der die egal ein eine er es falsch für hier ich ihr im immer ist ja kein leer mein mit neu nicht noch
    nur richtig schon sehr siehe und vergessen weiß wie wo zu
    c'est ce dans de des déjà en est et faux je la le les ma mais même ne non nouveau ou où oui pas pour quoi toujours un une
    como con cual cuál del donde incorrecta incorreta el lo mi misma mesma muy nada não nova nueva o para pero por que qual se sí sim su tu
    al che come cosa dove nel per più poi questa sbagliata stessa sua tua ale bu co czy değil gdzie jak jutro nie nowe proszę takie tam var
    yanlış yok z een fout geen goed het jouw maar mijn naar niet nog op van vergeten voor waar
"""
STOP = frozenset(STOP.split())
PARTICIPLE = re.compile(r"(?i)[^\W\d_]+(?:ing|ed|iert|ado|ido|ato|uto|ный|ён|ен|лся|тся)")  # the password is locked, expiring …
CLAUSE_END = re.compile(r"(?i)\s*(?:$|[.,;!?)\n]|\s(?:and|but|и|но|а|und|et|en|ve)\b)")
PLACEHOLDER = re.compile(r"(\D)\1*|[$%][A-Z_]+%?|[/~({[-].*|.*://.*|\W*")  # ****, $PASSWORD, {password}, a path, a URL


def whole(found):
    return len(found["secret"])


def card(found):
    """Luhn-valid: all of it, or what is left when its last group goes (a date may stand behind it)."""
    secret = found["secret"]
    for length in (len(secret), secret.rfind(" "), secret.rfind("-")):
        digits = re.sub("[ -]", "", secret[: max(length, 0)]).encode()
        doubled = digits[-2::-2].translate(bytes.maketrans(b"0123456789", b"0246813579"))
        if 13 <= len(digits) <= 19 and len(set(digits)) > 1 and (sum(digits[-1::-2] + doubled) - 48 * len(digits)) % 10 == 0:  # 48 is "0"
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
    return end if int("".join(str(int(letter, 36)) for letter in account[4:] + account[:4])) % 97 == 1 else 0


def random_letters(found):
    """Chance changes between lower, upper and digit at two letters of three; names and paths do at one of three."""
    secret = found["secret"]
    if re.fullmatch("(?:0x)?[0-9a-fA-F]+", secret):  # 64 are a wallet's private key, where nothing speaks of a checksum
        key = len(secret.removeprefix("0x")) == 64 and not re.search(r"(?i)sha-?\d|checksum", found.string)
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
        in_row = re.search(r"(?<![0-9])[0-9]{1,9} $", before) or re.match(r" [0-9]{1,9}(?![0-9])", after)
        if int(secret) % 512 == 0 or len(set(secret)) < 3 or in_row:
            return 0
    return len(secret)


KEY = re.compile(r"""(?x)
    (?P<secret>
      -----BEGIN\ [A-Z ]{0,30}PRIVATE\ KEY(?:\ BLOCK)?-----(?s:.*?)(?:-----END\ [A-Z ]{0,30}PRIVATE\ KEY(?:\ BLOCK)?-----|\Z)
    | https://hooks\.slack\.com/services/[\w/]+ | https://(?:\w+\.)?discord(?:app)?\.com/api/webhooks/[0-9]+/[\w-]+
    | (?:(?<![\w-])|(?<=/bot))[0-9]{8,10}:AA[\w-]{33}(?![\w-])  # a Telegram bot's, in its URLs too
    | (?<![\w/+-])(?: sk-[\w-]{20,} | [rs]k_(?:live|test)_\w{10,} | whsec_\w{16,} | gh[oprsu]_\w{20,} | github_pat_\w{22,}
      | glpat-[\w-]{16,} | xox[abeoprs]-[\w-]{10,} | A(?:KI|SI)A[A-Z0-9]{16}(?!\w) | AIza[\w-]{35} | ya29\.[\w-]{20,} | hf_[A-Za-z0-9]{20,}
      | npm_\w{30,} | pypi-[\w-]{40,} | SG\.[\w-]{16,}\.[\w-]{16,} | EAACEdEose0cBA\w+ | do[opr]_v1_[0-9a-f]{40,}
      | shp(?:at|ca|pa|ss)_[0-9a-fA-F]{32} | AGE-SECRET-KEY-1[A-Z0-9]{30,} | eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]*
      | [MNO][\w-]{22,27}\.[\w-]{6}\.[\w-]{27,40}(?![\w.]) ) )""")  # the last: Discord's bots
ASSIGNED = re.compile(r"""(?xi)
    (?: (?:secret|token|токен|(?:api|access|private|auth|licen[cs]e|encryption)[_ -]?key)[\w-]{0,20}["'`]?\s{0,2}[:=]\s{0,2}["'`]?
          | bearer\s | authorization\W{1,4}(?:basic\s|bearer\s|token\s)? )
        (?P<secret>[^\s"'`<>&;,(){}\[\]$%]{8,256}+)(?![(\[])  # no call of a function""")
BLOB = re.compile(r"""(?x)  # left: Telegram's file ids, checksums, what a file or a folder is called
    (?: :// | www\. | data: | magnet: | AAAA[BCE][23] )\S+ | ssh-\w+\s+\S+
    | (?<![\w+/.@\#~-])(?<!(?i:sha\d\d\d):)(?!CAAC|AgAC|BQAC|AwAC|BAAC|CgAC)
      (?P<secret>[A-Za-z0-9_+/-]{32,}+(?![\w@])={0,2})(?!\.\w|[ ][ *]\S)""")
IBAN = re.compile(r"(?i)(?<!\w)(?P<secret>[A-Z]{2}[0-9]{2}(?:[ \xa0-]?[A-Z0-9]){11,30})")
CARD = re.compile(r"""(?x)
    (?<![\w@<.,/\#=+-])(?!20\d\d[ -]20\d\d)(?P<secret>[2-6](?: [0-9]{12,18}
      | [0-9]{3}(?P<gap>[ -])[0-9]{4}(?P=gap)[0-9]{4}(?P=gap)[0-9]{1,7}(?:(?P=gap)[0-9]{1,3})?
      | [0-9]{3}(?P<hole>[ -])[0-9]{6}(?P=hole)[0-9]{4,5} ))(?![\w>]|[.,][0-9])""")
URL_PASSWORD = re.compile(r"://[^\s:/@<]{0,64}:(?P<secret>[^\s/<]{1,128})@\w")
COMMAND = re.compile(r"""(?xi)
    (?: \b(?:mysql\w{0,10}|mariadb)\s(?:[^\n|;]{0,60}?\s)?-p | \bsshpass\s+-p\s? | --pass(?:word|wd|phrase)?[ =]
          | \bnickserv\s+(?:id|identify)\s )["']?(?P<secret>[^\s<$"'-][^\s<"']{2,127})""")
PASSWORD = re.compile(r"""(?xi)
    (?<![^\W_])(?<![<@])
    (?: passwor[dt]s? | pass\s?phrase | passcode | pass | pswd? | pw | kennwort | wachtwoord | mot\s+de\s+passe | mdp | palavra-passe
      | contrase[ñn]a | senha | parola\s+d['’]ordine | has[łl](?:o|a|em) | [şs]ifre(?:m|si|n|niz)? | парол\w{0,3} | пасс(?:ворд)? | пасворд
      | (?P<weak>(?<!/)passwd|pwd|clave|parola(?:m|sı|n|nız)?) )[0-9]?["'*`)]{0,2}  # weak: commands, and words with another meaning
    (?P<gap> \s*\([^()\n]{1,30}\) | \s+(?:wi-?fi|wlan|вай-?фа\w{1,3})
      | \s+(?:for|to|of|on|at|от|для|к|ко|на|в|у|від|до|für|vom|zum|pour|de|du|para|da|do|per|di|voor|van|od|için)
        (?:\s+[\w'./@-]{1,30}){1,4}? )?
    (?: (?P<sign>\s*[:=]>?\s*|\s+(?:is|это|ist|lautet|est|es|é|è)\s*[:=]\s*)
      | (?P<verb>\s*(?:[-–—]>?|→)\s+|[,.?]?\s+(?:is|was|it['’]?s|это|це|был|будет|такой|теперь|ist|lautet|war|est|es|é|è|era|jest)\s+
                 (?:(?:now|still|just|теперь|jetzt|ora|ahora|maintenant)\s+)?)
      | \s+(?:(?:to|as|на|auf)\s+)?(?=(?-i:[a-zа-яё]{0,99}+\S)) )
    (?P<quote>["'`«“„](?=[^"'`»”“<\n]{3,64}["'`»”“]))?(?P<secret>(?(quote)[^"'`»”“<\n]{3,64}|[^\s<]{1,128}))""")
PIN = re.compile(r"""(?xi)
    (?<![^\W_])(?:pin|пин)(?:[ -]?(?:code|number|код\w{0,2}))?(?:\s*[:=–—-]\s*|\s+(?:(?:is|это|ist|lautet|es|est|é|è)\s+)?)
        (?P<secret>[0-9]{4,8})(?!\w|\.\w)""")
MENTION = re.compile(r"(?<!\w)@(?P<secret>[1-9][0-9]{9,14})(?!\w)")  # whom WhatsApp's phone has no name for
EMAIL = re.compile(r"""(?x)  # left: what git clones from, images for two densities, systemd's units, where scp copies to
    (?<!\w)(?<![^\s>]/)(?<!\w[.+%-])(?!git@)(?P<secret>\w[\w.+%'-]{0,63}+@(?![23]x\.)
        (?:[\w-]{1,63}\.){1,6}(?:xn--[\w-]{2,30}|[^\W\d_]{2,24}))(?<!\.service)(?![\w-]|\.[^\W\d_]|:[~/]|:\w+/)""")
PHONE = re.compile(
    r"""(?x)
    (?: :// | www\. | / )\S+
    | (?<![\w\#№\\$€£@+])(?<![\#№][ ])(?<!\d[.:/-])(?<!\w-)(?P<secret>
        (?:\+|(?<!\d[ ])00[ ]?(?=[1-9]))\d(?:\d|GAP(?=\d\d|\dGAP\d\d)\d){7,14}                 # +49 170 1234567
      | (?:[178][ -]?)?\((?:\+\d{1,3}|\d{2,5})\)[ -]?\d(?:[ /-]?\d){4,8}                       # (030) 1234567, 8 (916) 123-45-67
      | (?!\d\d[/-]\d\d[/-](?:\d\d){1,2}(?!\d|[/-]\d))                                         # no date
        0[1-9]\d{0,3}(?:[ ]?[/-][ ]?|[ ])(?=\d\d)\d(?:\d|(?:[ ]?[/-][ ]?|[ ])(?=\d\d)\d){5,9}    # 0170 1234567, 06 12 34 56 78
      | 0[1-9](?:\.\d\d){4} | (?:1[-. ])?[2-9]\d\d(?P<gap>[-. ])\d{3}(?P=gap)\d{4}             # 06.12.34.56.78, 555-123-4567
      | [78][ -]?[3-9]\d\d[ -]?\d{3}[ -]?\d\d[ -]?\d\d | (?:\d{3}[ -])?\d{3}-\d\d-\d\d         # 8 916 123-45-67
      | [5-9]\d\d(?:[ ]\d\d){3} | \d{3}-\d{3}-\d{3} | 3\d\d[ /-]\d{7} | [1-9]{2}[ ]9\d{4}-\d{4}  # Spain, Poland, Italy, Brazil
      | (?<![=.,-])(?<!(?<!tel)(?<!one)(?<!тел)(?<!фон):)(?!(?:19|20)\d\d[01]\d[0-3]\d|\d*0{6}(?!\d))
        \d{10,12}(?!,\d\d(?!\d)|\s?(?i:[kmgt]?i?b|bytes|sectors|blocks)\b)                                 # bare; no date, no round number
    )(?![\w@%€$£₽°>]|[.:/-]\d)""".replace("GAP", r"(?:[ \xa0]?[-./()\u2010-\u2012][ \xa0(]?|[ \xa0]\(?)")
)

# Hints are for lower case. Each alternative begins with a literal, so that `re` leaps from one possible first letter to the next, and a
# word is known by a rare letter of it.
MANY, LONG = r"(?:\W{0,3}[0-9]){6}", r"\S{8}|(?<=\S{9})"  # behind a digit: six more; a long token around it
NUMBER, TOKEN, EITHER = ("|".join(f"{digit}(?:{then})" for digit in "0123456789") for then in (MANY, LONG, f"{MANY}|{LONG}"))
AT = r"@(?<=\S@)\w"
NAMES = r"k(?:ey|ia|en(?<=token))|кен(?<=токен)|cret(?<=secret)|beare|z(?<=authoriz)"
WORDS = (
    r"p(?:ass|sw|aro|wd?\b|in(?:\b|-?c)|(?<=\bmdp)\b)|па(?:рол|с[св])|пин|contrase|ve(?<=clave)|h(?:a(?<=senha)|as[lł])|fre(?<=[sş]ifre)|wachtw"
    r"|k(?:ennw|serv)|ql(?<=mysql)|b(?<=mariadb)"
)
RULES = [
    ("key", f"{NAMES}|{TOKEN}", KEY, whole),
    ("password", AT, URL_PASSWORD, whole),
    ("key", NAMES, ASSIGNED, assigned),
    ("key", TOKEN, BLOB, random_letters),
    ("iban", NUMBER, IBAN, iban),
    ("card", NUMBER, CARD, card),
    ("password", WORDS, COMMAND, command),
    ("password", WORDS, PASSWORD, password),
    ("password", WORDS, PIN, whole),
    ("email", AT, EMAIL, whole),  # after passwords, which may hold an @
    ("phone", NUMBER, MENTION, whole),
    ("phone", NUMBER, PHONE, phone),
]
SUSPECT = re.compile("|".join([NAMES, WORDS, AT, EITHER])).search
RULES = [(kind, re.compile(hint).search, pattern, length) for kind, hint, pattern, length in RULES]


def redact(text, counts):
    """`text` with its secrets replaced; counts[kind] grows by one for each. What is redacted already stays as it is."""
    before = None
    while before != text and SUSPECT(low := text.lower()):  # until nothing changes: what stood behind another secret is found; idempotent
        before = text
        for kind, hint, pattern, length in RULES:
            if hint(low):
                text = replace(text, kind, pattern, length, counts)
    return text


def replace(text, kind, pattern, length, counts):
    """A mark goes in before the search goes on, so that what stands behind a secret isn't taken for more of it."""
    at = 0
    while found := pattern.search(text, at):
        start = found.start("secret")
        if start < 0:
            at = found.end()
        elif size := length(found):
            text = f"{text[:start]}<{kind}>{text[start + size :]}"
            counts[kind] += 1
            at = start + len(kind) + 2
        else:
            at = max(start, found.start() + 1)
    return text
