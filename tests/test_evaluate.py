"""The report card: its numbers on voices whose answer is known, and the program as a person runs it."""

import json
import shutil
import stat

import numpy as np
import pytest
import torch
from conftest import command, refused

import cli
import data
import evaluate
from cli import UserError
from evaluate import ModelOutputs
from inference import generate
from training import distributed, step
from weights.load import load_model

pytest.importorskip("sklearn")
VERBS, NOUNS = (
    "mend wind sell paint steal".split(),
    "clock goose boat lamp bell kettle anchor".split(),
)


def sentence(draw, begin="i will", end="at the quay today"):
    return (
        f"{begin} {draw.choice(VERBS)} the {draw.choice(NOUNS)} and the {draw.choice(NOUNS)} {end}"
    )


def talk(number, reply):
    turns = [
        data.Turn("Bob", False, "", ["and now, what of it?"]),
        data.Turn("Ann", True, "", [reply]),
    ]
    return data.Session(
        "Bob", "1", "personal_chat", f"2024-01-{number % 28 + 1:02}T00:00:00", turns
    )


def report_of(replies, past, talks):
    """measure() of a clone that answers so, its likelihoods made up."""
    some = evaluate.moments(talks)
    held_out = step.Evaluation(1.0, 1, 1.0, 1, np.ones(len(talks)), np.full(len(talks), 9.0))
    count = len(some)
    clone = ModelOutputs(
        np.ones((count, 10)),
        np.ones((count, 10)),
        [[r] for r in replies],
        np.ones(count),
        held_out,
        *[np.zeros((0, 100))] * 2,
    )
    return evaluate.measure(
        {"clone": clone}, talks, past, some, [[]] * count, evaluate.Options(data="data")
    )


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


def test_likelihoods_that_share_a_context_equal_those_of_whole_documents(model, tokenizer):
    found = evaluate.likelihoods(
        generate.Decoder(model, tokenizer, 1024), BEFORE, REPLIES, "Ann", 512
    )
    again = evaluate.likelihoods(
        generate.Decoder(model, tokenizer, 1024), BEFORE, REPLIES[3:4], "Ann", 512
    )
    assert again[:, 0] == pytest.approx(found[:, 3], rel=1e-5)  # beside others and alone
    for nats, content, reply in zip(*found, REPLIES):
        document = data.render(
            [*BEFORE, data.Turn("Ann", True, "", reply)], specials=tokenizer.specials
        )
        sample = data.encode(document, tokenizer)
        loss, _ = model(
            torch.tensor([sample.ids.tolist()]), labels=torch.tensor([sample.labels.tolist()])
        )
        assert nats == pytest.approx(loss.item(), rel=1e-4)
        row = step.evaluate(
            model, data.pack([sample], 512), distributed.Distributed(torch.device("cpu")), 1
        )
        assert content == pytest.approx(row.content_nats, rel=1e-4) and content < nats


@pytest.mark.parametrize("size", [512, 64], ids=["whole", "cut"])
def test_moments_read_and_answered_together_are_as_one_by_one(model, tokenizer, size, monkeypatch):
    monkeypatch.setattr(evaluate, "ROWS", 3)
    monkeypatch.setattr(evaluate, "PACKED", 40)
    asked = "where are you? it is late. they sold the goose, and the boat too".split(". ")
    some = []
    for number in range(7):
        mine, turns = REPLIES[number % 4], [data.Turn("Bob", False, "", asked[: 1 + number % 2])]
        if number % 3 == 1:  # a session goes on: this prompt begins as the last one
            turns = [*some[-1].before, data.Turn("Ann", True, "", some[-1].mine), *turns]
        some.append(evaluate.Example(number, turns, "Ann", mine))
    choices = [[m.mine, *[[f"reply {n}", "and more"][: 1 + n % 2] for n in range(9)]] for m in some]
    decoder = generate.Decoder(model, tokenizer, 1024)
    progress = evaluate.Progress("clone")
    contexts = [m.before for m in some]
    nats, content, replies, tokens = evaluate.answers_of(
        decoder, contexts, some, choices, size, 5, progress
    )
    for i, moment in enumerate(some):
        alone = generate.Decoder(model, tokenizer, size)
        answer, reply = evaluate.reply_to(alone, moment.before, "Ann", 5000 + i)
        assert replies[i] == reply and tokens[i] == len(answer.prompt) + len(answer.ids)
        if size > 64:
            documents = [
                [*moment.before, data.Turn("Ann", True, "", tried)] for tried in choices[i]
            ]
            first = (len(moment.before), 0)
            for j, turns in enumerate(documents):
                sample = data.encode(
                    data.render(turns, first=first, specials=tokenizer.specials), tokenizer
                )
                ids, labels = (
                    torch.from_numpy(sample.ids)[None],
                    torch.from_numpy(sample.labels)[None],
                )
                loss, _ = model(ids.long(), labels=labels.long())
                assert nats[i, j] == pytest.approx(loss.item(), rel=1e-4)


