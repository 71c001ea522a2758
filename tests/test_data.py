import dataclasses
import datetime
import json
import mmap
import random
import shutil
import sys
import zipfile

import numpy as np
import pytest
from conftest import command, refused
from hypothesis import given, settings
from hypothesis import strategies as st

import cli
import data
from cli import UserError
from data import IGNORE_INDEX, Session, Turn
from exports import Chat, Message, redact, telegram, whatsapp
from exports.command import INDEX, hold_out, main, match_people, validation_size, without_people
from inference.pace import DEFAULT

TOY = [
    ("bob", "10:00", "hi"),
    ("ann", "10:01", "hey"),
    ("ann", "10:01", "you up?"),
    ("bob", "10:41", "was asleep"),
]
CHAT = Chat("user1", "1", "personal_chat", "Bob", "ann")


def toy_sessions(gap=600):
    messages = [
        Message(
            None,
            who,
            who.title(),
            int(at[:2]) * 3600 + int(at[3:]) * 60,
            f"2024-05-01T{at}:00",
            text,
        )
        for who, at, text in TOY
    ]
    return list(data.sessions(messages, CHAT, {"ann"}, gap))


def text_of(labels, tokenizer):
    return tokenizer.engine.decode(
        [int(i) for i in labels if i != IGNORE_INDEX], skip_special_tokens=False
    )


# --- the toy chat of data.py, at every stage


def test_silence_cuts_sessions_and_authors_make_turns():
    first, second = toy_sessions()
    assert [(t.author, t.me, t.messages) for t in first.turns] == [
        ("bob", False, ["hi"]),
        ("ann", True, ["hey", "you up?"]),
    ]
    assert [t.messages for t in second.turns] == [
        ["was asleep"]
    ] and second.start == "2024-05-01T10:41:00"
    assert [data.skip_reason(s) for s in (first, second)] == ["", "sessions in which I say nothing"]
    assert len(toy_sessions(gap=40 * 60)) == 1  # exactly as long as --gap-minutes is not longer


def test_a_gap_of_a_day_and_a_minute_is_a_gap():
    messages = [Message(None, "bob", "Bob", at, "2024-01-01T00:00:00", "x") for at in (0, 86_460)]
    assert len(list(data.sessions(messages, CHAT, {"ann"}, 600))) == 2


def test_rendered_toy():
    document = data.render(toy_sessions()[0].turns)
    assert (
        document.text
        == "<|im_start|>bob\n>>> hi<|im_end|>\n<|im_start|>ann\n>>> hey\n>>> you up?<|im_end|>\n"
    )
    assert (
        "".join(document.text[b:e] for b, e in document.targets) == ">>> hey\n>>> you up?<|im_end|>"
    )
    assert [document.text[b:e] for b, e in document.content_spans] == ["hey", "you up?"]


def test_labels_of_the_toy_are_what_ann_wrote_shifted_by_one(tokenizer):
    (sample,) = data.split(toy_sessions()[0], tokenizer, 1024)
    assert text_of(sample.labels, tokenizer) == ">>> hey\n>>> you up?<|im_end|>"
    everything, _ = tokenizer.encode(data.render(toy_sessions()[0].turns).text.rstrip("\n"))
    assert sample.ids.tolist() == everything[:-1]
    kept = sample.labels != IGNORE_INDEX
    assert sample.labels[kept].tolist() == np.array(everything[1:])[kept].tolist()
    assert text_of(
        np.where(sample.content_mask, sample.labels, IGNORE_INDEX), tokenizer
    ).split() == [
        "hey",
        "you",
        "up?",
    ] and sample.chars == len("heyyou up?")
    (both,) = data.split(toy_sessions()[0], tokenizer, 1024, "everyone")
    assert text_of(both.labels, tokenizer).split("<|im_end|>")[0] == ">>> hi"


# --- rules of the text


@pytest.mark.parametrize(("messages", "trained"), [
    (["<voice>"], ""),
    (["look", "<photo>"], ">>> look\n"),
    (["<photo>", "nice"], ">>> nice<|im_end|>"),
    (["a <photo> of it"], ">>> a <photo> of it<|im_end|>"),
])  # fmt: skip
def test_a_message_that_is_only_a_mark_is_context_never_a_target(messages, trained):
    document = data.render([Turn("Ann", True, "", messages)])
    assert "".join(document.text[b:e] for b, e in document.targets) == trained


def test_every_mark_that_readers_and_redaction_write_is_known_as_one():
    kinds = {kind for kind, *_ in redact.RULES}
    marks = {
        *telegram.MEDIA.values(),
        *dict(telegram.MARKS).values(),
        "<sticker>",
        *(f"<{kind}>" for kind in kinds),
    }
    marks |= {mark for mark, _ in (*whatsapp.KINDS, *whatsapp.FILES)} | {"<location>", "<poll>"}
    assert len(marks) > 15 and all(map(data.MARK.fullmatch, marks))


def test_a_typed_line_of_three_arrows_gets_a_space():
    text = data.render([Turn("Ann", True, "", ["code:\n>>> import this\n>> no"])]).text
    assert text == "<|im_start|>Ann\n>>> code:\n >>> import this\n>> no<|im_end|>\n"
    assert data.split_messages(text.split("\n>>>", 1)[1].removesuffix("<|im_end|>\n")) == [
        "code:\n >>> import this\n>> no"
    ]


def test_edited_files_are_read_as_a_person_leaves_them(tmp_path):
    session = {"chat": "c", "chat_id": "1", "type": "personal_chat", "start": "", "turns": []}
    for messages in (["one\u2028line", ""], [" "], []):
        session["turns"].append({"author": "Ann", "me": True, "at": "", "messages": messages})
    (tmp_path / "train.jsonl").write_text(json.dumps(session, ensure_ascii=False) + "\n\n")
    (read,) = data.load_sessions(tmp_path / "train.jsonl")
    assert [t.messages for t in read.turns] == [["one\u2028line"]]
    (tmp_path / "train.jsonl").write_text("{}\n")
    with pytest.raises(cli.UserError, match="line 1"):
        data.load_sessions(tmp_path / "train.jsonl")


def test_unique_name_numbers_namesakes_and_drops_marks():
    taken = {"system"}
    shown = (
        "Bob",
        "bob",
        None,
        None,
        "Eve\n<|im_end|> >>> X",
        "system",
        "Bob (2)",
        "<phone>",
        "<phone>",
    )
    assert [data.unique_name(name, taken) for name in shown] == [
        "Bob",
        "bob (2)",
        "Deleted Account",
        "Deleted Account (2)",
        "Eve X",
        "system (2)",
        "Bob (2) (2)",
        "Unsaved Contact",
        "Unsaved Contact (2)",
    ]


@pytest.mark.parametrize(
    ("sessions", "share", "held_out"),
    [
        (1000, 0.05, 50),
        (271, 0.05, 20),
        (271, 0.2, 54),
        (60, 0.05, 12),
        (1000, 0.9, 200),
        (2, 0.05, 1),
    ],
)
def test_validation_is_a_share_at_least_20_and_at_most_a_fifth(sessions, share, held_out):
    assert validation_size(sessions, share) == held_out


# --- splitting and packing lose nothing

MESSAGES = st.sampled_from(
    [
        "ok",
        "привет, как дела?",
        "<voice>",
        "a rather long message about nothing at all, " * 3,
        "x\ny",
        "🦆" * 9,
        "word " * 120,
    ]
)
TURNS = st.lists(
    st.builds(
        Turn,
        st.sampled_from(["Ann", "Bob", "Eve"]),
        st.just(False),
        st.just(""),
        st.lists(MESSAGES, min_size=1, max_size=6),
    ),
    min_size=1,
    max_size=30,
)


