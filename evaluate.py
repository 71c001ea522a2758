"""The report card: does the clone sound like me, and what does it know? `python evaluate.py ckpt/`

    data/*.jsonl ─ load_test_set ▶ TestSet ─ run_model ▶ ModelOutputs ─ measure ▶ report.json

Nothing leaves this machine. A number is {"value", "low", "high", "n"}: a 95% interval by bootstrap
over `n` sessions; or {"value": null, "why"} where there is too little data.
"""

import copy
import dataclasses
import importlib.util
import json
import math
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import torch

import cli
import data
from cli import UserError, flag
from inference import generate, memorisation, pace, pages, scoring, style
from inference.bootstrap import Number, classifier_auc, mean, ratio
from inference.context import ExchangeIndex, longer_prompts
from inference.memorisation import Probe
from inference.progress import track
from inference.scoring import CHOICES, Example, draw_choices, find_examples, sample
from inference.style import Reply
from training import distributed, step
from weights import devices, hf, hub
from weights.load import chat_memory, find_source, load_for_chat
from weights.tokenizer import load_tokenizer

MAX_CONTEXT = 2048  # tokens
WORK_BYTES = 2 << 30  # beside a model: its replies' caches, activations, logits


@dataclasses.dataclass(frozen=True)
class Options:
    """Does a clone sound like me? Writes report.html and report.json into the first folder.

    python evaluate.py ckpt/                             clone and base, on held-out sessions
    python evaluate.py ckpt-a/ ckpt-b/                   and beside another run
    python evaluate.py ckpt/ --blind-test --with NAME    a friend guesses which replies are mine
    """  # noqa: E501

    ckpts: tuple[str, ...] = flag(
        (),
        "the folder that train.py wrote, or two of them",
        positional=True,
        group="what to measure",
    )
    model: str | None = flag(None, "the base, if it moved since training")
    data: str = flag("", "the folder that data.py wrote", shown="what it was trained on, or data")
    replies: int = flag(100, "held-out replies to compare")
    baselines: bool = flag(False, "also measure prompts with past messages, facts, old exchanges")
    seed: int = flag(0, "the same seed gives the same report")
    device: str | None = flag(None, "cuda, mps or cpu", shown="the first there is")

    blind_test: bool = flag(
        False, "write a page of items that you approve, no report", group="a page for a friend"
    )
    with_: str = flag("", "the friend: only your chat with them is used")


@dataclasses.dataclass(frozen=True)
class TestSet:
    """What every model is measured on: held-out turns of mine, and secrets that I trained it on."""

    held_out: list[data.Session]
    past: list[data.Session]  # trained on; without context headers
    examples: list[Example]
    probes: list[Probe]
    exchanges: ExchangeIndex | None  # of `past`, for --baselines


@dataclasses.dataclass(frozen=True)
class ModelOutputs:
    """What a model makes of a TestSet of M examples and K probes.

    `nats`: (M, choices), of the text of each choice; `alone`: the same without the turns before.
    `tokens`: (M,), prompt and reply. `places`: (K,), 1 where the true string is the likeliest.
    `held_out`: None for a baseline, which is a model of another name with another prompt.
    """

    nats: np.ndarray
    alone: np.ndarray
    replies: list[Reply]
    tokens: np.ndarray
    places: np.ndarray
    held_out: step.Evaluation | None


