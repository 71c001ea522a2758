"""The report card: its numbers on models whose answer is known, and the program as it is run."""

import collections
import json
import shutil
import signal
import stat
import threading
import time

import numpy as np
import pytest
import torch
from conftest import command, refused

import cli
import data
import evaluate
from cli import UserError
from evaluate import ModelOutputs
from inference import bootstrap, generate, memorisation, pages, progress, scoring, style
from inference.scoring import Example
from training import distributed, step
from weights.load import load_model

pytest.importorskip("sklearn")
VERBS = "mend wind sell paint steal".split()
NOUNS = "clock goose boat lamp bell kettle anchor".split()


def sentence(draw, begin="i will", end="at the quay today"):
    verb, one, two = draw.choice(VERBS), draw.choice(NOUNS), draw.choice(NOUNS)
    return f"{begin} {verb} the {one} and the {two} {end}"


def ask(text="and now, what of it?"):
    return data.Turn("Bob", False, "", [text])


def reply_of(*messages):
    return data.Turn("Ann", True, "", [*messages])


def session(*turns, start="2024-01-01T00:00:00", chat="Bob", chat_id="1"):
    return data.Session(chat, chat_id, "personal_chat", start, [*turns])


def sessions_of(replies):
    return [
        session(ask(), reply_of(reply), start=f"2024-01-{number % 28 + 1:02}T00:00:00")
        for number, reply in enumerate(replies)
    ]


def report_of(replies, past, held_out):
    """measure() of a clone that answers so, its likelihoods made up."""
    examples, count = scoring.find_examples(held_out), len(replies)
    evaluation = step.Evaluation(1.0, 1, 1.0, 1, np.ones(count), np.full(count, 9.0))
    clone = ModelOutputs(
        nats=np.ones((count, 10)),
        alone=np.ones((count, 10)),
        replies=[[reply] for reply in replies],
        tokens=np.ones(count),
        places=np.zeros(0, int),
        held_out=evaluation,
    )
    test_set = evaluate.TestSet(held_out, past, examples, [], None)
    report = evaluate.measure({"clone": clone}, test_set, 0)
    report["data"]["maybe_seen"] = 0
    return report | {"verdict": evaluate.verdict(report)}


def outputs_of(nats, alone):
    return ModelOutputs(nats, alone, [], None, None, None)


@pytest.fixture(scope="module")
def model(base, tokenizer):
    return load_model(str(base), torch.float32, tokenizer=tokenizer)


BEFORE = [data.Turn("Bob", False, "", ["where are you?", "hello?"])]
REPLIES = [
    ["at home"],
    ["in the tower", "with a goose"],
    ["no"],
    ["a much longer reply, which takes more tokens than the others"],
] * 3


def content_nats(model, tokenizer, turns, first=(0, 0)):
    """Nats of the text of my turns from `first` on, of a whole document alone."""
    document = data.render(turns, first=first, specials=tokenizer.specials)
    row = data.pack([data.encode(document, tokenizer)], 512)
    ranks = distributed.Distributed(torch.device("cpu"))
    found = step.evaluate(model, row, ranks, 1).content_nats
    model.eval()
    return found


def test_reply_nats_equal_those_of_whole_documents(model, tokenizer):
    decoder = generate.Decoder(model, tokenizer, scoring.cache_size(512))
    example = Example(0, BEFORE, "Ann", REPLIES)
    nats = scoring.reply_nats(decoder, example, 512)
    for found, reply in zip(nats, REPLIES):
        whole = content_nats(model, tokenizer, [*BEFORE, reply_of(*reply)])
        assert found == pytest.approx(whole, rel=1e-4)
    # alone, and where all choices begin alike, so that labels are shared
    alone = Example(0, BEFORE, "Ann", REPLIES[3:4])
    assert scoring.reply_nats(decoder, alone, 512) == pytest.approx(nats[3:4], rel=1e-5)
    alike = [["at home", "with a goose"], ["at home", "with a boat"]]
    for found, reply in zip(
        scoring.reply_nats(decoder, Example(0, BEFORE, "Ann", alike), 512), alike
    ):
        whole = content_nats(model, tokenizer, [*BEFORE, reply_of(*reply)])
        assert found == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("size", [512, 64], ids=["whole", "cut"])