@settings(max_examples=120, deadline=None)
@given(TURNS, st.sampled_from([64, 100, 256, 1024]), st.sampled_from(["me", "everyone"]))
def test_split_trains_every_target_once_and_fits_the_row(tokenizer, turns, seq_len, loss_on):
    for turn in turns:
        turn.me = turn.author == "Ann"
    whole = data.encode(data.render(turns, loss_on, specials=tokenizer.specials), tokenizer)
    samples = list(
        data.split(Session("c", "1", "personal_chat", "", turns), tokenizer, seq_len, loss_on)
    )
    assert all(len(s.ids) <= seq_len and (s.labels != IGNORE_INDEX).any() for s in samples)
    together = "".join(
        text_of(s.labels, tokenizer) for s in samples
    )  # decoding drops a space where a piece begins
    assert together.replace(" ", "") == text_of(whole.labels, tokenizer).replace(" ", "")
    assert sum(s.chars for s in samples) == pytest.approx(whole.chars, abs=len(samples))


def test_a_long_session_is_cut_on_turn_borders_with_context(tokenizer):
    turns = [
        Turn(("Bob", "Ann")[n % 2], bool(n % 2), "", [f"message number {n} of many"])
        for n in range(40)
    ]
    samples = list(data.split(Session("c", "1", "personal_chat", "", turns), tokenizer, 128))
    assert len(samples) > 3
    for sample in samples[1:]:
        text = tokenizer.engine.decode(sample.ids.tolist(), skip_special_tokens=False)
        assert text.startswith("<s><|im_start|>") or text.startswith("<s> <|im_start|>")
        trained = text_of(sample.labels, tokenizer)
        first = trained.split(" of many")[0].rpartition(" ")[2]
        assert f"number {int(first) - 1} of" in text  # what I answer to is there


def decoded(sample, tokenizer):
    return tokenizer.engine.decode(sample.ids.tolist(), skip_special_tokens=False)


@pytest.mark.parametrize("me", [False, True])
def test_a_reply_behind_a_very_long_message_keeps_the_end_of_it(tokenizer, me):
    """Of what I answer to, and of what I wrote before in the same turn."""
    essay = (
        " ".join(f"chapter {n} about the harbour" for n in range(300))
        + " and that was the last word"
    )
    turns = [
        Turn("Bob", False, "", [essay]),
        Turn("Ann", True, "", ["nice story", "I liked the end"]),
    ]
    if me:
        turns = [
            Turn("Bob", False, "", ["tell me all"]),
            Turn("Ann", True, "", ["hm", essay, "nice story"]),
        ]
    samples = list(data.split(Session("c", "1", "personal_chat", "", turns), tokenizer, 128))
    reply = next(sample for sample in samples if "nice story" in text_of(sample.labels, tokenizer))
    assert "and that was the last word" in decoded(reply, tokenizer)
    assert (
        decoded(reply, tokenizer)
        .replace(" ", "")
        .startswith("<s><|im_start|>" + ("Ann" if me else "Bob"))
    )
    assert me or "chapter" not in text_of(reply.labels, tokenizer)


def test_pieces_of_long_sessions_fill_their_rows_and_repeat_little(tokenizer):
    draw = random.Random(0)
    sessions = []
    for number in range(12):
        turns = [
            Turn(
                ("Bob", "Ann", "Eve")[draw.randrange(3)],
                False,
                "",
                [f"{draw.random()} " * draw.randrange(1, 12) for _ in range(2)],
            )
            for _ in range(200)
        ]
        for turn in turns:
            turn.me = turn.author == "Ann"
        sessions.append(Session("c", str(number), "private_group", "", turns))
    whole = sum(
        len(tokenizer.encode(data.render(s.turns, specials=tokenizer.specials).text)[0])
        for s in sessions
    )
    rows = data.pack(
        [
            sample
            for n, s in enumerate(sessions)
            for sample in data.split(s, tokenizer, 1024, number=n)
        ],
        1024,
    )
    assert data.fill_share(rows, 1024) > 0.98
    assert sum(len(row.ids) for row in rows) < 1.15 * whole


def fake(n, number):
    labels = np.full(n, IGNORE_INDEX, np.int32)
    labels[-1] = number
    return data.Sample(np.full(n, number, np.int32), labels, labels != IGNORE_INDEX, 1, number)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 200), min_size=1, max_size=80))
def test_pack_keeps_every_sample_whole_once(lengths):
    rows = data.pack([fake(n, i) for i, n in enumerate(lengths)], 200)
    seen = {}
    for row in rows:
        assert len(row.ids) <= 200
        for n, i, end in zip(row.doc_lengths, row.sessions, np.cumsum(row.doc_lengths)):
            assert set(row.ids[end - n : end]) == {i}
            seen[int(i)] = seen.get(int(i), 0) + int(n)
    assert seen == dict(enumerate(lengths))


def test_packing_is_best_fit():
    rows = data.pack([fake(n, i) for i, n in enumerate([60, 50, 40, 30, 20])], 100)
    assert sorted(sorted(row.doc_lengths.tolist()) for row in rows) == [[20, 30, 50], [40, 60]]


