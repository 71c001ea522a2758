"""Signal Desktop's chats as sigtop and signal-export write them. Every file here is invented."""

import collections
import datetime
import json
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_damage import MUTANTS, damaged

import exports
from cli import UserError
from exports import Reason, signal

AT = 1_700_000_000
BOB = "Bob (+4915100)"
PEOPLE = ("You", BOB, "Cy (cy.01)")


def sigtop(*messages, conversation="Us (group)"):
    return f"Conversation: {conversation}\n\n" + "".join(messages)


def when(at):
    return datetime.datetime.fromtimestamp(at, datetime.UTC).strftime(
        "%a, %-d %b %Y %H:%M:%S +0000"
    )


def message(author, text, second=0, kind=None, fields=""):
    kind = kind or ("outgoing" if author == "You" else "incoming")
    head = f"From: {author}\n" if author else ""
    head += f"Type: {kind}\nSent: {when(AT + second)}\n"
    if author != "You":
        head += f"Received: {when(AT + second + 1)}\n"
    return head + fields + (f"\n{text}\n" if text else "") + "\n"


def read(path, repairs=None):
    return [(chat, list(messages)) for chat, messages in exports.read(path, repairs)]


def one(tmp_path, text):
    path = tmp_path / "Us (group).txt"
    path.write_text(text, encoding="utf-8")
    ((_, (found,)),) = read(path)
    return found


LETTERS = st.characters(exclude_categories=("Cs", "Cc")) | st.just("\n") | st.just("\n\n\n")
TEXT = st.lists(LETTERS, min_size=1).map("".join)
WRITTEN = st.lists(
    st.tuples(TEXT.map(str.strip).filter(bool), st.sampled_from(PEOPLE), st.integers(0, 10**6)),
    min_size=1,
)


@settings(max_examples=60, deadline=None)
@given(WRITTEN)
def test_sigtop_text_comes_back_with_author_order_and_time(tmp_path_factory, written):
    path = tmp_path_factory.getbasetemp() / "sigtop.txt"
    written = sorted(written, key=lambda row: row[2])
    text = sigtop(*(message(who, said, second) for said, who, second in written))
    path.write_text(text, encoding="utf-8", newline="")
    ((chat, messages),) = read(path)
    assert (chat.name, chat.type, chat.owner) == ("Us", "private_group", signal.ME)
    names = {"You": "Me", BOB: "Bob", "Cy (cy.01)": "Cy"}
    expected = [(AT + second, names[who], said) for said, who, second in written]
    assert [(m.at, m.name, m.text) for m in messages] == expected
    assert all((m.author == signal.ME) == (m.name == "Me") for m in messages)


@pytest.mark.parametrize(
    ("written", "text", "left_out"),
    [
        (message(BOB, "> From: You\n> Sent: x\n>\n> old\n\nnew"), "new", ""),
        (message(BOB, "> my own arrow"), "> my own arrow", ""),
        (message(BOB, "one\n\n\ntwo\nFrom: here"), "one\n\n\ntwo\nFrom: here", ""),
        (message(BOB, "hi", fields="Reaction: x from You\n"), "hi", ""),
        (message(BOB, "", fields="Attachment: a.jpg (image/jpeg, 5 bytes)\n"), "<photo>", ""),
        (message(BOB, "", fields="Attachment: no filename (audio/aac, 5 bytes)\n"), "<voice>", ""),
        (message(BOB, "look", fields="Attachment: a.pdf (application/pdf, 5 bytes)\n"), "look", ""),
        (message(BOB, ""), "", Reason.NO_TEXT),
        (message(None, "", kind="group-v2-change"), "", Reason.SERVICE),
        (message(BOB, "", kind="call-history"), "", Reason.SERVICE),
        (message(BOB, "mine?", kind="outgoing"), "", Reason.NO_AUTHOR),
        (message("You", "theirs?", kind="incoming"), "", Reason.NO_AUTHOR),
    ],
)
def test_what_becomes_of_a_message(tmp_path, written, text, left_out):
    found = one(tmp_path, sigtop(written))
    assert (found.text, found.left_out) == (text, left_out)


def test_an_edited_message_has_its_latest_text(tmp_path):
    versions = f"| Version: 2\n| Sent: {when(AT)}\n|\n| new\n| text\n|\n| Version: 1\n| Sent: {when(AT)}\n|\n| old"
    found = one(tmp_path, sigtop(message("You", versions, fields="Edited: 2 versions\n")))
    assert found.text == "new\ntext"