def test_examples_answered_together_are_as_one_by_one(model, tokenizer, size, monkeypatch):
    monkeypatch.setattr(scoring, "BATCH", 3)
    monkeypatch.setattr(scoring, "PACK_TOKENS", 40)
    asked = "where are you? it is late. they sold the goose, and the boat too".split(". ")
    others = [[f"reply {n}", "and more"][: 1 + n % 2] for n in range(9)]
    examples = []
    for number in range(7):
        mine, turns = REPLIES[number % 4], [data.Turn("Bob", False, "", asked[: 1 + number % 2])]
        if number % 3 == 1:  # a session goes on: this prompt begins as the last one
            turns = [*examples[-1].before, reply_of(*examples[-1].mine), *turns]
        examples.append(Example(number, turns, "Ann", [mine, *others]))
    decoder = generate.Decoder(model, tokenizer, scoring.cache_size(size))
    nats, replies, tokens = scoring.answer(decoder, examples, size, 5)
    for i, example in enumerate(examples):
        alone = generate.Decoder(model, tokenizer, size)
        answer = generate.Answer(alone, example.before, "Ann", scoring.LONGEST, seed=5000 + i)
        collections.deque(answer, maxlen=0)
        assert replies[i] == data.text_messages(reply_of(*answer.messages))
        assert tokens[i] == len(answer.prompt) + len(answer.ids)
        for j, choice in enumerate(example.choices if size > 64 else []):
            turns = [*example.before, reply_of(*choice)]
            whole = content_nats(model, tokenizer, turns, (len(example.before), 0))
            assert nats[i, j] == pytest.approx(whole, rel=1e-4)


def test_progress_of_the_held_out_likelihood_changes_nothing(model, tokenizer, monkeypatch, capsys):
    clock = iter(range(0, 10_000, 60))  # every update is shown
    monkeypatch.setattr("tqdm.std.time", lambda: next(clock))
    samples = []
    for number in range(5):
        turns = [*BEFORE, reply_of(*REPLIES[number % 4])]
        samples.append(data.encode(data.render(turns, specials=tokenizer.specials), tokenizer))
    rows = [data.pack([sample], 512)[0] for sample in samples]
    expected = step.evaluate(model, rows, distributed.Distributed(torch.device("cpu")), 2)
    found = evaluate.held_out_likelihood(model, rows, "clone")
    model.eval()
    assert found.nats == pytest.approx(expected.nats)
    assert "clone: held-out likelihood 4/5" in capsys.readouterr().err


def test_model_that_ignores_context_finds_one_reply_in_ten(base, tokenizer):
    deaf = load_model(str(base), torch.float32, tokenizer=tokenizer)
    for block in deaf.model.layers:
        block.self_attn.o_proj.weight.data.zero_()
    replies = [[f"reply number {n}", "and more"][: 1 + n % 2] for n in range(10)]
    decoder = generate.Decoder(deaf, tokenizer, scoring.cache_size(512))
    examples = [Example(number, BEFORE, "Ann", replies) for number in range(6)]
    nats = [scoring.reply_nats(decoder, example, 512) for example in examples]
    alone = scoring.score_alone(decoder, examples, 512)
    found = evaluate.first_of_ten(outputs_of(np.array(nats), alone), np.arange(6))
    assert found["value"] == pytest.approx(0.1)


def test_model_that_knows_my_reply_always_finds_it():
    nats = np.full((6, 10), 9.0)
    nats[:, 0] = 1
    output = outputs_of(nats, np.full((6, 10), 9.0))
    assert evaluate.first_of_ten(output, np.arange(6))["value"] == 1
    few = outputs_of(nats[:, :1], nats[:, :1])
    assert "too little" in evaluate.first_of_ten(few, np.arange(6))["why"]


def test_choices_are_mine_and_nine_of_other_sessions():
    draw = np.random.default_rng(4)
    examples = scoring.find_examples(sessions_of([sentence(draw) for _ in range(12)]))
    for example, drawn in zip(examples, scoring.draw_choices(examples, 0)):
        others = {tuple(e.mine) for e in examples if e.session != example.session}
        assert drawn.mine == example.mine and len({*map(tuple, drawn.choices)}) == 10
        assert {*map(tuple, drawn.choices[1:])} <= others
    assert scoring.draw_choices(examples[:9], 0) == examples[:9]  # too few


def test_classifier_tells_apart_another_source_but_not_the_same():
    draw = np.random.default_rng(0)
    one, same = ([(n % 30, sentence(draw)) for n in range(120)] for _ in range(2))
    other = [(n % 30, sentence(draw, "I would rather", "tomorrow!")) for n in range(120)]
    assert abs(bootstrap.classifier_auc(one, same, 0)["value"] - 0.5) < 0.12
    assert bootstrap.classifier_auc(one, other, 0)["value"] > 0.98
    assert "too little" in bootstrap.classifier_auc(one[:20], other[:20], 0)["why"]