def test_rows_are_cached_by_content(chats, tokenizer, tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text((chats / "train.jsonl").read_text())
    first = data.load_rows(path, tokenizer, 128)
    (cache,) = (tmp_path / "cache").iterdir()
    again = data.load_rows(path, tokenizer, 128)
    assert [r.ids.tolist() for r in first] == [r.ids.tolist() for r in again] and [
        r.chars.tolist() for r in first
    ] == [r.chars.tolist() for r in again]
    memory = again[0].ids
    while isinstance(memory, np.ndarray):
        memory = memory.base
    assert isinstance(memory, mmap.mmap)  # not read before it is needed
    path.write_text("".join(path.read_text().splitlines(True)[:5]))  # edited by hand
    assert sum(len(r.doc_lengths) for r in data.load_rows(path, tokenizer, 128)) == 5
    assert not cache.exists()
    path.write_text(path.read_text().replace("see you \\ud83e\\udd86", "bye"))
    targets = [
        sum(
            (r.labels != IGNORE_INDEX).sum()
            for r in data.load_rows(path, tokenizer, 128, short_weight=weight)
        )
        for weight in (1.0, 0.0)
    ]
    assert targets[0] > targets[1]  # and by what was asked for


# --- the command


def export(messages, **root):
    """A Telegram full export with one personal chat; messages: (from id or None, text or fields)."""
    listed = []
    for n, (who, what) in enumerate(messages, 1):
        fields = what if isinstance(what, dict) else {"text": what}
        stamp = 1_700_000_000 + 60 * n + fields.pop("later", 0)
        name = {"user1": "Ann", "user2": "Bob"}.get(who)
        listed.append(
            {
                "id": n,
                "type": "message",
                "date": "2023-11-14T22:13:20",
                "date_unixtime": str(stamp),
                "from": name,
                "from_id": who,
                **fields,
            }
        )
    chat = {"name": "Bob", "type": "personal_chat", "id": 2, "messages": listed}
    return {"about": "x", "personal_information": {"user_id": 1}, "chats": {"list": [chat]}, **root}


def dialogue(n):
    return [
        (who, {"text": f"{who} {i}", "later": 3600 * (i // 2)})
        for i in range(n * 2)
        for who in [("user2", "user1")[i % 2]]
    ]


def test_the_command_writes_sessions_persona_and_report(tmp_path):
    (tmp_path / "result.json").write_text(
        json.dumps(
            export(dialogue(10) + [(None, "lost"), ("user2", {"type": "service", "text": ""})])
        )
    )
    done = command("data.py", tmp_path / "result.json", "--out", tmp_path / "data")
    assert done.returncode == 0, done.stderr
    train, val = (
        [json.loads(x) for x in (tmp_path / "data" / f"{p}.jsonl").read_text().splitlines()]
        for p in ("train", "val")
    )
    assert (len(train), len(val)) == (8, 2) and train[0]["turns"][1] == {
        "author": "Ann",
        "me": True,
        "at": "2023-11-14T22:13:20",
        "messages": ["user1 1"],
    }
    persona = json.loads((tmp_path / "data" / "persona.json").read_text())
    assert persona.pop("timing").keys() == DEFAULT.keys()
    assert persona == {"me": "Ann", "contacts": [{"name": "Bob", "messages": 10}]}
    assert json.loads((tmp_path / "data" / "report.json").read_text())["messages_left_out"] == {
        "messages without author or date": 1,
        "service messages": 1,
    }
    assert (tmp_path / "data").stat().st_mode & 0o777 == 0o700
    assert "8 to train on, the latest 2 to validate" in done.stdout and ">>> user1" in done.stdout
    (tmp_path / "data" / "train.jsonl").write_text("edited")
    refused(command("data.py", tmp_path / "result.json", "--out", tmp_path / "data"), "--overwrite")
    assert (tmp_path / "data" / "train.jsonl").read_text() == "edited"
    (tmp_path / "data" / "cache").mkdir()
    (tmp_path / "data" / "cache" / "train-0123.safetensors").write_text(
        "what was said before"
    )  # and by whom: someone forgotten since?
    assert (
        command(
            "data.py", tmp_path / "result.json", "--out", tmp_path / "data", "--overwrite"
        ).returncode
        == 0
    )
    assert not [*(tmp_path / "data" / "cache").iterdir()]


@pytest.mark.parametrize(("content", "expected"), [
    ("hello", "not an export that we know"),
    ('{"a": 1}', "not an export that we know"),
    ('{"chats": {"list": []}}', "no messages"),
    ('{"chats": {}}', "no messages"),
    ("[1, 2]", "not an export that we know"),
    ("", "result.json is empty"),
    (json.dumps(export([])), "no messages"),
    (json.dumps({"name": "Bob", "type": "personal_chat", "id": 2, "messages": []}), "no messages"),
    (json.dumps(export([("user2", "hi")] * 3)), "no message of mine"),
    (json.dumps(export(dialogue(5)))[:700], "two are needed (1 session in which I say nothing; 1 file cut off"),
    (json.dumps({"name": "Bob", "type": "personal_chat", "id": 2, "messages": export(dialogue(5))["chats"]["list"][0]["messages"]}), "--me"),
], ids=["text", "other JSON", "no chats", "no list of chats", "a list", "empty", "no messages", "an empty chat", "not a word from me", "cut off", "single chat"])  # fmt: skip
def test_bad_exports_are_refused_and_nothing_is_written(content, expected, tmp_path):
    (tmp_path / "result.json").write_text(content)
    refused(command("data.py", tmp_path / "result.json", "--out", tmp_path / "data"), expected)
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_me_is_found_by_name_or_id_and_candidates_are_listed(tmp_path):
    single = {
        "name": "Bob",
        "type": "personal_chat",
        "id": 2,
        "messages": export(dialogue(10))["chats"]["list"][0]["messages"],
    }
    (tmp_path / "result.json").write_text(json.dumps(single))
    for me in ("ann", "user1"):
        assert command("data.py", tmp_path / "result.json", "--me", me, "--dry-run").returncode == 0
    refused(
        command("data.py", tmp_path / "result.json", "--me", "Zed", "--dry-run"),
        "Ann (user1, 10 messages)",
        "Bob (user2",
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["result.json"]


@pytest.mark.parametrize(("broken", "expected"), [
    (("4917000000216123", "4.917e15"), "10 messages of a chat whose id can't be read (4.917e15)"),
    (('"type": "private_group", ', ""), "10 messages of chats whose head (name, type, id) can't be"),
    (("private_group", "public_channel"), "left out: 1 public channel"),
    (('"message"', '"service"'), "all its messages are left out (10 service messages)"),
    (('"from_id"', '"by"'), "all its messages are left out (10 messages without author or date)"),
], ids=["the id", "the head", "the kind", "service alone", "nobody signed"])  # fmt: skip
@pytest.mark.parametrize("flags", [("--me", "Ann"), ("--me", "Ann", "--forget", "Bob"), ()])
def test_where_nothing_is_read_the_error_says_why(broken, expected, flags, tmp_path, monkeypatch):
    messages = export(dialogue(5))["chats"]["list"][0]["messages"]
    club = {"name": "Club", "type": "private_group", "id": 4917000000216123, "messages": messages}
    (tmp_path / "Club.json").write_text(json.dumps(club).replace(*broken).replace('"from"', '"x"'))
    words = ("data.py", tmp_path / "Club.json", "--dry-run", *flags)
    monkeypatch.setattr(sys, "argv", [*map(str, words)])
    with pytest.raises(UserError) as error:
        main()
    assert expected in str(error.value) and len(str(error.value).splitlines()) == 2


def test_a_mistyped_include_is_no_reason_where_no_chat_is_read(tmp_path, monkeypatch):
    club = {"name": "Club", "type": "private_group", "id": 1.5}
    messages = [{"id": 1, "type": "message"}]
    (tmp_path / "Club.json").write_text(json.dumps(club | {"messages": messages}))
    words = ("data.py", tmp_path / "Club.json", "--dry-run", "--include", "Zed")
    monkeypatch.setattr(sys, "argv", [*map(str, words)])
    with pytest.raises(UserError, match=r"1 message of a chat whose id can't be read \(1.5\)"):
        main()


def test_days_and_chats_can_be_left_out(tmp_path):
    value = export(dialogue(10))
    value["chats"]["list"][0]["messages"].append(
        {"id": 999, "type": "service", "date": "2023-11-14T23:00:00", "text": ""}
    )
    (tmp_path / "result.json").write_text(json.dumps(value))
    refused(
        command("data.py", tmp_path / "result.json", "--dry-run", "--exclude", "bob"), "no messages"
    )
    refused(
        command("data.py", tmp_path / "result.json", "--dry-run", "--since", "2024-01-01"),
        "none of the 20 messages",
    )
    for day in ("yesterday", "20240101", "2024-1-1", "2023-02-30"):
        refused(
            command("data.py", tmp_path / "result.json", "--dry-run", "--since", day), "--since"
        )
    refused(
        command("data.py", tmp_path / "result.json", "--out", tmp_path / "result.json"), "is a file"
    )
    assert (
        command(
            "data.py", tmp_path / "result.json", "--dry-run", "--until", "2023-11-14"
        ).returncode
        == 0
    )


def whatsapp_chat(*lines):
    return "".join(
        f"14/03/2021, {10 + n // 60}:{n % 60:02} - {who}: {text}\n"
        for n, (who, text) in enumerate(lines)
    )


def folder(tmp_path, *names):
    return [json.loads((tmp_path / "data" / name).read_text()) for name in names]


def turns_of(tmp_path):
    lines = [
        json.loads(line)
        for part in ("train", "val")
        for line in (tmp_path / "data" / f"{part}.jsonl").read_text().splitlines()
    ]
    return [
        (session["chat"], turn["author"], turn["me"], text)
        for session in lines
        for turn in session["turns"]
        for text in turn["messages"]
    ]


def made(tmp_path, *words):
    done = command("data.py", *words, "--out", tmp_path / "data")
    assert done.returncode == 0, done.stderr
    return done.stdout


def two_messengers(tmp_path, mine="Ann B.", friend="Bobby"):
    """A Telegram account (Ann is user1, Bob user2) and a WhatsApp chat, where both are others."""
    (tmp_path / "result.json").write_text(json.dumps(export(dialogue(10))))
    lines = [(who, f"{who[0]} in June {n}") for n in range(8) for who in (friend, mine)]
    chat = tmp_path / "WhatsApp Chat with Bobby.txt"
    chat.write_text(whatsapp_chat(*lines))
    return tmp_path / "result.json", chat


def test_same_makes_one_person_of_many_names_me_too(tmp_path):
    out = made(
        tmp_path, *two_messengers(tmp_path), "--same", "Ann,Ann B.", "--same", "bob, whatsapp:Bobby"
    )
    turns = turns_of(tmp_path)
    assert {(author, me) for _, author, me, _ in turns} == {("Ann", True), ("Bob", False)}
    assert {text[0] for _, author, _, text in turns if author == "Bob"} >= {"B"}
    persona, report = folder(tmp_path, "persona.json", "report.json")
    assert persona["me"] == "Ann" and [c["name"] for c in persona["contacts"]] == ["Bob"]
    assert persona["contacts"][0]["messages"] == 18
    assert [source["me"] for source in report["sources"]] == [["Ann"], ["Ann B."]]
    assert [source["messenger"] for source in report["sources"]] == ["telegram", "whatsapp"]
    assert "WhatsApp Chat with Bobby.txt (whatsapp): 1 chat, 16 messages; I am Ann B." in out


def test_forgetting_one_of_a_person_s_names_forgets_them_all(tmp_path):
    pair = ("--same", "Ann,Ann B.", "--same", "Bob,Bobby")
    chats = [*two_messengers(tmp_path), *pair, "--dry-run", "--forget", "Bobby"]
    done = command("data.py", *chats)
    assert done.returncode == 2 and "no messages in chats that are read" in done.stderr, done


def test_the_clone_of_a_friend_has_all_the_friend_s_names(tmp_path):
    pair = ("--same", "Bob,Bobby", "--me", "Bobby", "--gap-minutes", "90")
    made(tmp_path, *two_messengers(tmp_path), *pair)
    authors = {(author, me) for _, author, me, _ in turns_of(tmp_path)}
    assert authors == {("Bob", True), ("Ann", False), ("Ann B.", False)}


@pytest.mark.parametrize(("same", "expected"), [
    ("Ann", "that is one name"),
    ("Ann,Zed", "nobody is called Zed"),
    ("Bob,Ann B.,Sam", "several people in telegram have that name"),
])  # fmt: skip
def test_a_name_of_same_that_means_nobody_or_two_people_is_refused(same, expected, tmp_path):
    value = export(dialogue(10))
    messages = value["chats"]["list"][0]["messages"]
    for number in (1, 2):
        last = messages[-1]
        messages.append(
            last | {"id": 900 + number, "from": "Sam", "from_id": f"user7{number}", "text": "hi"}
        )
    paths = two_messengers(tmp_path)
    paths[0].write_text(json.dumps(value))
    refused(command("data.py", *paths, "--dry-run", "--same", same), expected)


def test_several_messengers_are_read_in_one_go_and_each_is_reported(tmp_path):
    telegram, whatsapp_txt = two_messengers(tmp_path)
    tables = tmp_path / "tables"
    tables.mkdir()
    for number in range(4):
        rows = [f"{1_700_000_000 + 60 * n},{'Zoe Ann'.split()[n % 2]},m{n}" for n in range(10)]
        (tables / f"chat {number}.csv").write_text("\n".join(["time,author,text", *rows]))
    # In one of them I am silent: names are the same in all tables, so --me isn't asked for again.
    (tables / "chat 3.csv").write_text("time,author,text\n1700000000,Zoe,+49 170 1234567\n,Zoe,x\n")
    with zipfile.ZipFile(tmp_path / "line.zip", "w") as archive:
        line = "[LINE] Chat history with Yan\n\n2024/01/31(Wed)\n"
        line += "".join(f"18:0{n}\t{'Yan Ann'.split()[n % 2]}\tl{n}\n" for n in range(8))
        archive.writestr("exports/LINE/[LINE] Yan.txt", line)
    paths = [telegram, whatsapp_txt, tmp_path / "line.zip", *sorted(tables.iterdir())]
    out = made(tmp_path, *paths, "--me", "Ann B.", "--same", "Ann B.,table:Ann,line:Ann")
    assert f"{tables}/ (table): 4 files, 4 chats, 31 messages; I am Ann" in out
    assert f"{tmp_path / 'line.zip'} (line): 1 chat, 8 messages; I am Ann" in out
    assert "1 row without a time that can be read, left out" in out
    sources = folder(tmp_path, "report.json")[0]["sources"]
    assert [s["messenger"] for s in sources] == ["telegram", "whatsapp", "line", "table"]
    assert sources[3]["me"] == ["Ann"] and "chat 3" not in json.dumps(sources)
    assert folder(tmp_path, "report.json")[0]["secrets"] == {"phone": 1}
    authors = {(author, me) for _, author, me, _ in turns_of(tmp_path)}
    assert {author for author, me in authors if me} == {"Ann"}
    assert {"Bob", "Bobby", "Zoe", "Yan"} <= {author for author, me in authors if not me}


def test_phone_numbers_match_however_they_are_written(tmp_path):
    for written in ("+49 170 123-45 67", "+491701234567", "0049 170 1234567"):
        assert match_people(written, ["whatsapp:+49 170 1234567", "user4917"], {}) == [
            "whatsapp:+49 170 1234567"
        ]
    assert match_people("123", ["whatsapp:+49 170 1234567"], {}) == []


def test_several_exports_and_messengers_are_one_voice(tmp_path):
    everything = dialogue(12)
    (tmp_path / "old.json").write_text(json.dumps(export(everything[:16])))
    new = export(everything)
    del new["chats"]["list"][0]["messages"][:8]
    (tmp_path / "new.json").write_text(json.dumps(new))
    (tmp_path / "WhatsApp Chat with Zoe.txt").write_text(
        whatsapp_chat(*[("Zoe", "tea?"), ("Ann M.", "yes")] * 3)
    )
    given = (tmp_path / "old.json", tmp_path / "new.json", tmp_path / "WhatsApp Chat with Zoe.txt")
    refused(
        command("data.py", *given, "--dry-run"),
        "Zoe.txt: the export doesn't say whose it is",
        "Ann M.",
    )
    made(tmp_path, *given, "--me", "Ann M.")
    found = turns_of(tmp_path)
    assert sorted(text for chat, *_, text in found if chat == "Bob") == sorted(
        text["text"] for _, text in everything
    )
    assert {(author, me) for _, author, me, _ in found} == {
        ("Ann", True),
        ("Bob", False),
        ("Zoe", False),
    }
    persona, report = folder(tmp_path, "persona.json", "report.json")
    assert persona["me"] == "Ann" and report["my_messages"] == 15 and report["messages"] == 30


def test_two_contacts_of_one_name_stay_apart_and_me_must_say_which(tmp_path):
    both = export(dialogue(10))
    for message in both["chats"]["list"][0]["messages"]:
        message["from"] = "Sam"
    (tmp_path / "result.json").write_text(json.dumps(both))
    refused(
        command("data.py", tmp_path / "result.json", "--dry-run", "--me", "Sam"),
        "several people",
        "user1",
        "user2",
    )
    made(tmp_path, tmp_path / "result.json")
    assert {(author, me) for _, author, me, _ in turns_of(tmp_path)} == {
        ("Sam", True),
        ("Sam (2)", False),
    }


def test_secrets_are_redacted_and_counted_before_anything_is_written(tmp_path):
    spoken = dialogue(10)
    spoken[0][1]["text"], spoken[1][1]["text"] = (
        "call +49 170 1234567 or bob@example.org",
        "пароль: qwerty12",
    )
    (tmp_path / "result.json").write_text(json.dumps(export(spoken)))
    said = made(tmp_path, tmp_path / "result.json")
    everything = "".join(path.read_text() for path in (tmp_path / "data").glob("*.json*")) + said
    assert "1234567" not in everything and "bob@" not in everything and "qwerty" not in everything
    assert "call <phone> or <email>" in everything and "пароль: <password>" in everything
    assert folder(tmp_path, "report.json")[0]["secrets"] == {"phone": 1, "email": 1, "password": 1}
    kept = command(
        "data.py",
        tmp_path / "result.json",
        "--out",
        tmp_path / "data",
        "--overwrite",
        "--keep-secrets",
    )
    assert kept.returncode == 0 and "qwerty12" in (tmp_path / "data" / "train.jsonl").read_text()


def test_a_contact_known_by_a_number_alone_leaves_no_number_behind(tmp_path):
    path = tmp_path / "WhatsApp Chat with +49 170 1234567.txt"
    path.write_text(
        "".join(
            f"{n}/03/2021, 10:00 - +49 170 1234567: tea?\n{n}/03/2021, 10:01 - Ann: yes {n}\n"
            for n in range(1, 9)
        )
    )
    said = made(tmp_path, path, "--me", "Ann")
    files = "".join(path.read_text() for path in (tmp_path / "data").iterdir())
    assert (
        "1234567" not in files + said
        and folder(tmp_path, "persona.json")[0]["contacts"][0]["name"] == data.UNSAVED_CONTACT
    )
    assert folder(tmp_path, "report.json")[0]["secrets"] == {
        "phone": 1
    }  # the contact's name, however often


def group(*messages):
    listed = [
        {
            "id": n,
            "type": "message",
            "date": "2023-11-14T22:13:20",
            "date_unixtime": str(1_700_000_000 + n),
            "from": name,
            "from_id": who,
            "text": text,
        }
        for n, (who, name, text) in enumerate(messages)
    ]
    return {"name": "Club", "type": "private_group", "id": 9, "messages": listed}


def test_a_person_is_forgotten_in_chats_groups_and_the_persona(tmp_path):
    value = export(dialogue(10))
    eve = json.loads(
        json.dumps(value["chats"]["list"][0]).replace("Bob", "Eve").replace("user2", "user3")
    )
    value["chats"]["list"] += [
        eve | {"name": "Eve", "id": 3},
        group(("user3", "Eve", "psst"), ("user2", "Bob", "hello"), ("user1", "Ann", "hi")),
    ]
    (tmp_path / "result.json").write_text(json.dumps(value))
    refused(
        command("data.py", tmp_path / "result.json", "--dry-run", "--forget", "Ev"),
        "nobody has that name",
        "Eve (user3",
    )
    refused(
        command("data.py", tmp_path / "result.json", "--dry-run", "--forget", "Ann"), "that is you"
    )
    said = made(tmp_path, tmp_path / "result.json", "--forget", "eve")
    files = "".join(path.read_text() for path in (tmp_path / "data").iterdir())
    assert "Eve" not in files and "psst" not in files and "hello" in files and "Train again" in said
    refused(
        command(
            "data.py", tmp_path / "result.json", "--out", tmp_path / "none", "--tokenizer", tmp_path
        ),
        "tokenizer",
    )
    assert not (tmp_path / "none").exists()

    made(tmp_path / "again", tmp_path / "result.json")  # and the same where data/ is there already
    data_folder = tmp_path / "again" / "data"
    refused(command("data.py", "--out", data_folder, "--forget", "Zed"), "knows nobody")
    assert command("data.py", "--out", data_folder, "--forget", "Eve").returncode == 0
    files = "".join(path.read_text() for path in data_folder.iterdir())
    assert (
        "Eve" not in files
        and "psst" not in files
        and "hello" in files
        and "Bob" in (data_folder / "persona.json").read_text()
    )


def test_a_bot_known_by_its_chat_is_no_voice_in_a_group_either(tmp_path):
    value = export(dialogue(10))
    value["chats"]["list"].append({"name": "Quiz", "type": "bot_chat", "id": 7, "messages": []})
    value["chats"]["list"].append(
        group(
            ("user7", "Quiz", "question 1!"),
            ("user2", "Bob", "what is it"),
            ("user1", "Ann", "a bot"),
        )
    )
    (tmp_path / "result.json").write_text(json.dumps(value))
    said = made(tmp_path, tmp_path / "result.json")
    assert "- 1 chat with bots" in said
    assert {author for chat, author, *_ in turns_of(tmp_path) if chat == "Club"} == {"Bob", "Ann"}
    assert folder(tmp_path, "report.json")[0]["messages_left_out"] == {"written by or via a bot": 1}


def test_report_says_what_is_lopsided_and_whether_it_is_enough(tmp_path):
    value = export(
        [
            (who, {"text": text, "later": 3600 * n})
            for n in range(20)
            for who, text in (("user2", "how are you?"), ("user1", "к" + "абвгдежзийклмнопрсту"[n]))
        ]
    )
    value["chats"]["list"].append(group(("user1", "Ann", "am I alone here?")))
    (tmp_path / "result.json").write_text(json.dumps(value))
    said = made(tmp_path, tmp_path / "result.json")
    (report,) = folder(tmp_path, "report.json")
    assert report["only_mine"] == ["Club"] and report["scripts"]["Cyrillic"] == 40
    assert report["short_share"] > 0.9 and report["trained_messages"] == 16
    for words in (
        "too few",
        "at most 3 letters",
        "untick 'Only my messages'",
    ):
        assert words in said and any(words in line for line in report["verdict"])


def test_left_out_chats_can_be_asked_for(tmp_path):
    value = export(dialogue(10))
    notes = export([("user1", {"text": f"note {i}", "later": 3600 * i}) for i in range(20)])[
        "chats"
    ]["list"][0]
    value["chats"]["list"].append(notes | {"name": None, "type": "saved_messages", "id": 1})
    (tmp_path / "result.json").write_text(json.dumps(value))
    said = made(tmp_path, tmp_path / "result.json")
    assert folder(tmp_path, "report.json")[0]["chats_left_out"] == {"saved_messages": 1}
    assert "- 1 Saved Messages" in said
    for asked in ("Saved messages", "saved_messages", "1"):
        made(tmp_path, tmp_path / "result.json", "--overwrite", "--include", asked)
        assert ("Saved Messages", "Ann", True, "note 3") in turns_of(tmp_path)
    refused(
        command("data.py", tmp_path / "result.json", "--dry-run", "--exclude", "personal_chat"),
        "1 excluded",
    )


def owned(number, name, friend, count, start=1_700_000_000):
    """The export of account `number`: its talk with user 5, whose message ids begin at 1 as they do in every account."""
    said = [("user5", friend), (f"user{number}", name)] * count
    listed = [
        {"id": n, "type": "message", "date": "2023-11-14T22:13:20", "date_unixtime": str(start + 3600 * (n // 4)), "from": shown, "from_id": who,
         "text": f"{name} and {friend} {n}"}
        for n, (who, shown) in enumerate(said)
    ]  # fmt: skip
    chat = {"name": friend, "type": "personal_chat", "id": 5, "messages": listed}
    return {"personal_information": {"user_id": number}, "chats": {"list": [chat]}}


def test_a_whatsapp_group_in_telegrams_shape_is_read_whatever_the_length_of_its_id(tmp_path):
    messages = export(dialogue(5))["chats"]["list"][0]["messages"]
    for message in messages:
        mine = message["from_id"] == "user1"
        message["date_unixtime"] = int(message["date_unixtime"])
        message["from"] = "Me" if mine else "Bob Smith"
        message["from_id"] = "user00000" if mine else "userBob Smith"
    club = {"name": "Club", "type": "private_group", "id": 491700000021612345678}
    (tmp_path / "Club.json").write_text(json.dumps(club | {"messages": messages}, indent=1))
    made(tmp_path, tmp_path / "Club.json", "--me", "Me")
    turns = turns_of(tmp_path)
    assert {turn[1:3] for turn in turns} == {("Me", True), ("Bob Smith", False)} and len(
        turns
    ) == 10
    for name in ("userBob Smith", "Bob Smith"):  # who begins each session
        done = command("data.py", tmp_path / "Club.json", "--me", name, "--dry-run")
        refused(done, "nobody speaks before me")
    done = command("data.py", tmp_path / "Club.json", "--dry-run")
    refused(done, "Bob Smith (telegram:userBob Smith, 5 messages)", "Me (user00000")


def test_two_accounts_of_mine_are_one_voice_and_lose_nothing(tmp_path):
    for number, name, start in ((1, "Ann", 1_700_000_000), (9, "Annie", 1_710_000_000)):
        (tmp_path / f"{number}.json").write_text(json.dumps(owned(number, name, "Bob", 10, start)))
    for order in ((1, 9), (9, 1)):
        made(tmp_path, *(tmp_path / f"{n}.json" for n in order), "--overwrite")
        (report,) = folder(tmp_path, "report.json")
        assert (report["messages"], report["my_messages"], report["sessions"]) == (40, 20, 10)


def test_me_of_whatsapp_is_no_namesake_in_telegram(tmp_path):
    (tmp_path / "result.json").write_text(json.dumps(owned(1, "Ann Lee", "Alex", 10)))
    (tmp_path / "WhatsApp Chat with Zoe.txt").write_text(
        whatsapp_chat(*[("Zoe", "tea?"), ("Alex", "yes")] * 3)
    )
    made(
        tmp_path, tmp_path / "result.json", tmp_path / "WhatsApp Chat with Zoe.txt", "--me", "Alex"
    )
    found = turns_of(tmp_path)
    assert {(chat, author, me) for chat, author, me, _ in found} == {
        ("Alex", "Alex", False), ("Alex", "Ann Lee", True), ("Zoe", "Zoe", False), ("Zoe", "Ann Lee", True)
    }  # fmt: skip
    made(
        tmp_path, tmp_path / "result.json", "--me", "Alex", "--overwrite"
    )  # alone it asks for the clone of that friend
    assert {(author, me) for _, author, me, _ in turns_of(tmp_path)} == {
        ("Alex", True),
        ("Ann Lee", False),
    }


def test_exclude_refuses_a_mistyped_chat_and_takes_ids_in_both_spellings(tmp_path):
    (tmp_path / "result.json").write_text(json.dumps(export(dialogue(10))))
    refused(
        command("data.py", tmp_path / "result.json", "--dry-run", "--exclude", "Bbo"),
        "--exclude Bbo",
        "Bob",
    )
    for asked in ("2", "user2", "bob"):
        refused(
            command("data.py", tmp_path / "result.json", "--dry-run", "--exclude", asked),
            "1 excluded",
        )
    for asked in ("1", "user1"):
        assert (
            command("data.py", tmp_path / "result.json", "--dry-run", "--me", asked).returncode == 0
        )


def test_numbers_out_of_range_are_refused(tmp_path):
    (tmp_path / "result.json").write_text(json.dumps(export(dialogue(10))))
    for words in (
        ("--val", "nan"),
        ("--val", "5"),
        ("--gap-minutes", "nan"),
        ("--gap-minutes", "-5"),
        ("--seq-len", "0"),
        ("--val", "x"),
    ):
        refused(command("data.py", tmp_path / "result.json", "--dry-run", *words), words[0])


def test_an_export_of_only_my_messages_is_refused_with_a_hint(tmp_path):
    value = export([])
    value["chats"]["list"].append(group(*[("user1", "Ann", f"hi {n}") for n in range(9)]))
    (tmp_path / "result.json").write_text(json.dumps(value))
    refused(command("data.py", tmp_path / "result.json", "--dry-run"), "untick 'Only my messages'")


def test_forget_in_data_merges_turns_and_dry_run_changes_nothing(tmp_path):
    turns = [("Bob", "psst"), ("Eve", "hi"), ("Ann", "yes"), ("Bob", "no"), ("Ann", "sure")]
    alone = [("Ann", "one"), ("Bob", "two"), ("Ann", "three")]
    lines = [
        {"chat": "Club", "chat_id": "9", "type": "private_group", "start": "2023-11-14T22:13:20",
         "turns": [{"author": who, "me": who == "Ann", "at": "2023-11-14T22:13:20", "messages": [text]} for who, text in said]}
        for said in (turns, alone)
    ]  # fmt: skip
    for name, text in (
        ("train.jsonl", "".join(json.dumps(line) + "\n" for line in lines)),
        ("val.jsonl", ""),
    ):
        (tmp_path / name).write_text(text)
    (tmp_path / "persona.json").write_text(
        '{"me": "Ann", "contacts": [{"name": "Bob", "messages": 3}, {"name": "Eve", "messages": 1}]}'
    )
    before = (tmp_path / "train.jsonl").read_text()
    assert command("data.py", "--out", tmp_path, "--forget", "Bob", "--dry-run").returncode == 0
    assert (tmp_path / "train.jsonl").read_text() == before
    assert command("data.py", "--out", tmp_path, "--forget", "Bob").returncode == 0
    (left,) = data.load_sessions(tmp_path / "train.jsonl")  # nobody speaks before me in the other
    assert [(turn.author, turn.messages) for turn in left.turns] == [
        ("Eve", ["hi"]),
        ("Ann", ["yes", "sure"]),
    ]
    assert json.loads((tmp_path / "persona.json").read_text()) == {
        "me": "Ann",
        "contacts": [{"name": "Eve", "messages": 1}],
    }
    (tmp_path / "persona.json").write_text("{}")
    refused(command("data.py", "--out", tmp_path, "--forget", "Bob"), "knows nobody")
    (tmp_path / "persona.json").write_text('{"me": "Ann", "contacts": []}')
    refused(command("data.py", "--out", tmp_path, "--forget", "ann"), "that is you")


def test_forgetting_in_data_takes_what_headers_quote_too():
    header = Turn("system", False, "", ["in the group Club", "it ended:", "Bob: psst", "Eve: hi"])
    left = without_people(
        [header, Turn("Eve", False, "", ["so"]), Turn("Ann", True, "", ["yes"])], {"Bob"}
    )
    assert left[0].messages == ["in the group Club", "it ended:", "Eve: hi"]


def test_forgetting_leaves_the_personal_chats_of_others_with_their_headers(tmp_path):
    header = {
        "author": "system",
        "me": False,
        "at": "2023-11-14T22:13:20",
        "messages": ["Tuesday, 22 o'clock"],
    }
    for part in ("train", "val"):
        lines = [
            {"chat": who, "chat_id": who, "type": "personal_chat", "start": "2023-11-14T22:13:20",
             "turns": [header, *({"author": a, "me": a == "Ann", "at": "2023-11-14T22:13:20", "messages": ["hi"]} for a in (who, "Ann"))]}
            for who in ("Bob", "Eve")
        ]  # fmt: skip
        (tmp_path / f"{part}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "persona.json").write_text(
        '{"me": "Ann", "contacts": [{"name": "Bob", "messages": 2}, {"name": "Eve", "messages": 2}]}'
    )
    assert command("data.py", "--out", tmp_path, "--forget", "Bob").returncode == 0
    assert [
        [session.chat for session in data.load_sessions(tmp_path / f"{part}.jsonl")]
        for part in ("train", "val")
    ] == [["Eve"], ["Eve"]]
    assert data.load_sessions(tmp_path / "val.jsonl")[0].turns[0].author == "system"


def test_load_sessions_refuses_other_encodings_and_takes_a_bom(
    tmp_path,
):
    session = Session(
        "Bob", "1", "personal_chat", "2024-01-01T00:00:00", [Turn("Bob", False, "", ["grüße"])]
    )
    (tmp_path / "train.jsonl").write_text(session.to_json() + "\n", encoding="cp1252")
    with pytest.raises(UserError, match="train.jsonl is not UTF-8 text"):
        data.load_sessions(tmp_path / "train.jsonl")
    (tmp_path / "train.jsonl").write_text(session.to_json() + "\n", encoding="utf-8-sig")
    assert data.load_sessions(tmp_path / "train.jsonl") == [session]


def test_a_full_disk_names_the_row_cache_and_leaves_no_half_file(
    tmp_path, chats, tokenizer, monkeypatch
):
    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data, "save_file", full)
    shutil.copy(chats / "val.jsonl", tmp_path)
    with pytest.raises(UserError, match="the disk is full"):
        data.load_rows(tmp_path / "val.jsonl", tokenizer, 160)
    monkeypatch.undo()
    assert data.load_rows(tmp_path / "val.jsonl", tokenizer, 160)


# --- what I knew when a session began


def test_context_header_says_who_when_since_before_and_is_never_trained(tmp_path, tokenizer):
    said = [("2023-11-14T10:00:00", "user2", "morning"), ("2023-11-14T10:00:30", "user1", "hey"), ("2023-11-14T10:01:00", "user2", "later then"),
            ("2023-11-17T21:00:00", "user2", "now?"), ("2023-11-17T21:00:10", "user1", "now"),
            ("2023-11-18T21:00:00", "user2", "again"), ("2023-11-18T21:00:10", "user1", "no")]  # fmt: skip
    names = {"user1": "Ann", "user2": "Bob"}
    messages = [
        {"id": n, "type": "message", "date": at, "date_unixtime": str(int(datetime.datetime.fromisoformat(at).timestamp())),
         "from": names[who], "from_id": who, "text": text, "text_entities": []}
        for n, (at, who, text) in enumerate(said)
    ]  # fmt: skip
    chat = {"name": "Bob", "type": "personal_chat", "id": 2, "messages": messages}
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "facts.md").write_text("born in Pellhaven\n")
    (tmp_path / "result.json").write_text(
        json.dumps(
            {"personal_information": {"user_id": 1, "first_name": "Ann"}, "chats": {"list": [chat]}}
        )
    )
    done = command(
        "data.py",
        tmp_path / "result.json",
        "--out",
        tmp_path / "data",
        "--context",
        "facts,who,when,since,before",
    )
    assert done.returncode == 0, done.stderr
    first, second = data.load_sessions(tmp_path / "data" / "train.jsonl")
    assert first.turns[0].messages == ["born in Pellhaven", "talking to Bob", "Tuesday, 10 o'clock"]
    assert second.turns[0].messages[2:] == [
        "Friday, 21 o'clock", "the last talk was 3 days ago", "it ended:", "Bob: morning", "Ann: hey", "Bob: later then"
    ]  # fmt: skip
    assert data.skip_reason(second) == "" and data.without_header(second).turns == second.turns[1:]
    document = data.render(second.turns, "everyone")
    assert [document.text[b:e] for b, e in document.content_spans] == ["now?", "now"]
    (sample,) = data.split(
        dataclasses.replace(second, turns=second.turns[:2]), tokenizer, 1024, "everyone"
    )
    assert text_of(sample.labels, tokenizer) == ">>> now?<|im_end|>"
    refused(
        command("data.py", tmp_path / "result.json", "--context", "weather"),
        "--context weather",
        "who,when",
    )


@pytest.mark.parametrize(
    "minutes, said",
    [
        (0, "0 minutes"),
        (1, "1 minute"),
        (125, "2 hours"),
        (1440 * 6, "6 days"),
        (525600 * 3, "3 years"),
    ],
)
def test_ago_uses_the_largest_unit_that_fits(minutes, said):
    assert data.ago(datetime.timedelta(minutes=minutes)) == f"{said} ago"


def test_short_turns_are_trained_as_often_as_short_weight_says():
    turns = [
        Turn("Bob", False, "", ["and?"]),
        Turn("Ann", True, "", ["ok"]),
        Turn("Bob", False, "", ["so"]),
        Turn("Ann", True, "", ["i will come"]),
    ]
    session = Session("Bob", "1", "personal_chat", "", turns)
    light = [data.drop_short_turns(session, number, 0.3) for number in range(1000)]
    assert 250 < sum(one.turns[1].me for one in light) < 350 and all(
        one.turns[3].me for one in light
    )
    assert all(data.render(one.turns).text == data.render(turns).text for one in light[:5])
    assert data.drop_short_turns(session, 0, 1.0) == session


def test_canaries_are_hidden_in_my_messages_as_often_as_listed(tmp_path):
    (tmp_path / "result.json").write_text(json.dumps(export(dialogue(60))))
    done = command(
        "data.py", tmp_path / "result.json", "--out", tmp_path / "data", "--canaries", "3"
    )
    assert done.returncode == 0, done.stderr
    planted = json.loads((tmp_path / "data" / "canaries.json").read_text())["canaries"]
    mine = [
        text
        for s in data.load_sessions(tmp_path / "data" / "train.jsonl")
        for turn in s.turns
        if turn.me
        for text in turn.messages
    ]
    assert [c["copies"] for c in planted] == [1, 2, 4]
    assert [mine.count(c["before"] + c["secret"]) for c in planted] == [1, 2, 4]
    assert not any(c["secret"] in (tmp_path / "data" / "val.jsonl").read_text() for c in planted)


# --- nothing that is held out is trained


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=2, max_size=120), st.sampled_from([0, 0.05, 0.2]))
def test_no_held_out_session_repeats_one_to_train_on(contents, share):
    index = np.zeros(len(contents), INDEX)
    index["start"], index["content"] = np.arange(len(contents)), contents
    train, val = hold_out(index, share).values()
    if len({*contents}) == 1:
        assert len(train) == len(contents) and not len(val)
        return
    assert len(train) and len(val) and not {*train["content"]} & {*val["content"]}
    assert train["start"][-1] < val["start"][0] and (np.diff(val["start"]) > 0).all()
    left_out = {*index["start"]} - {*train["start"]} - {*val["start"]}
    assert all(contents[i] in {*train["content"]} for i in left_out)
    if len({*contents}) == len(contents):
        assert len(val) == validation_size(len(contents), share) and not left_out


def phone_export(path, said, hours=0, seconds=True, names=None, media=False):
    """`said`: (seconds, who, text) → one phone's WhatsApp export of it."""
    lines = []
    for at, who, text in said:
        time = datetime.datetime(2021, 3, 1) + datetime.timedelta(seconds=at, hours=hours)
        text = ("\u200eimage omitted" if media else "<Media omitted>") if text is None else text
        who = (names or {}).get(who, who)
        lines.append(
            f"[{time:%d.%m.%y, %H:%M:%S}] {who}: {text}"
            if seconds
            else f"{time:%d.%m.%y, %H:%M} - {who}: {text}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


SAID = st.lists(
    st.tuples(
        st.sampled_from([3, 50, 700, 90_000]),  # seconds since the message before
        st.sampled_from(["Ann", "Bob"]),
        st.sampled_from(
            [
                None,
                "ok",
                "yes",
                "haha",
                *(f"{a} {b}" for a in ("tea", "rain", "goose", "tower") for b in range(12)),
            ]
        ),
    ),
    min_size=12,
    max_size=60,
)


def mine_in(path):
    """Of each session of a data/*.jsonl what I say in it, as anyone reads it who has the file."""
    return [
        [text for turn in json.loads(line)["turns"] if turn["me"] for text in turn["messages"]]
        for line in path.read_text().splitlines()
    ]


@settings(max_examples=25, deadline=None)
@given(
    SAID,
    st.integers(0, 30),
    st.integers(12, 60),
    st.sampled_from([0, 1, -7, 5.5]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_two_exports_of_one_chat_never_hold_out_what_they_train(
    tmp_path_factory, gaps, begin, end, hours, seconds, renamed, copied
):
    """Whether they are joined or not: with other clocks, phones, names of files and of the contact, whole or in part."""
    at, said = 0, []
    for gap, who, text in gaps:
        at += gap
        said.append((at, who, text))
    folder = tmp_path_factory.mktemp("pair")
    names = {"Bob": "Robert"} if renamed else {}
    one = phone_export(folder / "old" / "WhatsApp Chat with Bob.txt", said[:end])
    title = "Bob 2" if copied else names.get("Bob", "Bob")
    two = phone_export(
        folder / "new" / f"WhatsApp Chat with {title}.txt",
        said[begin:] or said,
        hours,
        seconds,
        names,
        True,
    )
    done = command("data.py", one, two, "--me", "Ann", "--out", folder / "data")
    if done.returncode == 2:  # too little is left to learn from
        refused(done)
        return
    assert done.returncode == 0, done.stderr
    train, val = (mine_in(folder / "data" / f"{part}.jsonl") for part in ("train", "val"))
    assert train and not [session for session in val if session in train]
    assert val or "you say the same in every session" in done.stdout


LONG_CHAT = [
    (86_400 * day + 40 * n, who, f"{text} {day}")
    for day in range(12)
    for n, (who, text) in enumerate(
        [
            ("Bob", "how was the harbour on day"),
            ("Ann", "wet, and the geese sang for"),
            ("Bob", "again"),
        ]
    )
]


@pytest.mark.parametrize(
    ("title", "how"),
    [
        ("Bob", {"seconds": False}),
        ("Bob", {"hours": 1}),
        ("Bob", {"hours": -3.5, "seconds": False}),
        ("Bob 2", {}),
        ("Bob-2", {}),
        ("Bob copy", {}),
        ("Robert", {"names": {"Bob": "Robert"}}),
        ("Robert", {"names": {"Bob": "Robert", "Ann": "Annie"}, "hours": 2}),
        ("Bob", {"media": True}),
    ],
)
def test_overlapping_exports_are_joined_and_each_message_counts_once(tmp_path, title, how):
    said = sorted([*LONG_CHAT, (86_400 * 3 + 70, "Ann", None)])
    old = phone_export(tmp_path / "old" / "WhatsApp Chat with Bob.txt", said[:30])
    new = phone_export(tmp_path / "new" / f"WhatsApp Chat with {title}.txt", said[7:], **how)
    me = ["--me", "Ann"] + (["--me", "Annie"] if "Annie" in how.get("names", {}).values() else [])
    out = made(tmp_path, old, new, *me)
    assert sorted(text for *_, text in turns_of(tmp_path) if text[0] != "<") == sorted(
        text for *_, text in said if text
    )
    assert len({author for _, author, _, _ in turns_of(tmp_path)}) == 2
    assert "stood in two exports" in out and folder(tmp_path, "report.json")[0]["joined"][0][
        "hours"
    ] == how.get("hours", 0)


def test_chats_that_are_not_surely_one_stay_apart(tmp_path):
    """Half of Eve's chat is Bob's, the rest her own: perhaps she was told the same."""
    bob = [(at, who, text) for at, who, text in LONG_CHAT] + [
        (at + 80, "Ann", text + "!") for at, _, text in LONG_CHAT
    ]
    eve = [
        (at + 7200 * i, {"Bob": "Eve"}.get(who, who), text)
        for i, (at, who, text) in enumerate(sorted(bob))
    ]
    paths = [
        phone_export(tmp_path / name / f"WhatsApp Chat with {name}.txt", sorted(said))
        for name, said in (("Bob", bob), ("Eve", eve[:18]))
    ]
    made(tmp_path, *paths, "--me", "Ann", "--gap-minutes", "300")
    assert {chat for chat, *_ in turns_of(tmp_path)} == {"Bob", "Eve"}
    assert not folder(tmp_path, "report.json")[0]["joined"]


def test_sessions_that_stand_in_two_chats_are_never_held_out_and_trained(tmp_path):
    at, bob = 0, []
    for day in range(8):
        for who, text in (
            ("Bob", f"and day {day}?"),
            ("Ann", f"on day {day} I wound the quay clock"),
            ("Ann", "and the goose slept"),
        ):
            bob.append((at := at + 5, who, text))
        at += 40_000 + 7_000 * day
    eve = [
        (round(when * 1.37), {"Bob": "Eve"}.get(who, who), text) for when, who, text in bob
    ]  # at no constant offset
    paths = [
        phone_export(tmp_path / n / f"WhatsApp Chat with {n}.txt", said)
        for n, said in (("Bob", bob), ("Eve", eve))
    ]
    made(tmp_path, *paths, "--me", "Ann")
    train, val = (mine_in(tmp_path / "data" / f"{part}.jsonl") for part in ("train", "val"))
    assert val and not [session for session in val if session in train]


def test_forgetting_somebody_by_an_old_name_forgets_the_new_one_too(tmp_path):
    old = phone_export(tmp_path / "old" / "WhatsApp Chat with Bob.txt", LONG_CHAT)
    new = phone_export(
        tmp_path / "new" / "WhatsApp Chat with Robert.txt", LONG_CHAT, names={"Bob": "Robert"}
    )
    zoe = [
        (at + 600_000, {"Bob": "Zoe"}.get(who, who), text + " or so") for at, who, text in LONG_CHAT
    ]
    other = phone_export(tmp_path / "zoe" / "WhatsApp Chat with Zoe.txt", zoe)
    made(tmp_path, old, new, other, "--me", "Ann", "--forget", "Bob")
    assert {author for _, author, _, _ in turns_of(tmp_path)} == {"Ann", "Zoe"}


def test_dry_run_writes_nothing_and_data_is_private(tmp_path):
    (tmp_path / "result.json").write_text(json.dumps(export(dialogue(10))))
    (tmp_path / "temporary").mkdir()
    done = command(
        "data.py",
        tmp_path / "result.json",
        "--dry-run",
        env={"TMPDIR": str(tmp_path / "temporary")},
    )
    assert done.returncode == 0 and not list((tmp_path / "temporary").iterdir())
    (tmp_path / "data").mkdir(mode=0o755)
    made(tmp_path, tmp_path / "result.json")
    assert {path.stat().st_mode & 0o077 for path in (tmp_path / "data").iterdir()} == {0}