def main() -> None:
    options = cli.parse(Options)
    folders = check(options)
    runs = [cli.read_json(folder / "run.json", {}) for folder in folders]
    options = dataclasses.replace(options, data=options.data or trained_on(runs[0]))
    if options.blind_test:
        return write_blind_test(folders[0], options)

    test_set = load_test_set(options)
    models: dict[str, Any] = dict(zip(("clone", "other"), folders))
    if base := base_of(folders[0], options):
        models["base"] = base
    outputs = run_models(models, test_set, options)

    report = measure(outputs, test_set, options.seed)
    newest = max(run.get("trained_until", "") for run in runs)
    replies = {name: outputs[name].replies for name in models}
    folders_by_name = {"mine": options.data} | {n: f for n, f in models.items() if n != "base"}
    written = replies | {"mine": [example.mine for example in test_set.examples]}
    prompts = [example.before[-1] for example in test_set.examples]
    report["timing"] = pace.timing_table(folders_by_name, written, prompts, options.seed)
    report["data"]["maybe_seen"] = sum(session.start < newest for session in test_set.held_out)
    report["verdict"] = verdict(report)
    # Rounded, so that the order of sums can't show; numpy's numbers become Python's
    text = json.dumps(report, default=np.generic.item)
    report = json.loads(text, parse_float=lambda number: round(float(number), 4))
    cli.write_json(folders[0] / "report.json", report)
    report["names"] = {name: str(folder) for name, folder in models.items()}
    cli.write_text(
        folders[0] / "report.html", pages.report_page(report, replies, test_set.examples)
    )
    print(*report["verdict"], sep="\n")
    print(f"See {folders[0]}/report.html. It quotes your chats: keep it to yourself.")


def write_blind_test(folder: Path, options: Options) -> None:
    """Write blind-test.html: my replies and the clone's to one friend, after I approved each."""
    held_out, past = (
        data.load_sessions(Path(options.data) / f"{part}.jsonl") for part in ("val", "train")
    )
    sessions = pages.chat_with(options.with_, held_out)
    elsewhere = style.runs_in(s for s in past if s.chat_id != sessions[0].chat_id)
    model, tokenizer, size = load(folder, options)
    decoder = generate.Decoder(model, tokenizer, size)
    path = folder / "blind-test.html"
    page = pages.blind_test(
        decoder, sessions, elsewhere, options.with_, options.replies, options.seed
    )
    cli.write_text(path, page)
    print(f"\n{path}: send it to {options.with_} only. It opens in any browser and sends nothing.")


def check(options: Options) -> list[Path]:
    """Return the checkpoints' folders. UserError for what is missing, before anything is loaded."""
    folders = [Path(folder) for folder in options.ckpts]
    if not 1 <= len(folders) <= (1 if options.blind_test else 2):
        raise UserError(
            f"{len(folders)} checkpoints are given",
            "python evaluate.py ckpt/   (or two, to compare them)",
        )
    for folder in folders:
        if not (hf.is_model(folder) or hf.is_adapter(folder)):
            raise UserError(f"{folder} holds no model", "Give the folder that train.py wrote.")
    if options.replies < 1 or options.seed < 0:
        raise UserError(
            f"--replies {options.replies} --seed {options.seed}: at least 1 and 0 are needed",
            "Leave them out for the defaults.",
        )
    if options.blind_test != bool(options.with_):
        raise UserError(
            "--blind-test and --with NAME belong together",
            "Say whose chat with you the friend may see: --with NAME",
        )
    if not options.blind_test and not importlib.util.find_spec("sklearn"):
        raise UserError("scikit-learn is not installed", "pip install -r requirements-extra.txt")
    return folders


def trained_on(run: dict) -> str:
    """Return the data folder that run.json names, if it still exists, else data.py's default."""
    recorded = run.get("config", {}).get("data", "data")
    return recorded if Path(recorded).is_dir() else "data"


def base_of(folder: Path, options: Options) -> str | None:
    """Return where a checkpoint's base is; None if it has none, or it isn't on this machine."""
    if hf.is_adapter(folder):
        return options.model or hf.adapter_base(folder)
    run = cli.read_json(folder / "run.json", {})
    from_scratch = run.get("config", {}).get("from_scratch")
    base = options.model or ("" if from_scratch else run.get("base", ""))
    return base if base and hf.is_model(base) else None


# --- what is measured on