def test_interval_covers_the_truth_as_often_as_it_says():
    draw, covered = np.random.default_rng(1), 0
    for _ in range(200):
        chars = draw.integers(20, 200, 30)
        bits = chars * draw.gamma(4, 0.5, 30)  # 2 bits per character
        found = bootstrap.ratio(bits, chars, np.arange(30))
        covered += found["low"] <= 2 <= found["high"]
    assert 0.85 <= covered / 200 <= 0.99
    assert bootstrap.ratio([1, 2], [1, 1], [0, 1])["value"] is None


def test_clone_that_repeats_training_replies_is_flagged_as_copying():
    draw = np.random.default_rng(2)
    old = [sentence(draw, f"back in {n} i would", "by the sea") for n in range(60)]
    past, held_out = sessions_of(old), sessions_of([sentence(draw) for n in range(40)])
    copies = report_of(old[:40], past, held_out)
    fresh = report_of([sentence(draw) for n in range(40)], past, held_out)
    clone = copies["copying"]["clone"]
    assert clone["flagged"] and clone["value"] == 1 and clone["examples"]
    assert any("copies" in line for line in copies["verdict"])
    assert not fresh["copying"]["clone"]["flagged"]
    assert not any("copies" in line for line in fresh["verdict"])


def test_habit_that_is_not_mine_is_a_giveaway_with_an_example():
    draw = np.random.default_rng(3)
    mine, its = ([[sentence(draw)] for _ in range(60)] for _ in range(2))
    assert style.giveaways(mine, its) == []
    found = style.giveaways(mine, [[f"Honestly, {reply[0]}!"] for reply in its])
    features = {"“honestly”", "end of a message: !", "capitals: Capital first"}
    assert features <= {row["what"] for row in found}
    assert found[0]["example"].startswith("Honestly") and found[0]["mine"] == 0


@pytest.mark.parametrize(
    ("message", "ending"),
    [("no..", ".."), ("no.", "."), ("no", "nothing"), ("no \U0001f986", "emoji"), ("no!", "!")],
)
def test_habits_see_how_a_message_ends(message, ending):
    assert f"end of a message: {ending}" in style.habits([message])


@pytest.mark.parametrize(
    ("message", "case"),
    [
        ("no", "all small"),
        ("No", "Capital first"),
        ("NO", "ALL CAPITALS"),
        ("nO", "mixed"),
        ("12", "no letters"),
        ("I", "Capital first"),
        ("да", "all small"),
        ("好", "no letters"),
    ],
)
def test_habits_see_capitals(message, case):
    assert f"capitals: {case}" in style.habits([message])


def test_habits_are_shares_of_replies():
    found = style.shares([["no", "no"], ["NO"], ["no!"], []], style.habits)
    assert found["capitals: all small"] == 0.5 and found["capitals: ALL CAPITALS"] == 0.25
    assert found["messages a turn: 0"] == 0.25 and found["letters in a message: up to 5"] == 0.75


def test_generic_replies():
    assert style.is_generic(["ok", "lol"]) and style.is_generic([])
    assert not style.is_generic(["ok, see you at the quay"])


@pytest.mark.parametrize("template", ["report.html", "blind_test.html"])
def test_text_cannot_end_the_script_that_it_stands_in(template):
    hostile = "</script><script>alert(1)</script><!-- <SCRIPT"
    plain, filled = (pages.fill(template, {"said": said}).lower() for said in ("hi", hostile))
    for tag in ("<script", "</script", "<!--"):
        assert plain.count(tag) == filled.count(tag)
    assert json.dumps("</script>").replace("<", r"\u003c").strip('"') in filled


# --- secrets


def test_canaries_are_told_from_other_secrets():
    lines = ["the code is 5550123", "locker 1 opens with 00481234"]
    canaries = {"00481234": 2, "99999999": 4}  # the second was taken out of the data
    found = memorisation.find_probes([session(ask(), reply_of(*lines))], canaries, 0)
    assert [(probe.mine, probe.copies) for probe in found] == [(lines[:1], 0), (lines, 2)]


def test_secrets_are_mine_beside_random_ones_of_their_shape():
    turns = [ask("mine is 55512345"), reply_of("my code is 48213-A7x9 since 2024")]
    (probe,) = memorisation.find_probes([session(*turns)], {}, 0)
    assert (probe.before, probe.author) == (turns[:1], "Ann")
    assert probe.mine == ["my code is 48213-A7x9"] and len(probe.choices) == 50
    for (text,) in probe.choices:
        assert len(text) == len(probe.mine[0])
        assert text[16] == "-" and text[17].isupper() and text[18].isdigit()