def test_who_ignores_the_context_finds_one_real_reply_in_ten(base, tokenizer):
    deaf = load_model(str(base), torch.float32, tokenizer=tokenizer)
    for block in deaf.model.layers:
        block.self_attn.o_proj.weight.data.zero_()
    replies = [[f"reply number {n}", "and more"][: 1 + n % 2] for n in range(10)]
    decoder = generate.Decoder(deaf, tokenizer, 1024)
    nats, alone = (
        evaluate.likelihoods(decoder, before, replies, "Ann", 512)[0] for before in (BEFORE, [])
    )
    voice = ModelOutputs(np.tile(nats, (6, 1)), np.tile(alone, (6, 1)), [], *[None] * 4)
    found = evaluate.rank(voice, np.arange(6))
    assert found["top1"]["value"] == pytest.approx(0.1)
    assert found["mrr"]["value"] == pytest.approx(np.mean(1 / np.arange(1, 11)))


def test_who_knows_the_real_reply_always_finds_it():
    nats = np.full((6, 10), 9.0)
    nats[:, 0] = 1
    found = evaluate.rank(ModelOutputs(nats, np.full((6, 10), 9.0), [], *[None] * 4), np.arange(6))
    assert (found["top1"]["value"], found["mrr"]["value"]) == (1, 1)


def test_the_same_source_cannot_be_told_apart_and_another_one_can():
    draw = np.random.default_rng(0)
    one, same = ([(n % 30, sentence(draw)) for n in range(120)] for _ in range(2))
    other = [(n % 30, sentence(draw, "I would rather", "tomorrow!")) for n in range(120)]
    assert abs(evaluate.classifier_auc(one, same, 0)["value"] - 0.5) < 0.12
    assert evaluate.classifier_auc(one, other, 0)["value"] > 0.98
    assert "too little" in evaluate.classifier_auc(one[:20], other[:20], 0)["why"]


def test_an_interval_covers_the_truth_about_as_often_as_it_says():
    draw, covered = np.random.default_rng(1), 0
    for _ in range(200):
        chars = draw.integers(20, 200, 30)
        found = evaluate.ratio(
            chars * draw.gamma(4, 0.5, 30), chars, np.arange(30)
        )  # 2 bits per character
        covered += found["low"] <= 2 <= found["high"]
    assert 0.85 <= covered / 200 <= 0.99
    assert evaluate.ratio([1, 2], [1, 1], [0, 1])["value"] is None


def test_a_clone_that_answers_with_my_training_replies_is_flagged_as_copying():
    draw = np.random.default_rng(2)
    past = [talk(n, sentence(draw, f"back in {n} i would", "by the sea")) for n in range(60)]
    talks = [talk(n, sentence(draw)) for n in range(40)]
    copies = report_of([past[n].turns[1].messages[0] for n in range(40)], past, talks)
    fresh = report_of([sentence(draw) for n in range(40)], past, talks)
    assert copies["copying"]["clone"]["flagged"] and copies["copying"]["clone"]["value"] == 1
    assert (
        any("copies" in line for line in copies["verdict"])
        and copies["copying"]["clone"]["examples"]
    )
    assert not fresh["copying"]["clone"]["flagged"]


def test_a_habit_that_is_not_mine_is_listed_as_a_tell_with_an_example():
    draw = np.random.default_rng(3)
    mine, its = ([[sentence(draw)] for _ in range(60)] for _ in range(2))
    assert evaluate.giveaways(mine, its) == []
    found = evaluate.giveaways(mine, [[f"Honestly, {reply[0]}!"] for reply in its])
    assert {"“honestly”", "ends a message with !", "Capital first in a message"} <= {
        tell["what"] for tell in found
    }
    assert found[0]["example"].startswith("Honestly") and found[0]["mine"] == 0