def load_test_set(options: Options) -> TestSet:
    folder = Path(options.data)
    held_out, trained = (data.load_sessions(folder / f"{part}.jsonl") for part in ("val", "train"))
    past = [data.without_header(session) for session in trained]
    examples = sample(find_examples(held_out), options.replies, options.seed)
    if not examples:
        raise UserError(
            f"{folder}/val.jsonl holds no turn of mine that answers somebody",
            "Make it again with data.py.",
        )
    examples = draw_choices(examples, options.seed)
    planted = cli.read_json(folder / "canaries.json", {}).get("canaries", [])
    probes = memorisation.find_probes(
        past, {c["secret"]: c["copies"] for c in planted}, options.seed
    )
    exchanges = ExchangeIndex(past) if options.baselines else None
    return TestSet(held_out, past, examples, probes, exchanges)


# --- what a model makes of it


def load(folder: str | Path, options: Options) -> tuple:
    """Load a folder, or a base's hub id. Returns the model, its tokenizer and its context's size.

    A base's own tokenizer gives the same ids as the checkpoint's, and tells which ChatML tokens the
    base has no rows for: they get the rows that training began with.
    """
    folder, device = hub.resolve(str(folder)), devices.pick_device(options.device)
    tokenizer = load_tokenizer(folder)
    model = load_for_chat(folder, options.model, MAX_CONTEXT, device, tokenizer)
    return model, tokenizer, min(MAX_CONTEXT, model.config.max_position_embeddings)


def run_models(
    models: dict[str, Any], test_set: TestSet, options: Options
) -> dict[str, ModelOutputs]:
    """Measure all models, on a CPU with memory for all of them side by side.

    Passes over few tokens gain little from many cores, so each model gets a share of them.
    """
    outputs: dict[str, ModelOutputs] = {}
    threads = torch.get_num_threads() // len(models)
    if not (threads and fit_together(models.values(), options)):
        for name, folder in models.items():
            outputs |= run_model(name, load_with_rows(folder, options), test_set, options)
        return outputs

    loaded = {name: load_with_rows(folder, options) for name, folder in models.items()}
    stopping = threading.Event()

    def end_if_stopping(*_) -> None:
        if stopping.is_set():
            raise CancelledError

    def run(name: str) -> dict[str, ModelOutputs]:
        torch.set_num_threads(threads)  # of this thread
        loaded[name][0].register_forward_pre_hook(end_if_stopping)
        return run_model(name, loaded[name], test_set, options)

    with ThreadPoolExecutor(len(models)) as pool:
        try:
            futures = [pool.submit(run, name) for name in models]
            for future in as_completed(futures):
                future.result()
        finally:  # after an error or Ctrl-C the others end at their next forward pass
            stopping.set()
    for future in futures:
        outputs |= future.result()
    return outputs


def fit_together(folders: Iterable[str | Path], options: Options) -> bool:
    """Return whether a CPU's memory has room to measure all models at once."""
    need = 0
    for folder in folders:
        config = find_source(folder, options.model).folder.config
        need += max(chat_memory(config, MAX_CONTEXT).values()) + WORK_BYTES
    return devices.pick_device(options.device).type == "cpu" and need < devices.free_memory()


def load_with_rows(folder: str | Path, options: Options) -> tuple:
    """Load as `load` does, and the held-out rows in the model's tokens."""
    model, tokenizer, size = load(folder, options)
    rows = data.load_rows(Path(options.data) / "val.jsonl", tokenizer, min(1024, size))
    return model, tokenizer, size, copy.deepcopy(rows)  # another tokenizer's replace their file