def test_local_time_is_as_sigtop_wrote_it(tmp_path):
    written = message(BOB, "hi").replace("+0000", "+0530")
    found = one(tmp_path, sigtop(written))
    assert (found.at, found.date) == (AT - 19_800, exports.iso_time(AT))


def test_sigtops_json_is_refused_in_two_lines(tmp_path):
    path = tmp_path / "Bob.json"
    path.write_text('[\n{"conversationId":"x","sendStateByConversationId":{}}\n]\n')
    with pytest.raises(UserError, match="lacks text"):
        read(path)


def export_json(path, *messages):
    """A data.json; a message is (sender, body, more)."""
    path.parent.mkdir(exist_ok=True)
    lines = []
    for i, (sender, body, more) in enumerate(messages):
        raw = {"date": exports.iso_time(AT + i), "sender": sender, "body": body, "quote": ""}
        raw |= {"sticker": None, "reactions": [], "attachments": []} | more
        lines.append(json.dumps(raw, ensure_ascii=False))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_signal_export_has_a_folder_for_each_chat(tmp_path):
    export_json(tmp_path / "BobSmith" / "data.json", ("BobSmith", "hi  ", {}), ("Me", "ho  ", {}))
    export_json(tmp_path / "Us" / "data.json", ("Bob", "a", {}), ("Cy", "b", {}))
    (bob, said), (us, _) = read(tmp_path)
    assert [(m.author == signal.ME, m.name, m.text, m.at) for m in said] == [
        (False, "BobSmith", "hi", AT),
        (True, "Me", "ho", AT + 1),
    ]
    assert (bob.name, bob.type, us.name, us.type) == (
        "BobSmith",
        "personal_chat",
        "Us",
        "private_group",
    )


@pytest.mark.parametrize(
    ("sender", "body", "more", "text", "left_out"),
    [
        ("Bob", "x", {"deleted": True}, "", Reason.DELETED),
        ("Bob", "Missed voice call  ", {}, "", Reason.SERVICE),
        ("Me", "anything", {"call": True}, "", Reason.SERVICE),
        ("No-Sender", "x", {}, "", Reason.NO_AUTHOR),
        ("Bob", "  ", {}, "", Reason.NO_TEXT),
        ("Bob", "", {"sticker": "\U0001f986"}, "\U0001f986", ""),
        ("Bob", "", {"sticker": {"emoji": ""}}, "<sticker>", ""),
        ("Bob", "", {"attachments": [{"name": "a.mp4", "path": "media/a.mp4"}]}, "<video>", ""),
        ("Bob", "new", {"quote": "\n\n> old\n\n"}, "new", ""),
    ],
)
def test_what_becomes_of_a_message_of_signal_export(tmp_path, sender, body, more, text, left_out):
    path = export_json(tmp_path / "Bob" / "data.json", (sender, body, more))
    ((_, (found,)),) = read(path)
    assert (found.text, found.left_out) == (text, left_out)


@pytest.mark.parametrize("shape", ["sigtop", "signal-export"])
def test_mutated_files_have_no_traceback_and_no_wrong_author(tmp_path, shape):
    path, kept = tmp_path / "x" / "data.json", 0
    path.parent.mkdir()
    for number in range(MUTANTS):
        rng = random.Random(number)
        people = [rng.choice(PEOPLE) for _ in range(12)]
        said = [f"[{who[:3]}] says {i} \u20ac" for i, who in enumerate(people)]
        if shape == "sigtop":
            text = sigtop(*map(message, people, said))
        else:
            names = {"You": "Me", BOB: "Bob", "Cy (cy.01)": "Cy"}
            rows = [(names[who], body, {}) for who, body in zip(people, said, strict=True)]
            text = export_json(path, *rows).read_text(encoding="utf-8")
        path.write_bytes(damaged(text, rng).encode("utf-8", "replace"))
        try:
            chats = read(path, collections.Counter())
        except UserError:
            continue
        for _, messages in chats:
            for found in messages:
                tag = re.match(r"\[(You|Bob|Cy )\] ", found.text)
                if tag and found.name in ("Me", "Bob", "Cy"):
                    assert found.name == {"You": "Me", "Cy ": "Cy"}.get(tag[1], tag[1]), (
                        f"{number}: {found}"
                    )
                    kept += 1
    assert kept > 12 * MUTANTS * 0.5
