"""VK's data archive. Every file here is invented."""

import collections
import datetime
import html
import random
import re
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_damage import MUTANTS, once

import exports
from exports import vk

MONTHS = "янв фев мар апр мая июн июл авг сен окт ноя дек".split()


def message(number, author, time, text, attachment=""):
    """`author`: (id, name), None for me."""
    who = f'<a href="https://vk.com/id{author[0]}">{html.escape(author[1])}</a>' if author else "Вы"
    when = f"{time.day} {MONTHS[time.month - 1]} {time.year} в {time.hour}:{time:%M:%S}"
    extra = attachment and (
        f"<div class='attachment'><div class='attachment__description'>{attachment}</div>"
        "<a class='attachment__link' href='https://vk.com/x'>https://vk.com/x</a></div>"
    )
    body = html.escape(text).replace("\n", "<br>")
    return (
        f'<div class="item"><div class="item__main"><div class="message" data-id="{number}">\n'
        f'  <div class="message__header">{who}, {when}</div>\n'
        f'  <div>{body}<div class="kludges">{extra}</div></div>\n</div></div></div>\n'
    )


def page(messages, title="Боб Ут"):
    return (
        '<!DOCTYPE html><html><head><meta charset="windows-1251"></head><body>'
        f'<div class="ui_crumb">Сообщения</div><div class="ui_crumb">{title}</div>\n'
        + "".join(messages) + "</body></html>"
    ).encode("cp1251", "xmlcharrefreplace")  # fmt: skip


BOB, EVE = (123, "Боб Ут"), (456, "Eve & Co")
START = datetime.datetime(2024, 1, 31, 18, 5, 6)


def read(path, repairs=None):
    return [(chat, list(messages)) for chat, messages in exports.read(path, repairs)]


def test_pages_of_a_folder_are_one_chat_the_oldest_first(tmp_path):
    times = [START + datetime.timedelta(minutes=n) for n in range(3)]
    with zipfile.ZipFile(tmp_path / "Archive.zip", "w") as archive:
        newest = [message(3, None, times[2], "три <b>"), message(2, BOB, times[1], "два")]
        archive.writestr("messages/123/messages0.html", page(newest))
        archive.writestr("messages/123/messages50.html", page([message(1, BOB, times[0], "раз")]))
        archive.writestr("messages/index-messages.html", "<html></html>")
    ((chat, messages),) = read(tmp_path / "Archive.zip")
    assert (chat.key, chat.name, chat.type, chat.owner) == (
        "vk:123",
        "Боб Ут",
        "personal_chat",
        vk.ME,
    )
    assert [(m.id, m.author, m.name, m.date, m.text) for m in messages] == [
        (1, "vk:123", "Боб Ут", "2024-01-31T18:05:06", "раз"),
        (2, "vk:123", "Боб Ут", "2024-01-31T18:06:06", "два"),
        (3, vk.ME, None, "2024-01-31T18:07:06", "три <b>"),
    ]


@pytest.mark.parametrize(("peer", "kind"), [("123", "personal_chat"), ("2000000007", "private_group"), ("-44", "bot_chat")])  # fmt: skip
def test_the_folder_says_what_kind_of_chat_it_is(tmp_path, peer, kind):
    (tmp_path / peer).mkdir()
    (tmp_path / peer / "messages0.html").write_bytes(page([message(1, BOB, START, "hi")]))
    ((chat, _),) = read(tmp_path)
    assert chat.type == kind


@pytest.mark.parametrize(("attachment", "text", "shown", "reason"), [
    ("Фотография", "", "<photo>", ""), ("Стикер", "", "<sticker>", ""), ("Файл", "", "<file>", ""),
    ("Фотография", "look", "look", ""), ("1 прикреплённое сообщение", "", "", "forwards"),
    ("Звонок", "", "", "service messages"), ("Сцена", "", "", "messages without text"), ("", "a\nb", "a\nb", ""),
])  # fmt: skip
def test_attachments_become_marks(tmp_path, attachment, text, shown, reason):
    path = tmp_path / "messages0.html"
    path.write_bytes(page([message(1, BOB, START, text, attachment)]))
    ((_, (found,)),) = read(path)
    assert (found.text, found.left_out) == (shown, reason)


WORDS = st.text(st.characters(categories=["L", "N", "P", "So"]), min_size=1, max_size=20)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10**6), st.sampled_from([BOB, EVE, None]), WORDS), min_size=1, max_size=20))  # fmt: skip
def test_what_is_generated_comes_back_message_for_message(tmp_path_factory, steps):
    folder = tmp_path_factory.mktemp("vk") / "2000000001"
    folder.mkdir()
    time, listed, expected = START, [], []
    for number, (seconds, author, text) in enumerate(steps):
        time += datetime.timedelta(seconds=seconds)
        listed.append(message(number, author, time, text))
        expected.append((number, f"vk:{author[0]}" if author else vk.ME, time.isoformat(), text))
    listed.reverse()
    for n in range(0, len(listed), 5):
        (folder / f"messages{n}.html").write_bytes(page(listed[n : n + 5]))
    repairs = collections.Counter()
    ((_, messages),) = read(folder, repairs)
    assert [(m.id, m.author, m.date, m.text) for m in messages] == expected and not repairs


def test_mutated_pages_have_no_traceback_and_no_wrong_author(tmp_path):
    path, kept = tmp_path / "messages0.html", 0
    tags = {"vk:123": "B", "vk:456": "E", vk.ME: "M"}
    for number in range(MUTANTS):
        rng = random.Random(number)
        listed = []
        for n in range(rng.randint(1, 20)):
            author, tag = rng.choice([(BOB, "B"), (EVE, "E"), (None, "M")])
            listed.append(message(n, author, START - datetime.timedelta(minutes=n), f"[{tag}] {n}"))
        text = page(listed).decode("cp1251")
        for _ in range(rng.choice((1, 2, 5))):
            damage = rng.choice(("cut", "change", "lose", "insert", "hole"))
            text = once(text, damage, rng.randrange(len(text) + 1), rng)
        path.write_bytes(text.encode("cp1251", "replace"))
        try:
            chats = read(path)
        except exports.UserError:
            continue
        for found in (found for _, messages in chats for found in messages):
            for tag in re.findall(r"\[([BEM])\]", found.text):
                kept += 1
                wrong = found.author in tags and tags[found.author] != tag
                assert not wrong, f"mutant {number}: {found}"
    assert kept > MUTANTS * 3