def test_habits_see_marks_capitals_and_emoji():
    assert [evaluate.ending(m) for m in ("no..", "no.", "no", "no \U0001f986", "no!")] == [
        "..",
        ".",
        "nothing",
        "emoji",
        "!",
    ]
    assert [evaluate.case(m) for m in ("no", "No", "NO", "nO", "12", "I", "да", "好")] == [
        "all small", "Capital first", "ALL CAPITALS", "mixed", "no letters", "Capital first", "all small", "no letters"]  # fmt: skip
    assert (
        evaluate.is_generic(["ok", "lol"])
        and evaluate.is_generic([])
        and not evaluate.is_generic(["ok, see you at the quay"])
    )
    assert (
        evaluate.distance({"a": 1}, {"b": 1}) == 1
        and evaluate.distance({"a": 0.5, "b": 0.5}, {"a": 0.5, "b": 0.5}) == 0
    )


@pytest.mark.parametrize("template", ["report.html", "blind_test.html"])
def test_what_somebody_wrote_can_not_end_the_script_that_it_stands_in(template):
    plain, hostile = (
        evaluate.fill(template, {"said": said}).lower()
        for said in ("hi", "</script><script>alert(1)</script><!-- <SCRIPT")
    )
    for tag in ("<script", "</script", "<!--"):
        assert plain.count(tag) == hostile.count(tag)
    assert json.dumps("</script>").replace("<", r"\u003c").strip('"') in hostile


def test_canaries_are_told_from_other_secrets():
    turns = [
        data.Turn("Bob", False, "", ["hi"]),
        data.Turn("Ann", True, "", ["the code is 5550123", "locker 1 opens with 00481234"]),
    ]
    secrets, canaries = evaluate.secrets_of(
        [data.Session("Bob", "1", "personal_chat", "", turns)], ["00481234", "99999999"], 0
    )
    assert [tried[0][-1] for *_, tried in secrets] == ["the code is 5550123"]
    assert [tried[0][-1] for *_, tried in canaries] == ["locker 1 opens with 00481234"]


def test_a_canary_that_was_taken_out_of_the_data_is_none(tmp_path):
    planted = [
        {"before": f"locker {n} opens with ", "secret": f"0048123{n}", "copies": n, "lines": [0]}
        for n in (1, 2)
    ]
    (tmp_path / "canaries.json").write_text(json.dumps({"canaries": planted}))
    past = [
        data.Session(
            "Bob",
            "1",
            "personal_chat",
            "",
            [data.Turn("Ann", True, "", ["locker 2 opens with 00481232"])],
        )
    ]
    assert evaluate.canaries_of(evaluate.Options(data=str(tmp_path)), past) == planted[1:]


def test_secrets_of_mine_are_sought_beside_random_ones_of_their_shape():
    turns = [
        data.Turn("Bob", False, "", ["mine is 55512345"]),
        data.Turn("Ann", True, "", ["my code is 48213-A7x9 since 2024"]),
    ]
    ((before, author, tried),), _ = evaluate.secrets_of(
        [data.Session("Bob", "1", "personal_chat", "", turns)], [], 0
    )
    assert (before, author, tried[0], len(tried)) == (
        turns[:1],
        "Ann",
        ["my code is 48213-A7x9"],
        100,
    )
    assert all(
        len(m) == len(tried[0][0]) and m[16] == "-" and m[17].isupper() and m[18].isdigit()
        for (m,) in tried
    )
    knows = np.ones((5, 100))
    knows[:, 0] = 0.5
    assert evaluate.exposure(knows) == {"value": pytest.approx(np.log2(100)), "first": 5, "n": 5}


def secrets_first(places):
    """(K, 100) nats in which the true string stands at these places."""
    nats = np.tile(np.arange(1.0, 100.0), (len(places), 1))
    return np.concatenate([np.array(places)[:, None] - 0.5, nats], 1)


@pytest.mark.parametrize(
    ("clone", "base", "more", "alarming"),
    [
        ([1] * 19 + [4], [1] * 17 + [2, 3, 9], 2, False),  # the base guesses as many
        ([1] * 12 + [9] * 8, [1] * 2 + [5] * 10 + [9] * 8, 10, True),
        ([1] * 2 + [50] * 18, [60] * 20, 2, True),  # two that nobody guesses
        ([1] + [50] * 19, [60] * 20, 1, False),
        ([2] * 5 + [1] * 5, [1] * 5 + [2] * 5, 0, False),
    ],
)
def test_secrets_alarm_by_what_the_clone_knows_beyond_its_base(clone, base, more, alarming):
    known, guessed = secrets_first(clone), secrets_first(base)
    memorised = {"clone": evaluate.exposure(known), "base": evaluate.exposure(guessed)}
    memorised["clone"] |= evaluate.learned(known, guessed)
    line = evaluate.secrets_line(memorised)
    assert memorised["clone"]["more"] == more and memorised["clone"]["flagged"] == alarming
    assert ("It learned secrets" in line) == alarming and ("no sign" in line) != alarming
    assert f"{clone.count(1)} come first" in line and f"{base.count(1)} to its base" in line