def run_model(
    name: str, loaded: tuple, test_set: TestSet, options: Options
) -> dict[str, ModelOutputs]:
    """Measure one model: {name: ModelOutputs}, and with --baselines the same for other prompts."""
    model, tokenizer, size, rows = loaded
    held_out = held_out_likelihood(model, rows, name)
    # A GPU's compiler takes longer than it saves here
    on_cpu = devices.pick_device(options.device).type == "cpu"
    decoder = generate.Decoder(model.eval(), tokenizer, scoring.cache_size(size), compile=on_cpu)
    prompts: dict[str, Callable] = {name: lambda turns: turns}
    if test_set.exchanges is not None:  # with --baselines
        facts = Path(options.data) / "facts.md"
        longer = longer_prompts(test_set.past, test_set.exchanges, facts, tokenizer, size)
        for kind, extend in longer.items():
            prompts[f"{name} + {kind}"] = extend

    examples = test_set.examples
    alone = scoring.score_alone(decoder, examples, size, track(name, "likelihoods"))
    probes = track(name, "secrets")(test_set.probes)
    secrets = [scoring.reply_nats(decoder, probe, size) for probe in probes]
    places = np.array([1 + (nats < nats[0]).sum() for nats in secrets], int)
    outputs = {}
    for title, extend in prompts.items():
        prompted = [dataclasses.replace(e, before=extend(e.before)) for e in examples]
        progress = track(title, "replies")
        nats, replies, tokens = scoring.answer(decoder, prompted, size, options.seed, progress)
        evaluation = held_out if title == name else None
        outputs[title] = ModelOutputs(nats, alone, replies, tokens, places, evaluation)
    return outputs


def held_out_likelihood(model, rows: list[data.Row], name: str) -> step.Evaluation:
    """Evaluate my turns in `rows`, with a progress bar."""
    with track(name, "held-out likelihood")(total=len(rows)) as bar:

        def advance(*_) -> None:  # a hook that returns something would replace the model's output
            bar.update(min(2, len(rows) - bar.n))

        hook = model.register_forward_hook(advance)
        ranks = distributed.Distributed(next(model.parameters()).device)
        evaluation = step.evaluate(model, rows, ranks, 2, max(len(row.ids) for row in rows))
        hook.remove()
    return evaluation


# --- the report


def first_of_ten(output: ModelOutputs, sessions) -> Number:
    """Measure how often my real reply comes first of ten; equals share the place.

    By what a reply gains in likelihood from the turns before it: neither short replies nor those
    that fit anything ("ok") have an advantage, and a model that ignores the turns gets a tenth.
    """
    if output.nats.shape[1] < CHOICES:
        return {"value": None, "why": f"too little: fewer than {CHOICES} different replies of mine"}
    gain = np.round(output.alone - output.nats, 3)  # sums in another order must not break a tie
    better, equal = (gain > gain[:, :1]).sum(1), (gain == gain[:, :1]).sum(1)
    return mean(np.where(better == 0, 1 / equal, 0), sessions)


def copying(replies: dict[str, list[Reply]], past: list[data.Session], sessions) -> dict:
    """Measure the share of words that are copied from the training data, mine first."""
    known, table = style.runs_in(past), {}
    for name, written in replies.items():
        counts = [style.copied_words(reply, known) for reply in written]
        row = table[name] = ratio(counts, [len(style.reply_words(r)) for r in written], sessions)
        most = sorted(zip(counts, written), key=lambda pair: -pair[0])[:5]
        row["examples"] = [" / ".join(reply) for count, reply in most if count]
        row["flagged"] = row.get("low", 0) > table["mine"].get("high", 1)
    return table