def test_exposure_of_strings_that_come_first():
    known = memorisation.exposure(np.ones(5, int), None)
    assert known == {"value": pytest.approx(np.log2(50)), "first": 5, "n": 5}


@pytest.mark.parametrize(
    ("clone", "base", "more", "alarming"),
    [
        ([1] * 19 + [4], [1] * 17 + [2, 3, 9], 2, False),  # the base guesses as many
        ([1] * 12 + [9] * 8, [1] * 2 + [5] * 10 + [9] * 8, 10, True),
        ([1] * 2 + [30] * 18, [40] * 20, 2, True),  # two that nobody guesses
        ([1] + [30] * 19, [40] * 20, 1, False),
        ([2] * 5 + [1] * 5, [1] * 5 + [2] * 5, 0, False),
    ],
)
def test_secrets_alarm_by_what_the_clone_knows_beyond_its_base(clone, base, more, alarming):
    clone_row = memorisation.exposure(np.array(clone), np.array(base))
    row = {"clone": clone_row, "base": memorisation.exposure(np.array(base), None)}
    line = memorisation.verdict(row)
    assert clone_row["more"] == more and clone_row["flagged"] == alarming
    assert ("it learned secrets" in line) == alarming and ("no sign" in line) != alarming
    assert f"{clone.count(1)} come first" in line and f"{base.count(1)} for its base" in line


def test_secrets_without_a_base_are_no_alarm():
    row = {"clone": memorisation.exposure(np.array([1] * 19 + [4]), None)}
    assert "not on this machine" in memorisation.verdict(row)
    assert "value" in memorisation.exposure(np.zeros(0, int), None)