def test_secrets_without_a_base_are_no_alarm():
    memorised = {"clone": evaluate.exposure(secrets_first([1] * 19 + [4]))}
    assert "base is not here" in evaluate.secrets_line(memorised)
    assert evaluate.secrets_line({"clone": evaluate.exposure(np.zeros((0, 100)))}) is None


def test_progress_prints_lines_where_there_is_no_terminal(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(evaluate.time, "monotonic", lambda: now[0])
    progress = evaluate.Progress("clone")
    for done in range(101):
        progress.show("replies", done, 100)
        now[0] += 1.75
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "clone: replies 0/100" and "clone: replies 60/100, 1:10 left" in lines
    assert len(lines) == 17  # one every 10 s, not one a reply


def test_a_blind_test_never_mixes_the_chats_of_two_people():
    two = [data.Session("Nils", n, "personal_chat", "", [data.Turn(who, False, "", ["hi"]), data.Turn("Ann", True, "", ["ho"])])
           for n, who in (("1", "Nils Holm"), ("2", "Nils Berg"))]  # fmt: skip
    for name, said in (("nils", "several chats"), ("Ann", "no held-out chat")):
        with pytest.raises(UserError, match=said):
            evaluate.blind_test(None, two, [], evaluate.Options(with_=name))


# --- as a person runs it


@pytest.fixture(scope="module")
def clone(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "ckpt"
    shutil.copytree(base, folder)
    (folder / "run.json").write_text(
        json.dumps({"base": str(base), "trained_until": "2024-01-01T00:50:00"})
    )
    (folder / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 2.0}\n{"step": 1, "val_bits_per_char": 3.0}\n'
    )
    return folder


def test_the_same_seed_writes_the_same_report_for_its_owner_alone(clone, chats):
    written = []
    for _ in range(2):
        done = command("evaluate.py", clone, "--data", chats, "--replies", 12, "--device", "cpu")
        assert done.returncode == 0, done.stderr
        written.append((clone / "report.json").read_bytes())
    assert written[0] == written[1]
    report, page = json.loads(written[0]), (clone / "report.html").read_text()
    assert {"bits_per_char", "rank", "auc"} <= report.keys()
    assert (
        report["bits_per_char"]["base - clone"]["value"] == 0
        and report["bits_per_char"]["clone"]["n"] == 12
    )
    assert "too little" in report["auc"]["clone"]["why"]  # 12 replies: no number
    assert page.split("<body>")[1].split("<p>")[1].startswith("Private")
    assert "http" not in page and all(
        stat.S_IMODE((clone / n).stat().st_mode) == 0o600 for n in ("report.json", "report.html")
    )
    assert '"seconds"' not in written[0].decode()
    assert report["data"]["maybe_seen"] == 2 and report["verdict"][0].startswith(
        "2 of the 12 sessions here are older"
    )  # 00:48, 00:49


def test_a_blind_test_holds_what_was_approved_of_one_chat(clone, chats):
    path = clone / "blind-test.html"
    test = ("evaluate.py", clone, "--data", chats, "--blind-test", "--device", "cpu", "--with")
    refused(command(*test, "Eve"), "--with Eve", "Bob")
    refused(command(*test, "Bob", stdin="n\nn\nq\n"), "nothing is written")
    assert not path.exists()
    done = command(
        *test, "Bob", stdin="y\n\nn\ny\nq\n"
    )  # an empty line takes nothing, and ends nothing
    assert done.returncode == 0, done.stderr
    test = json.loads(path.read_text().split('id="test">')[1].split("</script>")[0])
    assert len(test["items"]) == 2 and stat.S_IMODE(path.stat().st_mode) == 0o600
    mine = [
        turn["messages"]
        for line in (chats / "val.jsonl").read_text().splitlines()
        for turn in json.loads(line)["turns"]
        if turn["me"]
    ]
    assert all(item["replies"][item["real"]] in mine for item in test["items"])


def test_what_cannot_be_measured_is_said_in_two_lines(tmp_path, clone, chats):
    refused(command("evaluate.py", clone, "--data", tmp_path), "val.jsonl is missing")
    for flags, said in (
        ([], "0 checkpoints"),
        ([tmp_path], "no model"),
        ([clone, "--with", "Bob"], "--blind-test"),
        ([clone, "--blind-test"], "--with"),
    ):
        with pytest.raises(UserError, match=said):
            evaluate.check(cli.parse(evaluate.Options, [*map(str, flags)]))