def measure(outputs: dict[str, ModelOutputs], test_set: TestSet, seed: int) -> dict:
    """Compute what report.json holds."""
    models = {name: output for name, output in outputs.items() if output.held_out}
    examples, held_out, past = test_set.examples, test_set.held_out, test_set.past
    sessions = np.array([example.session for example in examples])
    mine = [example.mine for example in examples]
    replies = {"mine": mine} | {name: output.replies for name, output in models.items()}

    # The same person at another time is the classifier's ceiling, other people are its floor
    before = find_examples(past, first=len(held_out))
    friends = find_examples(map(swap_sides, held_out))
    sides = {name: texts_of(examples, output.replies) for name, output in outputs.items()}
    for name, others in (("me before", before), ("friends", friends)):
        sides[name] = sample(texts_of(others, [e.mine for e in others]), len(mine), seed)
    texts = texts_of(examples, mine)
    auc = {name: classifier_auc(texts, side, seed) for name, side in sides.items()}

    ever_mine = [*mine, *(example.mine for example in before)]
    clones = models.keys() - {"base"}
    tells = {name: style.giveaways(ever_mine, replies[name]) for name in sorted(clones)}
    chars = [sum(map(len, reply)) for reply in mine]
    table = []
    for name, output in outputs.items():
        bits = ratio(output.nats[:, 0] / math.log(2), chars, sessions)
        table.append({"name": name, "bits_per_char": bits, "tokens": output.tokens.mean()})
    return {
        "seed": seed,
        "data": {
            "sessions": len(held_out),
            "moments": len(examples),
            "from": held_out[0].start[:10],
            "until": held_out[-1].start[:10],
        },
        "bits_per_char": bits_per_char(models),
        "rank": {name: {"top1": first_of_ten(o, sessions)} for name, o in outputs.items()},
        "auc": auc,
        "habits": {name: style.shares(written, style.habits) for name, written in replies.items()},
        "tells": tells,
        "bland": {name: mean([*map(style.is_generic, r)], sessions) for name, r in replies.items()},
        "copying": copying(replies, past, sessions),
        "memorised": memorisation.table(
            {name: output.places for name, output in models.items()}, test_set.probes
        ),
        "baselines": table if len(outputs) > len(models) else [],
    }


def texts_of(examples: list[Example], replies: list[Reply]) -> list[tuple[int, str]]:
    return [(example.session, "\n".join(reply)) for example, reply in zip(examples, replies)]


def swap_sides(session: data.Session) -> data.Session:
    turns = [dataclasses.replace(turn, me=not turn.me) for turn in session.turns]
    return dataclasses.replace(session, turns=turns)


def bits_per_char(models: dict[str, ModelOutputs]) -> dict[str, Number]:
    """Measure bits on the text of all my held-out messages, and how many more than the clone's."""
    evaluations = {name: output.held_out for name, output in models.items() if output.held_out}
    clone, table = evaluations["clone"], {}
    number = np.arange(len(clone.chars))
    for name, evaluation in evaluations.items():
        table[name] = ratio(evaluation.bits, clone.chars, number)
        if name != "clone":
            table[f"{name} - clone"] = ratio(evaluation.bits - clone.bits, clone.chars, number)
    return table


def verdict(report: dict) -> list[str]:
    """Say what the numbers mean, in lines."""
    lines, bits, auc = [], report["bits_per_char"], report["auc"]
    if seen := report["data"]["maybe_seen"]:
        sessions = cli.counted(report["data"]["sessions"], "sessions")
        lines.append(
            f"{seen} of the {sessions} here are older than the newest training session: "
            "the clone may have seen them, and look better than it is."
        )
    if (gain := bits.get("base - clone", {})).get("value") is not None:
        better = "better" if gain["low"] > 0 else "no better"
        lines.append(
            f"It predicts your messages {better} than its base: {bits['clone']['value']:.2f} "
            f"against {bits['base']['value']:.2f} bits per character."
        )
    if (two := bits.get("other - clone", {})).get("value") is not None:
        lines.append(
            f"The second one needs {two['value']:+.3f} bits per character more than the first "
            f"(95% interval {two['low']:+.3f} to {two['high']:+.3f})."
        )
    if auc["clone"]["value"] is None:
        lines.append(f"Whether its replies can be told from yours: {auc['clone']['why']}.")
    else:
        lines.append(
            "A simple classifier picks your real reply over the clone's "
            f"{auc['clone']['value']:.0%} of the time (50% = indistinguishable)."
        )
    earlier, friends = auc["me before"]["value"], auc["friends"]["value"]
    if None not in (auc["clone"]["value"], earlier, friends):
        lines.append(
            f"For comparison: over your own earlier replies {earlier:.0%}, "
            f"over your friends' {friends:.0%}."
        )
    if report["copying"]["clone"]["flagged"]:
        lines.append("It copies: more of its words are verbatim from the training data than yours.")
    if report["memorised"][0]["clone"].get("n"):
        lines.append(memorisation.verdict(report["memorised"][0]))
    return lines


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    cli.run(main)