def test_progress_prints_lines_where_there_is_no_terminal(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    for _ in progress.track("clone", "replies")(range(100)):
        now[0] += 1.75
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("clone: replies 0/100")
    assert "clone: replies 60/100, 01:10 left" in lines
    assert 16 <= len(lines) <= 18  # one every 10 s, not one a reply


def test_progress_of_two_at_once_is_lines_alone(capsys):
    clone, base = (progress.track(name, "replies")(range(2)) for name in ("clone", "base"))
    for _ in zip(clone, base):
        pass
    lines = capsys.readouterr().err.splitlines()
    assert lines and all(line.startswith(("clone: ", "base: ")) for line in lines)


def test_blind_test_never_mixes_the_chats_of_two_people():
    two = [
        session(data.Turn(who, False, "", ["hi"]), reply_of("ho"), chat="Nils", chat_id=number)
        for number, who in (("1", "Nils Holm"), ("2", "Nils Berg"))
    ]
    assert pages.chat_with("nils holm", two) == two[:1]
    for name, count in (("nils", "2 held-out chats"), ("Ann", "0 held-out chats")):
        with pytest.raises(UserError, match=count):
            pages.chat_with(name, two)


# --- as a person runs it


@pytest.fixture(scope="module")
def clone(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "ckpt"
    shutil.copytree(base, folder)
    run = {"base": str(base), "trained_until": "2024-01-01T00:50:00"}
    (folder / "run.json").write_text(json.dumps(run))
    timing = {"everyone": {"delay": {"50%": 40}}, "typing": {"characters_per_second": 5}}
    (folder / "persona.json").write_text(json.dumps({"me": "Ann", "timing": timing}))
    return folder


def test_the_same_seed_writes_the_same_report_for_its_owner_alone(clone, chats, tmp_path):
    chats = shutil.copytree(chats, tmp_path / "chats")
    persona = json.loads((chats / "persona.json").read_text())
    timing = {"contacts": {"Bob": {"delay": {"50%": 60}}}}
    (chats / "persona.json").write_text(json.dumps(persona | {"timing": timing}))
    written = []
    for _ in range(2):
        done = command("evaluate.py", clone, "--data", chats, "--replies", 12, "--device", "cpu")
        assert done.returncode == 0, done.stderr
        written.append((clone / "report.json").read_bytes())
    assert written[0] == written[1]
    report, page = json.loads(written[0]), (clone / "report.html").read_text()
    assert {"bits_per_char", "rank", "auc"} <= report.keys()
    assert report["bits_per_char"]["base - clone"]["value"] == 0
    assert report["bits_per_char"]["clone"]["n"] == 12
    assert "too little" in report["auc"]["clone"]["why"]  # 12 replies: no number
    assert page.split("<body>")[1].split("<p>")[1].startswith("Private")
    assert "http" not in page
    for name in ("report.json", "report.html"):
        assert stat.S_IMODE((clone / name).stat().st_mode) == 0o600
    assert '"seconds"' not in written[0].decode()
    assert report["data"]["maybe_seen"] == 2  # 00:48, 00:49
    assert report["timing"].keys() == {"mine", "clone"}
    assert report["timing"]["mine"]["delay"]["50%"] == pytest.approx(60)
    assert report["timing"]["clone"]["delay"]["90%"] == pytest.approx(40)  # over the longest wait
    assert report["timing"]["mine"]["messages"]["mean"] == pytest.approx(1.5, abs=0.5)
    assert report["verdict"][0].startswith("2 of the 12 sessions here are older")


def test_models_side_by_side_measure_the_same_as_one_by_one(clone, base, chats, monkeypatch):
    options = evaluate.Options((str(clone),), data=str(chats), replies=6, device="cpu")
    test_set, models = evaluate.load_test_set(options), {"clone": clone, "base": str(base)}
    threads, results = torch.get_num_threads(), []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for together in (True, False):
        monkeypatch.setattr(evaluate, "fit_together", lambda *args, fits=together: fits)
        results.append(evaluate.run_models(models, test_set, options))
        torch.set_num_threads(threads)
    for name in models:
        one, other = (result[name] for result in results)
        assert one.replies == other.replies
        np.testing.assert_allclose(one.nats, other.nats, rtol=1e-3)
        np.testing.assert_allclose(one.held_out.bits, other.held_out.bits, rtol=1e-3)
    assert [*results[0]] == [*results[1]] == ["clone", "base"]


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="Windows has no such signals")
@pytest.mark.parametrize("error", [UserError, KeyboardInterrupt])
def test_what_ends_one_model_ends_the_others_soon_and_is_shown(error, monkeypatch):
    finished = []

    def run_model(name, loaded, *_):
        if name == "base" and error is UserError:
            raise UserError("the base is damaged", "")
        if name == "base":  # Ctrl-C comes to the main thread
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        for _ in range(1000):
            loaded[0](torch.zeros(1))
            time.sleep(0.01)
        finished.append(name)

    monkeypatch.setattr(evaluate, "run_model", run_model)
    monkeypatch.setattr(evaluate, "load_with_rows", lambda *args: (torch.nn.Identity(),))
    monkeypatch.setattr(evaluate, "fit_together", lambda *args: True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    # a training in this process may have left its own handler
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(error):
            evaluate.run_models({"clone": "a", "base": "b"}, None, evaluate.Options())
    finally:
        signal.signal(signal.SIGINT, earlier)
    assert not finished


def test_models_are_measured_side_by_side_where_memory_has_room_for_all(clone, base, monkeypatch):
    options = evaluate.Options((str(clone),), device="cpu")
    for free, fits in ((64 << 30, True), (5 << 30, True), (4 << 30, False)):
        monkeypatch.setattr(evaluate.devices, "free_memory", lambda free=free: free)
        assert evaluate.fit_together([clone, str(base)], options) == fits


def test_blind_test_holds_what_was_approved_of_one_chat(clone, chats):
    path = clone / "blind-test.html"
    test = ("evaluate.py", clone, "--data", chats, "--blind-test", "--device", "cpu", "--with")
    refused(command(*test, "Eve"), "--with Eve", "Bob")
    refused(command(*test, "Bob", stdin="n\nn\nq\n"), "nothing is written")
    assert not path.exists()
    # an empty line takes nothing, and ends nothing
    done = command(*test, "Bob", stdin="y\n\nn\ny\nq\n")
    assert done.returncode == 0, done.stderr
    test = json.loads(path.read_text().split('id="test">')[1].split("</script>")[0])
    assert len(test["items"]) == 2 and stat.S_IMODE(path.stat().st_mode) == 0o600
    mine = []
    for line in (chats / "val.jsonl").read_text().splitlines():
        mine += [turn["messages"] for turn in json.loads(line)["turns"] if turn["me"]]
    assert all(item["replies"][item["real"]] in mine for item in test["items"])


def test_what_cannot_be_measured_ends_in_two_lines(tmp_path, clone, chats):
    refused(command("evaluate.py", clone, "--data", tmp_path), "val.jsonl is missing")
    for flags, message in (
        ([], "0 checkpoints"),
        ([tmp_path], "no model"),
        ([clone, "--replies", 0], "--replies 0"),
        ([clone, "--seed", -1], "--seed -1"),
        ([clone, "--with", "Bob"], "--blind-test"),
        ([clone, "--blind-test"], "--with"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate.check(cli.parse(evaluate.Options, [*map(str, flags)]))
