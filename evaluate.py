"""The report card: does it sound like me, and what does it know? `python evaluate.py ckpt/` writes report.html and report.json there.

    data/val.jsonl ─ moments ▶ Moment… ─ listen ▶ Voice (the clone, its base) ─ measure ▶ report.json ─ page ▶ report.html

Nothing leaves this machine. A number is {"value", "low", "high", "n"}: 95% intervals by a bootstrap over sessions, of which there are `n`;
or {"value": null, "why"} where there is too little to tell.
"""

import collections
import dataclasses
import json
import math
import os
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import cli
import data
from cli import UserError, flag
from exports.redact import redact
from inference import generate
from inference.context import ExchangeIndex, statements
from training import distributed, step
from weights import devices, hf, hub
from weights.load import load_for_chat
from weights.tokenizer import load_tokenizer

CHOICES = 10  # the real reply among so many
FEW = 5  # sessions, below which nothing is said
DRAWS = 1000  # of the bootstrap
LONGEST = 64  # tokens of a generated reply
ROWS = 32  # replies that are written at a time
ROW_BYTES = 1 << 30  # of their keys and values, at most
PACKED = 512  # tokens of candidates that are read at a time
EVERY = 10  # seconds from line to line of progress, where there is no terminal
RELEARNT = 50  # draws of sessions from which what tells replies apart is learnt anew
RUN = 5  # words in a row that count as copied
RANDOM = 99  # strings beside a secret
GENERIC = """
    ok okay okey k kk yes yeah yep yup ya no nope nah lol haha hahaha hehe hm hmm mm mhm idk sure fine cool nice good great thanks thx ty np
    busy later soon same oh ah right true maybe ок окей да нет неа ага угу лол хаха ахах хз норм ладно хорошо понял спасибо пока занят потом
    ja nein nö jo klar gut danke oui non ouais si sí vale sì va bene bon merci gracias grazie tak nie evet hayır tamam
""".split()
EMOJI = re.compile("[\U0001f000-\U0001faff\u2600-\u27bf\u2b50\u2b55\u2764]")
SECRET = re.compile(  # an address, letters and digits mixed, or a number longer than a year
    r"[^\s@<>]+@[^\s@<>]+\.\w+|(?=[^\s<>]*\d)(?=[^\s<>]*[a-zA-Z])[\w.#!$%&*+-]{8,}|(?<![\w.])\+?\d(?:[ -]?\d){4,}(?!\w)"
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Does a clone sound like me? report.html for people, report.json for programs, in the first folder.

    python evaluate.py ckpt/                             the clone beside its base, on held-out sessions
    python evaluate.py ckpt-a/ ckpt-b/                   and beside another run
    python evaluate.py ckpt/ --blind-test --with NAME    a friend guesses which replies are mine
    """

    ckpts: tuple[str, ...] = flag(
        (),
        "the folder that train.py wrote, or two of them",
        positional=True,
        group="what to measure",
    )
    model: str | None = flag(None, "the base, when it lies elsewhere than the checkpoint says")
    data: str | None = flag(
        None, "the folder that data.py wrote", shown="what it was trained on, or data"
    )
    replies: int = flag(100, "held-out moments that are answered")
    baselines: bool = flag(
        False, "also prompts with past messages, DATA/facts.md, similar exchanges"
    )
    seed: int = flag(0, "the same numbers each time")
    device: str | None = flag(None, "cuda, mps or cpu", shown="the first there is")

    blind_test: bool = flag(
        False,
        "a page of one chat alone, of what you approve, and no report",
        group="a page for a friend",
    )
    with_: str | None = flag(None, "whose chat with me it is made of")


@dataclasses.dataclass(frozen=True)
class Example:
    """A held-out turn of mine: its session's number, the turns before, and my messages."""

    session: int
    before: list
    author: str
    mine: list


@dataclasses.dataclass(frozen=True)
class ModelOutputs:
    """What a model made of M moments. `nats`: (M, 10), of my reply and nine others; `alone`: the same without what came before;
    `replies`: messages; `tokens`: (M,), prompt and answer. `held_out`: its Evaluation on all of val.jsonl, None for a baseline;
    `secrets`, `canaries`: (K, 100), as in `exposure`. `content`: (M,), nats of my reply's text alone."""

    nats: np.ndarray
    alone: np.ndarray
    replies: list
    tokens: np.ndarray
    held_out: step.Evaluation | None
    secrets: np.ndarray
    canaries: np.ndarray
    content: np.ndarray | None = None


def main():
    options = cli.parse(Options)
    folders = check(options)
    runs = [cli.read_json(folder / "run.json", {}) for folder in folders]
    options = dataclasses.replace(options, data=options.data or data_of(runs[0]))
    headed, past = (
        data.load_sessions(Path(options.data) / f"{part}.jsonl") for part in ("val", "train")
    )
    talks, past = ([data.without_header(talk) for talk in some] for some in (headed, past))
    if options.blind_test:
        return blind_test(folders[0], headed, past, options)
    found = moments(headed)
    if not found:
        raise UserError(
            f"{options.data}/val.jsonl holds no turn of mine that answers somebody",
            "Make it anew with data.py.",
        )
    some = sample(found, options.replies, options.seed)
    choices = candidates(some, options.seed)
    names = dict(zip(("clone", "other"), folders))
    voices = {}
    for name, folder in [*names.items(), ("base", base_of(folders[0], options))]:
        if folder:
            voices |= voices_of(name, folder, headed, past, some, choices, options)
    report = measure(
        voices,
        talks,
        past,
        some,
        choices,
        options,
        max(run.get("trained_until", "") for run in runs),
    )
    report["runs"] = {name: curve(folder) for name, folder in names.items()}
    if options.baselines:
        kinds = {
            name: "LoRA" if hf.is_adapter(folder) else "all weights"
            for name, folder in names.items()
        }
        report["baselines"] = baselines(voices, some, choices, options.seed, kinds)
    cli.write_json(folders[0] / "report.json", rounded(report))
    cli.write_text(folders[0] / "report.html", page(rounded(report), voices, some, names))
    print(
        "\n".join(report["verdict"])
        + f"\n{folders[0]}/report.html says more. It quotes your chats: keep it to yourself."
    )


def check(options):
    """→ the checkpoints' folders. UserError for what is missing, before anything is loaded."""
    folders = [Path(folder) for folder in options.ckpts]
    if not 1 <= len(folders) <= (1 if options.blind_test else 2):
        raise UserError(
            f"{len(folders)} checkpoints are given",
            "python evaluate.py ckpt/   (or two, to compare them)",
        )
    for folder in folders:
        if not (hf.is_model(folder) or hf.is_adapter(folder)):
            raise UserError(f"{folder} holds no model", "Give the folder that train.py wrote.")
    for name, least in (("replies", 1), ("seed", 0)):
        if (value := getattr(options, name)) < least:
            raise UserError(
                f"--{name} {value}: {least} or more is needed", "Leave it out for the default."
            )
    if options.blind_test != bool(options.with_):
        raise UserError(
            "--blind-test and --with NAME belong together",
            "Say whose chat with you the friend may see: --with NAME",
        )
    needs = [] if options.blind_test else ["sklearn"] + ["bm25s"] * options.baselines
    for name in needs:
        try:
            __import__(name)
        except ImportError:
            raise UserError(
                f"{name} is not installed", "pip install -r requirements-extra.txt"
            ) from None
    return folders


def data_of(run):
    """Where what a run was trained on lies, by its run.json; or the folder that data.py writes if nothing else is said."""
    recorded = run.get("config", {}).get("data", "data")
    return recorded if Path(recorded).is_dir() else "data"


def base_of(folder, options):
    """Where a checkpoint's base lies; None where it has none, or a whole model's is not here."""
    if hf.is_adapter(folder):
        return options.model or hf.adapter_base(folder)
    run = cli.read_json(folder / "run.json", {})
    named = options.model or (
        "" if run.get("config", {}).get("from_scratch") else run.get("base", "")
    )
    return named if named and hf.is_model(named) else None


# --- what is held out


def moments(talks):
    """My turns of words that answer somebody."""
    return [
        Example(number, talk.turns[:i], talk.turns[i].author, data.text_messages(talk.turns[i]))
        for number, talk in enumerate(talks)
        for i in data.replies(talk)
    ]


def contact(talk):
    """Whom I talk with: a chat's name, or in a chat of two theirs, which no one else has."""
    return (
        next((turn.author for turn in data.without_header(talk).turns if not turn.me), talk.chat)
        if talk.type == "personal_chat"
        else talk.chat
    )


def sample(items, count, seed):
    """At most `count` of a list, in its order."""
    return [items[i] for i in sorted(np.random.default_rng(seed).permutation(len(items))[:count])]


def candidates(some, seed):
    """For each moment my reply and nine others of mine from other sessions; [] where there aren't so many."""
    draw, found = np.random.default_rng(seed), []
    for moment in some:
        others = [
            *dict.fromkeys(
                tuple(m.mine) for m in some if m.session != moment.session and m.mine != moment.mine
            )
        ]
        found.append(
            [moment.mine, *(list(others[i]) for i in draw.permutation(len(others))[: CHOICES - 1])]
        )
    return found if all(len(c) == CHOICES for c in found) else []


# --- what a model makes of it


def load(folder, options):
    """A folder, or a base's hub id, → (model, its tokenizer, tokens of context)"""
    folder, device = hub.resolve(folder), devices.pick_device(options.device)
    # a base's own tokenizer gives the ids of the checkpoint's, and tells which of them have no row
    # yet: they get the rows that training began with
    tokenizer = load_tokenizer(folder)
    model = load_for_chat(folder, options.model, 2048, device, tokenizer)
    return model, tokenizer, min(2048, model.config.max_position_embeddings)


class Progress:
    """What is done of a voice's parts: a bar on a terminal, elsewhere a line every EVERY seconds.

    `clone: replies 40/100, 1:10 left`
    """

    def __init__(self, name: str):
        self.name, self.what, self.next_line, self.begun = name, "", 0.0, 0.0
        self.bar = tqdm(disable=True)

    def show(self, what: str, done: float, total: int) -> None:
        now, terminal = time.monotonic(), sys.stderr.isatty()
        if what != self.what:
            self.close()
            name = f"{self.name}: {what}"
            self.what, self.begun = what, now
            self.bar = tqdm(total=total, desc=name, leave=False, disable=not terminal)
        self.bar.update(int(done) - self.bar.n)
        if not terminal and now >= self.next_line:
            left = (now - self.begun) * (total - done) / done if done else None
            estimate = "" if left is None else f", {self.clock(left)} left"
            print(f"{self.name}: {what} {int(done)}/{total}{estimate}", file=sys.stderr, flush=True)
            self.next_line = now + EVERY

    def close(self) -> None:
        self.bar.close()
        self.what = ""

    @staticmethod
    def clock(seconds: float) -> str:
        return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def voices_of(name, folder, talks, past, some, choices, options):
    """{name: Voice}, and with --baselines the same model with more in its prompt. One model is in memory at a time."""
    model, tokenizer, size = load(folder, options)
    progress = Progress(name)
    held_out = held_out_of(model, tokenizer, talks, min(1024, size), options, progress)
    model.eval()
    ways = {name: lambda moment: moment.before}
    if options.baselines:
        ways |= prompts(name, past, Path(options.data) / "facts.md", tokenizer, size)
    # beside a prompt lie candidates: a pack of short ones, or one as long as the context
    decoder = generate.Decoder(model, tokenizer, size + max(PACKED, size) + generate.SAMPLE_ROUND)
    alone = dict.fromkeys(tuple(reply) for replies in choices for reply in replies)
    if alone:
        alone = dict(
            zip(alone, likelihoods(decoder, [], [*map(list, alone)], some[0].author, size)[0])
        )
    without = np.array([[alone[tuple(reply)] for reply in ten] for ten in choices])
    hidden = [canary["secret"] for canary in canaries_of(options, past)]
    strings, planted = secrets_of(past, hidden, options.seed)
    known: list[np.ndarray] = []
    for before, me, replies in strings + planted:
        progress.show("secrets", len(known), len(strings) + len(planted))
        known.append(likelihoods(decoder, before, replies, me, size)[0])
    secrets, canaries = np.array(known[: len(strings)]), np.array(known[len(strings) :])
    voices = {}
    for way, before in ways.items():
        progress.close()
        progress.name = way
        contexts = [before(moment) for moment in some]
        nats, content, replies, tokens = answers_of(
            decoder, contexts, some, choices, size, options.seed, progress
        )
        evaluation = held_out if way == name else None
        voices[way] = ModelOutputs(
            nats, without, replies, tokens, evaluation, secrets, canaries, content
        )
    progress.close()
    return voices


def held_out_of(model, tokenizer, talks, length, options, progress):
    """→ the Evaluation of all of my turns in `talks`"""
    samples = [
        s for i, talk in enumerate(talks) for s in data.split(talk, tokenizer, length, "me", i)
    ]
    rows = data.pack(samples, length)

    class Reporting(distributed.Distributed):
        def advance(self):
            progress.show("held-out likelihood", min(2 * self.progress[0], len(rows)), len(rows))
            super().advance()

    return step.evaluate(model, rows, Reporting(devices.pick_device(options.device)), 2, length)


def answers_of(decoder, contexts, some, choices, size, seed, progress):
    """What a model makes of moments after `contexts` → nats (M, 10), nats of my reply's text (M,), messages of its replies, tokens (M,).

    A moment's prompt is read once, for its candidates and for its reply, and what it begins with as
    the one before did is not read again. Replies are written side by side.
    """
    room = min(LONGEST, size // 2)
    prompts = [
        generate.truncate_prompt(turns, moment.author, decoder.tokenizer, size - room)
        for turns, moment in zip(contexts, some)
    ]
    longest = max(map(len, prompts)) + room
    token = sum(layer[:, :, :, :1].nbytes for layer in decoder.cache.layers)
    batch = generate.DecodeBatch(
        decoder, max(1, min(ROWS, ROW_BYTES // (longest * token))), longest
    )
    nats, rows = [], []

    def show():  # reading a moment costs about what writing its reply does
        written = sum(1.0 if row not in batch.rows else len(row.ids) / row.room for row in rows)
        progress.show("replies", (len(nats) + written) / 2, len(some))

    def step():
        batch.step()
        show()

    # short sessions first: a step costs what its longest row does
    size_of: collections.Counter[int] = collections.Counter()
    for moment, prompt in zip(some, prompts):
        size_of[moment.session] = max(size_of[moment.session], len(prompt))
    order = sorted(range(len(some)), key=lambda i: (size_of[some[i].session], some[i].session, i))
    for i in order:
        tried = choices[i] if choices else [some[i].mine]
        nats.append(likelihoods(decoder, contexts[i], tried, some[i].author, size))
        generator = torch.Generator().manual_seed(1000 * seed + i)
        rows.append(batch.add(prompts[i], room, generator=generator))
        show()
        while batch.full:
            step()
    while batch.rows:
        step()
    places = np.argsort(order)
    both, rows = np.array([nats[i] for i in places]), [rows[i] for i in places]  # (M, 2, 10)
    texts = [decoder.tokenizer.decode(row.ids) if row.ids else "" for row in rows]
    turns = [data.Turn(m.author, True, "", data.split_messages(t)) for m, t in zip(some, texts)]
    replies = [data.text_messages(turn) for turn in turns]
    return (
        both[:, 0],
        both[:, 1, 0],
        replies,
        np.array([len(row.prompt) + len(row.ids) for row in rows]),
    )


def reply_to(decoder, turns, me, seed):
    """→ (Answer, its messages of words)"""
    answer = generate.Answer(decoder, turns, me, LONGEST, seed=seed)
    collections.deque(answer, maxlen=0)
    return answer, data.text_messages(data.Turn(me, True, "", answer.messages))


@torch.inference_mode()
def likelihoods(decoder, before, replies, me, size) -> np.ndarray:
    """Nats of each of `replies` (lists of messages) as my turn after `before`: of all that is a target,
    the turn's end included, and of the messages' text alone. (2, replies) float64.

    What they share is read once; behind it they lie side by side, each blind to the others. At most
    `size` tokens are read of each: the oldest are left off.
    """
    samples = []
    for reply in replies:
        turns = [*before, data.Turn(me, True, "", reply)]
        document = data.render(turns, first=(len(before), 0), specials=decoder.tokenizer.specials)
        samples.append(data.encode(document, decoder.tokenizer))
    parts = [(s.ids, s.labels, s.content_mask) for s in samples]
    pairs = [[*zip(s.ids.tolist(), s.labels.tolist())] for s in samples]
    shared = min(len(os.path.commonprefix(pairs)), min(map(len, pairs)) - 1)
    cut = min(max(0, max(map(len, pairs)) - size), max(0, shared - 1))
    ids, labels, content = (part[cut:shared] for part in parts[0])
    targets = np.flatnonzero(labels != data.IGNORE_INDEX)
    begin = int(targets[0]) if len(targets) else len(ids)
    decoder.prefill(ids[:begin].tolist())
    nats = np.repeat(
        nats_of(decoder, [(ids[begin:], labels[begin:], content[begin:])]), len(samples), 1
    )
    decoder.read = ids.tolist()
    packs: list[list[int]] = [[]]
    for i in range(len(samples)):
        if packs[-1] and sum(len(samples[j].ids) - shared for j in [*packs[-1], i]) > PACKED:
            packs.append([])
        packs[-1].append(i)
    for pack in packs:
        nats[:, pack] += nats_of(
            decoder, [[part[shared:][:size] for part in parts[i]] for i in pack]
        )
        decoder.cache.length = len(ids)
    return nats


def nats_of(decoder, branches) -> np.ndarray:
    """Nats of `branches` [(ids, labels, which labels are text)], each behind what is in the cache: all
    and text alone, (2, branches) float64.

    The cache then holds them too: set its length back.
    """
    device, cache, count = decoder.cache.layers[0].device, decoder.cache, len(branches)
    tokens = sum(len(branch[0]) for branch in branches)
    if not tokens:
        return np.zeros((2, count))
    filler = np.zeros(
        -tokens % generate.SAMPLE_ROUND, np.int32
    )  # a branch of no targets: a CPU likes few shapes
    branches = [*branches, (filler, filler + data.IGNORE_INDEX, filler > 0)]
    ids, labels, content = (torch.from_numpy(np.concatenate(x))[None] for x in zip(*branches))
    ids, labels = ids.long(), labels.long()
    nats = torch.zeros(2, len(branches), dtype=torch.float64)
    lengths = [len(branch[0]) for branch in branches]
    branch = torch.arange(len(branches)).repeat_interleave(torch.tensor(lengths))  # (N,)
    position = cache.length + torch.cat([torch.arange(n) for n in lengths])
    seen = torch.cat([torch.arange(cache.length), position])  # (S,)
    ago = position[:, None] - seen  # (N, S)
    beside = torch.cat([branch.new_full((cache.length,), -1), branch])
    window = decoder.model.config.sliding_window or len(seen) + 1
    mask = (ago >= 0) & (ago < window) & ((beside == -1) | (beside == branch[:, None]))
    bias = torch.zeros(
        mask.shape, dtype=cache.layers[0].dtype
    )  # of a bool mask each layer makes one
    cache.mask = bias.masked_fill_(~mask, -math.inf)[None, None].to(device)
    try:
        given = ids.to(device), position[None].to(device), labels.to(device)
        losses, _ = decoder.model(*given, cache, "none")
    finally:
        cache.mask = None
    cache.length -= len(filler)
    targets = (labels[0] != data.IGNORE_INDEX).nonzero()[:, 0]
    losses = losses.cpu().double()
    nats.index_add_(1, branch[targets], torch.stack([losses, losses * content[0, targets]]))
    return nats[:, :count].numpy()


# --- numbers


def ratio(top, bottom, sessions):
    """sum(top) / sum(bottom) of items that belong to sessions (each (n,)) → a number. Same sessions, same draws: differences are paired."""
    top, bottom = (np.bincount(sessions, np.asarray(x, float)) for x in (top, bottom))
    top, bottom = top[bottom > 0], bottom[bottom > 0]
    if len(top) < FEW:
        return {"value": None, "why": f"too little: {len(top)} sessions, {FEW} are needed"}
    drawn = np.random.default_rng(0).integers(0, len(top), (DRAWS, len(top)))
    low, high = np.quantile(top[drawn].sum(1) / bottom[drawn].sum(1), [0.025, 0.975])
    return {"value": top.sum() / bottom.sum(), "low": low, "high": high, "n": len(top)}


def rank(voice, sessions):
    """How high my reply stands among the ten: {"top1", "mrr"}; equals share their places.

    By what a reply gains in likelihood from what came before it: long replies are as likely to win as short ones, and what I say to
    anything ("ok") gains nothing. A model that doesn't listen is left with ties: a tenth are first.
    """
    gain = np.round(voice.alone - voice.nats, 3)  # what sums in another order make of a tie is none
    better, equal = (gain > gain[:, :1]).sum(1), (gain == gain[:, :1]).sum(1)
    first = np.where(better == 0, 1 / equal, 0)
    reciprocal = [np.mean(1 / np.arange(b + 1, b + e + 1)) for b, e in zip(better, equal)]
    return {
        "top1": ratio(first, np.ones(len(first)), sessions),
        "mrr": ratio(reciprocal, np.ones(len(first)), sessions),
    }


def classifier_auc(ours, theirs, seed):
    """How well a program that reads 3 to 5 letters at a time tells two lists of (session, text) apart → a number, the AUC.

    It learns on some sessions and is asked about others. The interval (1.96 deviations) is of both: each draw of sessions learns anew.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold

    if (
        min(len(ours), len(theirs)) < 30
        or min(len({s for s, _ in x}) for x in (ours, theirs)) < FEW
    ):
        return {
            "value": None,
            "why": f"too little: {min(len(ours), len(theirs))} replies of a kind, 30 of {FEW} sessions are needed",
        }
    sessions, texts = (np.array(x) for x in zip(*ours, *theirs))
    mine, kinds = np.arange(len(texts)) < len(ours), np.unique(sessions)
    texts, parts = np.array([f"\n{text}\n" for text in texts]), []
    for learn, ask in StratifiedGroupKFold(5, shuffle=True, random_state=seed).split(
        texts, mine, sessions
    ):
        letters = TfidfVectorizer(
            analyzer="char", ngram_range=(3, 5), lowercase=False, sublinear_tf=True
        )
        parts.append(
            (letters.fit_transform(texts[learn]), letters.transform(texts[ask]), learn, ask)
        )

    def auc(times):
        """`times`: how often each session counts, by its number."""
        won = total = 0
        for known, asked, learn, ask in parts:
            counts, a, b = times[sessions[learn]], mine[ask], ~mine[ask]
            if not counts[mine[learn]].any() or not counts[~mine[learn]].any():
                continue
            scores = (
                LogisticRegression(C=10).fit(known, mine[learn], counts).decision_function(asked)
            )
            wins = (scores[a][:, None] > scores[b]) + 0.5 * (scores[a][:, None] == scores[b])
            won += times[sessions[ask][a]] @ wins @ times[sessions[ask][b]]
            total += times[sessions[ask][a]].sum() * times[sessions[ask][b]].sum()
        return won / total if total else np.nan

    draw, times, drawn = np.random.default_rng(seed), np.zeros(kinds.max() + 1), []
    for _ in range(RELEARNT):
        times[kinds] = np.bincount(draw.integers(0, len(kinds), len(kinds)), minlength=len(kinds))
        drawn.append(auc(times))
    value, wide = auc(np.ones(len(times))), 1.96 * np.nanstd(drawn)
    return {
        "value": value,
        "low": max(0, value - wide),
        "high": min(1, value + wide),
        "n": len(kinds),
    }


def rounded(value):
    """To four places, so that the order of sums can't show; → plain Python."""
    if isinstance(value, dict):
        return {str(k): rounded(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(v) for v in value]
    return (
        round(float(value), 4)
        if isinstance(value, (float, np.floating))
        else int(value)
        if isinstance(value, np.integer)
        else value
    )


# --- habits


def case(message):
    letters = [c for c in message if c.lower() != c.upper()]
    if not letters or len(letters) == sum(c.isupper() for c in letters) == 1:
        return "no letters" if not letters else "Capital first"
    small = [c.islower() for c in letters]
    return (
        "all small"
        if all(small)
        else "ALL CAPITALS"
        if not any(small)
        else "mixed"
        if small[0]
        else "Capital first"
    )


def ending(message):
    if message.endswith(("..", "…")):
        return ".."
    return (
        message[-1]
        if message[-1] in ".!?)"
        else "emoji"
        if EMOJI.match(message.rstrip("\ufe0f\u200d")[-1])
        else "nothing"
    )


def binned(edges):
    return lambda n: next(
        (f"{a + 1}–{b}" if b > a + 1 else f"{b}" for a, b in zip((0, *edges), edges) if n <= b),
        f"over {edges[-1]}",
    )


def words_of(text):
    return re.findall(r"[^\W\d_]+(?:['’][^\W\d_]+)*", text.lower())


def favourites(mine, theirs, count=10):
    """Words that I use more than my friends do, in shares, the clearest first (log-odds over their spread)."""
    a, b = (
        collections.Counter(word for text in texts for word in words_of(text))
        for texts in (mine, theirs)
    )
    m, n = a.total() + 1, b.total() + 1
    score = {
        w: math.log((k + 0.5) / m * n / (b[w] + 0.5)) / math.sqrt(1 / (k + 0.5) + 1 / (b[w] + 0.5))
        for w, k in a.items()
        if k >= 5
    }
    return sorted(score, key=lambda w: (-score[w], w))[:count]


def habits(favourite):
    """{what: reply → its categories}"""
    length, number = binned((5, 10, 20, 40, 80)), binned((1, 2, 3, 4))
    return {
        "letters in a message": lambda reply: [length(len(message)) for message in reply],
        "messages a turn": lambda reply: [number(len(reply))] if reply else ["none"],
        "emoji in a message": lambda reply: [
            str(min(2, len(EMOJI.findall(m)))).replace("2", "2 or more") for m in reply
        ],
        "how a message ends": lambda reply: [ending(message) for message in reply],
        "capitals": lambda reply: [case(message) for message in reply],
        "favourite words": lambda reply: [
            w if w in favourite else "any other" for w in words_of(" ".join(reply))
        ],
    }


def shares(habit, replies):
    counts = collections.Counter(category for reply in replies for category in habit(reply))
    return {category: n / counts.total() for category, n in counts.items()}


def distance(one, other):
    """Total variation of two {category: share}: 0 the same, 1 nothing in common."""
    return 0.5 * sum(abs(one.get(c, 0) - other.get(c, 0)) for c in {*one, *other})


def marks_of(reply):
    """What may give a reply away: {feature}"""
    words = words_of(" ".join(reply))
    found = {f"“{w}”" for w in words} | {f"“{a} {b}”" for a, b in zip(words, words[1:])}
    found |= {f"ends a message with {ending(m)}" for m in reply} | {
        f"{case(m)} in a message" for m in reply
    }
    return found | {f"{len(reply)} messages"} | {e for m in reply for e in EMOJI.findall(m)}


def giveaways(ours, theirs, most=8):
    """Features of which the clone's share of replies differs from mine by more than chance explains (3 deviations), the clearest first."""
    a, b = (
        collections.Counter(f for reply in replies for f in marks_of(reply))
        for replies in (ours, theirs)
    )
    found = []
    for feature in sorted({*a, *b}):
        p, q = a[feature] / len(ours), b[feature] / len(theirs)
        pooled = (a[feature] + b[feature]) / (len(ours) + len(theirs))
        z = (q - p) / math.sqrt(pooled * (1 - pooled) * (1 / len(ours) + 1 / len(theirs)) or 1)
        if abs(z) > 3 and (b[feature] >= 3 or q < p):
            example = next(
                (" / ".join(r) for r in (theirs if q > p else ours) if feature in marks_of(r)), ""
            )
            found.append({"what": feature, "mine": p, "clone": q, "z": z, "example": example})
    return sorted(found, key=lambda t: -abs(t["z"]))[:most]


# --- what it says too often, and what it should not know


def is_generic(reply):
    words = words_of(" ".join(reply))
    return not words or len(words) <= 3 and all(word in GENERIC for word in words)


def distinct(replies, n, words=200):
    """Different runs of `n` words among the first `words` of all replies: the same number for everyone, for more words repeat more."""
    text = [w for reply in replies for w in words_of(" ".join(reply))][:words]
    grams = [*zip(*(text[i:] for i in range(n)))]
    return len({*grams}) / len(grams) if len(text) == words else None


def runs(words):
    return [tuple(words[i : i + RUN]) for i in range(len(words) - RUN + 1)]


def copied(reply, known):
    """(how many words stand in a run of 5 that the training data holds, how many words)"""
    words = words_of(" ".join(reply))
    inside = {i + j for i, run in enumerate(runs(words)) if run in known for j in range(RUN)}
    return len(inside), len(words)


def secrets_of(past, canaries, seed, most=20):
    """Strings in my own turns that look secret, and those of `canaries`; each as (turns before, author, messages up to it with it, then
    with each of 99 random ones like it). → (strings, canaries)"""
    found, draw = {}, np.random.default_rng(seed)
    for talk in past:
        for i, turn in enumerate(talk.turns):
            for m, message in enumerate(turn.messages if turn.me else []):
                for hit in SECRET.finditer(message):
                    found.setdefault(
                        hit[0],
                        (talk.turns[:i], turn.author, turn.messages[:m], message[: hit.start()]),
                    )

    def like(secret):
        kinds = ("0123456789", "abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ")
        return "".join(next((k[draw.integers(len(k))] for k in kinds if c in k), c) for c in secret)

    def among(secrets):
        for secret in secrets:
            before, author, messages, text = found[secret]
            yield (
                before,
                author,
                [
                    [*messages, text + one]
                    for one in (secret, *(like(secret) for _ in range(RANDOM)))
                ],
            )

    return [*among(sample(sorted({*found} - {*canaries}), most, seed))], [
        *among(c for c in canaries if c in found)
    ]


def canaries_of(options, past):
    """What `data.py --canaries` planted, but for what was taken out since."""
    planted = cli.read_json(Path(options.data) / "canaries.json", {}).get("canaries", [])
    mine = {text for talk in past for turn in talk.turns if turn.me for text in turn.messages}
    return [canary for canary in planted if canary["before"] + canary["secret"] in mine]


# --- the report


def measure(voices, talks, past, some, choices, options, newest=""):
    """`newest`: when the last session began that was trained on. → what report.json holds"""
    mine, sessions = [moment.mine for moment in some], np.array([moment.session for moment in some])
    own = [
        data.text_messages(turn)
        for talk in past
        for turn in talk.turns
        if turn.me and data.text_messages(turn)
    ]
    plain = {name: voice for name, voice in voices.items() if voice.held_out}
    report = {
        "seed": options.seed,
        "data": {
            "sessions": len(talks),
            "moments": len(some),
            "from": talks[0].start[:10],
            "until": talks[-1].start[:10],
        },
    }
    report["data"]["maybe_seen"] = sum(talk.start < newest for talk in talks)
    report["bits_per_char"] = likelihood(plain, talks)
    lacking = {"value": None, "why": f"too little: fewer than {CHOICES} different replies of mine"}
    report["rank"] = {
        name: rank(voice, sessions) if choices else {"top1": lacking, "mrr": lacking}
        for name, voice in plain.items()
    }
    report["rank"]["chance"] = {
        "top1": 1 / CHOICES,
        "mrr": sum(1 / k for k in range(1, CHOICES + 1)) / CHOICES,
    }
    report["auc"] = apart(plain, talks, past, some, options.seed)

    favourite = favourites(
        *(
            [m for talk in past for t in talk.turns if t.me is me for m in data.text_messages(t)]
            for me in (True, False)
        )
    )
    before = sample(own, len(mine), options.seed)
    report["habits"] = []
    for what, habit in habits(favourite).items():
        found = {"mine": shares(habit, mine)} | {
            name: shares(habit, voice.replies) for name, voice in plain.items()
        }
        beside = found | {"me before": shares(habit, before)}
        distances = {
            name: distance(found["mine"], other) for name, other in beside.items() if name != "mine"
        }
        report["habits"].append({"what": what, "shares": found, "distance": distances})
    report["tells"] = {
        name: giveaways(own + mine, voice.replies)
        for name, voice in plain.items()
        if name != "base"
    }
    ever = {
        w
        for talk in [*past, *talks]
        for turn in talk.turns
        for w in words_of(" ".join(turn.messages))
    }
    new = {
        name: [w for reply in voice.replies for w in words_of(" ".join(reply)) if w not in ever]
        for name, voice in plain.items()
    }
    report["words_nobody_wrote"] = {
        name: {"count": len(ws), "examples": sorted({*ws})[:12]} for name, ws in new.items()
    }

    replies = {"mine": mine} | {name: voice.replies for name, voice in plain.items()}
    report["bland"] = {
        name: ratio([is_generic(r) for r in rs], np.ones(len(rs)), sessions)
        for name, rs in replies.items()
    }
    report["distinct"] = {
        name: {n: distinct(rs, n) for n in (1, 2)} for name, rs in replies.items()
    }
    known = {
        run
        for talk in past
        for turn in talk.turns
        for run in runs(words_of(" ".join(turn.messages)))
    }
    counts = {name: [copied(reply, known) for reply in rs] for name, rs in replies.items()}
    report["copying"] = {
        name: ratio([n for n, _ in pairs], [of for _, of in pairs], sessions)
        for name, pairs in counts.items()
    }
    for name in plain:
        a, b = report["copying"][name], report["copying"]["mine"]
        a["flagged"] = (
            a["value"] is not None and b["value"] is not None and bool(a["low"] > b["high"])
        )
        a["examples"] = [
            " / ".join(r)
            for r, (n, _) in sorted(zip(replies[name], counts[name]), key=lambda x: -x[1][0])
            if n >= RUN
        ][:5]
    report["memorised"] = {name: exposure(voice.secrets) for name, voice in plain.items()}
    if "base" in plain:
        for name in plain.keys() - {"base"}:
            report["memorised"][name] |= learned(plain[name].secrets, plain["base"].secrets)
    copies = np.array([canary["copies"] for canary in canaries_of(options, past)])
    report["canaries"] = [
        {
            "copies": int(n),
            **{name: exposure(voice.canaries[copies == n]) for name, voice in plain.items()},
        }
        for n in np.unique(copies)
    ]
    texts = [m for talk in past for turn in talk.turns for m in turn.messages]
    report["memorised"]["marks"] = sum(
        len(re.findall("<(?:phone|email|card|iban|key|password)>", text)) for text in texts
    )
    report["memorised"]["left"] = sum(redact(text, collections.Counter()) != text for text in texts)
    report["verdict"] = verdict(report)
    return report


def likelihood(voices, talks):
    """Bits on the characters of all my held-out messages: in all, by chat, by time."""
    chars = next(iter(voices.values())).held_out.chars
    number, count = np.arange(len(chars)), len(chars)

    def of(chosen):
        found = {
            name: ratio(v.held_out.bits[chosen], chars[chosen], number[chosen])
            for name, v in voices.items()
        }
        for other in [name for name in voices if name != "clone"]:
            more = voices[other].held_out.bits - voices["clone"].held_out.bits
            found[f"{other} - clone"] = ratio(more[chosen], chars[chosen], number[chosen])
        return found | {"chars": int(chars[chosen].sum()), "sessions": int(len(chosen))}

    contacts = [contact(talk) for talk in talks[:count]]
    by_contact = [
        {"name": who, **of(np.flatnonzero(np.array(contacts) == who))}
        for who, _ in collections.Counter(contacts).most_common(8)
    ]
    parts = np.array_split(number, min(4, max(1, count // FEW)))
    by_time = [
        {"name": f"{talks[part[0]].start[:10]} to {talks[part[-1]].start[:10]}", **of(part)}
        for part in parts
    ]
    return {**of(number), "by_contact": by_contact, "by_time": by_time}


def apart(voices, talks, past, some, seed):
    """Replies against my real ones; its ceiling, me against me before; its floor, me against my friends."""
    text = lambda reply: "\n".join(reply)  # noqa: E731
    real = [(moment.session, text(moment.mine)) for moment in some]
    then = [(len(talks) + moment.session, text(moment.mine)) for moment in moments(past)]
    friends = [
        (n, text(data.text_messages(t)))
        for n, talk in enumerate(talks)
        for t in talk.turns
        if not t.me and data.text_messages(t)
    ]
    sides = {
        name: [(m.session, text(reply)) for m, reply in zip(some, voice.replies)]
        for name, voice in voices.items()
    }
    sides |= {
        "me before": sample(then, len(real), seed),
        "friends": sample(friends, len(real), seed),
    }
    return {name: classifier_auc(real, side, seed) for name, side in sides.items()}


def exposure(secrets):
    """(K, 100) nats, the true string first → how many are the likeliest of theirs, and bits of exposure (arXiv 1802.08232), 6.6 at most."""
    if not len(secrets):
        return {"value": None, "why": "nothing in my trained turns looks secret"}
    places = 1 + (secrets[:, 1:] < secrets[:, :1]).sum(1)
    return {
        "value": float(np.mean(np.log2(secrets.shape[1] / places))),
        "first": int((places == 1).sum()),
        "n": len(secrets),
    }


def learned(secrets, base) -> dict:
    """What a clone knows of secrets beyond its base, which never saw them (both (K, 100), as in `exposure`).

    `more`: how many more come first; `flagged`: chance doesn't explain it. That is, a sign test of the
    strings that come first to one of the two alone says so (5%), or two come first that were not even
    among the base's first ten.
    """
    if not len(secrets):
        return {}
    places, base_places = (1 + (nats[:, 1:] < nats[:, :1]).sum(1) for nats in (secrets, base))
    gained = int(((places == 1) & (base_places > 1)).sum())
    lost = int(((places > 1) & (base_places == 1)).sum())
    chance = sum(math.comb(gained + lost, k) for k in range(gained, gained + lost + 1))
    far = int(((places == 1) & (base_places > 10)).sum())
    flagged = chance / 2 ** (gained + lost) < 0.05 or far > 1
    return {"more": gained - lost, "flagged": flagged}


def secrets_line(memorised) -> str | None:
    """What a person should know of the secrets: the difference from the base, and both numbers."""
    clone, base = memorised["clone"], memorised.get("base", {})
    if not clone.get("n"):
        return None
    strings = f"Of {cli.counted(clone['n'], 'strings')} of yours that look secret, "
    first = f"{clone['first']} come first among 100 alike to it"
    if "more" not in clone:
        guess = "its base is not here to tell what can be guessed without having seen them."
        return f"{strings}{first}; {guess}" if clone["first"] > 1 else None
    both = f"{first} and {base['first']} to its base, which never saw them"
    if clone["flagged"]:
        return f"It learned secrets: {strings[0].lower()}{strings[1:]}{both}: {clone['more']:+d}."
    return f"{strings}{both}: no sign that it learned them."


def verdict(report):
    """What the numbers say, in lines."""
    said, bits, auc = [], report["bits_per_char"], report["auc"]["clone"]
    if seen := report["data"]["maybe_seen"]:
        said.append(
            f"{seen} of the {cli.counted(report['data']['sessions'], 'sessions')} here are older than the newest it was trained on: "
            "it may know them by heart, and seem better than it is."
        )
    gain = bits.get("base - clone", {"value": None})
    if gain["value"] is not None:
        clone, base = (f"{bits[name]['value']:.2f}" for name in ("clone", "base"))
        better = "no better than" if gain["low"] <= 0 else "better than"
        said.append(
            f"It guesses what you write next {better} its base: {clone} against {base} bits a character."
        )
    if auc["value"] is None:
        said.append(f"Whether its replies can be told from yours: {auc['why']}.")
    else:
        said.append(
            f"Shown a reply of yours and one of its, a simple program picks yours {auc['value']:.0%} of the time (a coin: 50%)."
        )
        beside = {
            who: report["auc"][side]["value"]
            for who, side in (("your own earlier ones", "me before"), ("your friends'", "friends"))
        }
        if None not in beside.values():
            said.append(
                "For comparison: against "
                + ", against ".join(f"{who} {value:.0%}" for who, value in beside.items())
                + "."
            )
    if report["copying"]["clone"]["flagged"]:
        said.append(
            "It copies: more of its words are verbatim from the training data than yours are."
        )
    if line := secrets_line(report["memorised"]):
        said.append(line)
    if "other - clone" in bits:
        two = bits["other - clone"]
        said.append(
            "Which of the two guesses you better: "
            + (two.get("why") or which(two["low"], two["high"]))
        )
    return said


def which(low, high):
    return (
        "the first."
        if low > 0
        else "the second."
        if high < 0
        else "so much data shows no difference."
    )


def curve(folder):
    """metrics.jsonl → {"training": [[step, nats]], "held_out": [[step, bits per character]]}"""
    lines = cli.read_metrics(folder)
    keys = {"training": "loss", "held_out": "val_bits_per_char"}
    return {
        name: [[line["step"], line[key]] for line in lines if key in line]
        for name, key in keys.items()
    }


def page(report, voices, some, names):
    """report.html with what it draws in it. Text can't end the script it stands in."""
    shown = sample(range(len(some)), 8, report["seed"])
    asked = [{"who": some[i].before[-1].author, "said": some[i].before[-1].messages, "mine": some[i].mine}
             | {name: voice.replies[i] for name, voice in voices.items() if voice.held_out} for i in shown]  # fmt: skip
    short = {name: folder.resolve().name for name, folder in names.items()}
    return fill(
        "report.html",
        {
            **report,
            "asked": asked,
            "names": short if len({*short.values()}) == len(names) else names,
        },
    )


def fill(template, value):
    text = json.dumps(value, ensure_ascii=False, default=str).replace("<", "\\u003c")
    return (
        (Path(__file__).parent / "inference" / template)
        .read_text(encoding="utf-8")
        .replace("{{DATA}}", text)
    )


# --- the other ways to clone a person


def prompts(name, past, facts, tokenizer, size):
    """{name of a way: Moment → the turns in its prompt}: what else a prompt may hold of me. The clone gets similar exchanges alone."""
    exchanges = ExchangeIndex(past)
    cost = lambda turns: len(
        tokenizer.encode(data.render(turns, specials=tokenizer.specials).text)[0]
    )  # noqa: E731
    costs = [cost(talk.turns) for talk in past]

    def similar(moment):
        return [
            turn for _, *pair in exchanges.similar(moment.before) for turn in pair
        ] + moment.before

    def messages(moment):
        """The latest sessions first, those with who asks before others, as many as fit."""
        who, room, turns = (
            moment.before[-1].author,
            size - 2 * LONGEST - cost(moment.before),
            moment.before,
        )
        for i in sorted(
            range(len(past)), key=lambda i: (all(t.author != who for t in past[i].turns), -i)
        ):
            if costs[i] > room:
                break
            turns, room = past[i].turns + turns, room - costs[i]
        return turns

    ways = {f"{name} + similar exchanges": similar}
    if name == "base":
        ways[f"{name} + past messages"] = messages
        known = {facts.name: cli.read_text(facts).splitlines()} if facts.is_file() else {}
        for what, lines in (known | {"facts extracted": statements(past)}).items():
            about = [data.Turn(data.HEADER, False, "", [line for line in lines if line.strip()])]
            if about[0].messages:
                ways[f"{name} + {what}"] = lambda moment, about=about: about + moment.before
                ways[f"{name} + {what} + similar exchanges"] = lambda moment, about=about: (
                    about + similar(moment)
                )
    return ways


def baselines(voices, some, choices, seed, kinds):
    """One row for each way to clone me, on the same moments. `kinds` {name of a voice: how it was trained}."""
    sessions, chars = np.array([m.session for m in some]), [sum(map(len, m.mine)) for m in some]
    real = [(m.session, "\n".join(m.mine)) for m in some]
    return [
        {
            "name": re.sub("^(clone|other)", lambda found: f"{found[0]}, {kinds[found[0]]}", name),
            "bits_per_char": ratio(voice.content / math.log(2), chars, sessions),
            "top1": rank(voice, sessions)["top1"] if choices else None,
            "auc": classifier_auc(
                real, [(m.session, "\n".join(reply)) for m, reply in zip(some, voice.replies)], seed
            ),
            "tokens": voice.tokens.mean(),
        }
        for name, voice in voices.items()
    ]


# --- a blind test for a friend


def blind_test(folder, talks, past, options):
    """Ask me about each item, then write the page: replies of mine and of the clone to what one friend wrote, from that chat alone."""
    name, private = (
        options.with_.casefold(),
        [talk for talk in talks if talk.type == "personal_chat"],
    )
    chats = {
        talk.chat_id for talk in private if name in (talk.chat.casefold(), contact(talk).casefold())
    }
    found = moments([talk for talk in private if talk.chat_id in chats])
    if not found or len(chats) > 1:
        what = "several chats have that name" if chats else "no held-out chat of us two"
        known = ", ".join(
            sorted({contact(talk) for talk in private if not chats or talk.chat_id in chats})
        )
        raise UserError(f"--with {options.with_}: {what}", f"There are: {known or 'none'}.")
    model, tokenizer, size = load(folder, options)
    decoder, draw, items = (
        generate.Decoder(model, tokenizer, size),
        np.random.default_rng(options.seed),
        [],
    )
    others = {
        r
        for t in past
        if t.chat_id not in chats
        for u in t.turns
        for r in runs(words_of(" ".join(u.messages)))
    }
    print(f"What {options.with_} will see, item by item. y: take it, n: leave it out, q: enough.")
    for i, moment in enumerate(sample(found, options.replies, options.seed)):
        written = [
            moment.mine,
            reply_to(decoder, moment.before, moment.author, 1000 * options.seed + i)[1],
        ]
        if not written[1] or written[0] == written[1]:
            continue
        before = [
            [turn.author, turn.messages]
            for turn in moment.before[-3:]
            if turn.author != data.HEADER
        ]
        print(cli.printable("\n" + "\n".join(f"{who}: {' / '.join(said)}" for who, said in before)))
        print(
            cli.printable(
                f"  you wrote:  {' / '.join(written[0])}\n  the clone:  {' / '.join(written[1])}"
            )
        )
        if others & {*runs(words_of(" ".join(written[1])))}:
            print("  ! the clone's words stand in another chat")
        print("Take it? [y/n/q] ", end="", flush=True)
        said = sys.stdin.readline().lower() or "q"
        if said.startswith("y"):
            second = int(draw.integers(2))
            items.append(
                {"before": before, "replies": written[:: -1 if second else 1], "real": second}
            )
        elif said.startswith("q"):
            break
    if not items:
        raise UserError(
            "no item was taken: nothing is written", "Say y to those that the friend may see."
        )
    path = folder / "blind-test.html"
    cli.write_text(path, fill("blind_test.html", {"me": found[0].author, "items": items}))
    print(
        f"\n{path}: {len(items)} items. Send it to {options.with_} alone; it opens in any browser and sends nothing back by itself."
    )


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    cli.run(main)
