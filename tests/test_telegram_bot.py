"""The Telegram bot against a stand-in of the Bot API on loopback, with a stub in place of a model."""

import asyncio
import contextlib
import datetime
import importlib.util
import json
import logging
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs

import pytest
from conftest import ROOT, Program, command, refused
from hypothesis import given, settings
from hypothesis import strategies as st

import chat
import data
from exports import telegram as exported
from inference import telegram_api, telegram_bot
from inference.pace import Pacer

CUT = float(os.environ.get("CUT", 1.5))  # seconds without a network
TOKEN = "123456:ABC-def_1234567890"
BOT = {"id": 42, "is_bot": True, "first_name": "Annbot", "username": "Ann_bot"}
BOB, EVE, ZED = 1, 2, 9  # Zed is a stranger
NAMES = {BOB: "Bob", EVE: "Eve", ZED: "Zed"}
GROUP = -100


class BotApi:
    """A stand-in for Telegram's Bot API: updates in, calls out."""

    def __init__(self):
        self.updates = []  # those not confirmed
        self.calls = []  # (method, chat, text, time) of messages and "typing…"
        self.answers = []  # (status, body) of the next messages, in place of success
        self.ids = 1000
        self.new = asyncio.Event()
        self.server, self.writers, self.port = None, set(), 0

    async def start(self):
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", self.port)
        self.port = self.server.sockets[0].getsockname()[1]

    def stop(self):
        """Cut the network: no connection is left, and none is accepted."""
        self.server.close()
        for writer in self.writers:
            writer.transport.abort()

    async def serve(self, reader, writer):
        self.writers.add(writer)
        gone = (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError)
        with contextlib.suppress(*gone):
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = int(head.lower().partition(b"content-length: ")[2].split()[0])
                fields = parse_qs((await reader.readexactly(length)).decode())
                path = head.split()[1].decode()
                assert path.startswith(f"/bot{TOKEN}/"), path
                fields = {name: value[0] for name, value in fields.items()}
                status, body = await self.answer(path.rpartition("/")[2], fields)
                text = json.dumps(body).encode()
                writer.write(
                    b"HTTP/1.1 %d x\r\nContent-Length: %d\r\n\r\n%s" % (status, len(text), text)
                )
        writer.close()
        self.writers.discard(writer)

    async def answer(self, method, fields):
        result = True
        if method == "getMe":
            result = BOT
        elif method == "getUpdates":
            offset = int(fields.get("offset", 0))
            self.updates = [one for one in self.updates if one["update_id"] >= offset]
            self.new.clear()
            if not self.updates:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.new.wait(), float(fields["timeout"]))
            result = self.updates[:100]
        elif method in ("sendMessage", "sendChatAction"):
            if method == "sendMessage" and self.answers:
                return self.answers.pop(0)
            text = fields.get("text", fields.get("action"))
            self.calls.append((method, int(fields["chat_id"]), text, time.monotonic()))
            if method == "sendMessage":
                result = self.message(int(fields["chat_id"]), BOT, text=text)
        return 200, {"ok": True, "result": result}

    def message(self, chat_id, user, **fields):
        self.ids += 1
        kind = {"type": "private"} if chat_id > 0 else {"type": "supergroup", "title": "Tea"}
        return {
            "message_id": self.ids,
            "date": int(time.time()),
            "chat": {"id": chat_id, **kind},
            "from": user,
            **fields,
        }

    def say(self, user, text="", chat_id=None, **fields):
        """Add the update of a message; return it."""
        author = {"id": user, "is_bot": False, "first_name": NAMES.get(user, f"User{user}")}
        fields |= {"text": text} if text else {}
        message = self.message(chat_id or user, author, **fields)
        return self.push({"update_id": self.ids, "message": message})

    def push(self, update):
        self.updates.append(update)
        self.new.set()
        return update

    def sent(self, chat_id):
        return [
            text for method, to, text, _ in self.calls if method == "sendMessage" and to == chat_id
        ]

    async def wait_for(self, condition, seconds=60):
        """Wait until condition() holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.calls
            await asyncio.sleep(0.01)

    async def wait_for_sent(self, chat_id, count, seconds=60):
        await self.wait_for(lambda: len(self.sent(chat_id)) >= count, seconds)
        await asyncio.sleep(0.1)  # what shouldn't come after it
        assert len(self.sent(chat_id)) == count, self.sent(chat_id)
        return self.sent(chat_id)


class StubQueue:
    """In place of RequestQueue: `reply(request)` gives the messages, after `seconds`."""

    def __init__(self, reply, seconds=0.0):
        self.reply = reply
        self.seconds = seconds
        self.requests = []

    def submit(self, request, client):
        self.requests.append(request)
        job = SimpleNamespace(result=asyncio.get_running_loop().create_future(), answer=None)

        def finish():
            if job.result.done():
                return
            try:
                job.answer = SimpleNamespace(messages=self.reply(request))
                job.result.set_result(("stop", {}))
            except Exception as error:
                job.result.set_exception(error)

        asyncio.get_running_loop().call_later(self.seconds, finish)
        return job


def echo(request):
    return [f"re {text}" for text in request.turns[-1].messages]


@contextlib.asynccontextmanager
async def running(api, tmp_path, reply=echo, seconds=0.0, allow="1,2", **flags):
    """Run a bot beside the stand-in; yield it."""
    options = chat.Options(
        ckpt=str(tmp_path), allow=(allow,), **{"pace": "fast", "telegram": True, **flags}
    )
    os.environ["TELEGRAM_API_URL"] = f"http://127.0.0.1:{api.port}"
    queue = StubQueue(reply, seconds)
    pacer = Pacer.load(tmp_path, options)
    bot = telegram_bot.TelegramBot(telegram_api.Api(TOKEN), queue, "Ann Smith", options, pacer)
    task = bot.run_task = asyncio.create_task(bot.run())
    try:
        yield bot
        assert not task.done(), task.exception()
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def play(scenario, *args):
    """Run scenario(api, …) with a stand-in that is up."""

    async def main():
        api = BotApi()
        await api.start()
        try:
            await scenario(api, *args)
        finally:
            api.stop()

    asyncio.run(main())


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(telegram_bot, "JOIN_SECONDS", 0.05)
    monkeypatch.setattr(telegram_api, "RETRY_SECONDS", 0.3)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("TELEGRAM_API_URL", "")


# --- answers


def test_messages_in_a_row_join_into_a_turn_and_each_answer_follows_typing(tmp_path):
    async def scenario(api):
        async with running(api, tmp_path) as bot:
            api.say(BOB, "hi")
            api.say(BOB, "you there?\nhello?")
            await api.wait_for_sent(BOB, 2)
            (request,) = bot.queue.requests
            (turn,) = request.turns
            assert (turn.author, turn.messages) == ("Bob", ["hi", "you there?\nhello?"])
            calls = [(method, text) for method, _, text, _ in api.calls]
            assert calls == [
                ("sendChatAction", "typing"),
                ("sendMessage", "re hi"),
                ("sendChatAction", "typing"),
                ("sendMessage", "re you there?\nhello?"),
            ]
            api.say(BOB, "bye")
            await api.wait_for_sent(BOB, 3)
            authors = [(turn.author, turn.me) for turn in bot.queue.requests[1].turns]
            assert authors == [("Bob", False), ("Ann Smith", True), ("Bob", False)]
            assert bot.queue.requests[1].chat == ("Bob", False)

    play(scenario)


def test_a_message_while_the_model_writes_starts_the_answer_again(tmp_path):
    async def scenario(api):
        async with running(api, tmp_path, seconds=0.5) as bot:
            api.say(BOB, "one")
            await api.wait_for(lambda: bot.queue.requests)
            api.say(BOB, "two")
            assert await api.wait_for_sent(BOB, 2) == ["re one", "re two"]
            assert len(bot.queue.requests) == 2

    play(scenario)


def test_a_message_while_the_answer_is_sent_is_answered_after_it(tmp_path):
    async def scenario(api):
        api.answers += [(502, {"ok": False})]  # "a" takes a moment longer
        reply = lambda request: ["a", "b"] if len(request.turns) == 1 else ["c"]
        async with running(api, tmp_path, reply=reply) as bot:
            api.say(BOB, "one")
            await api.wait_for(lambda: not api.answers)
            api.say(BOB, "two")
            assert await api.wait_for_sent(BOB, 3) == ["a", "b", "c"]
            turns = bot.queue.requests[1].turns
            assert [turn.messages for turn in turns] == [["one"], ["a", "b"], ["two"]]

    play(scenario)


def test_flood_limit_is_waited_out_and_order_kept(tmp_path):
    async def scenario(api):
        flood = {
            "ok": False,
            "error_code": 429,
            "description": "x",
            "parameters": {"retry_after": 1},
        }
        api.answers += [(429, flood)]
        async with running(api, tmp_path):
            began = time.monotonic()
            api.say(BOB, "one")
            api.say(BOB, "two")
            assert await api.wait_for_sent(BOB, 2) == ["re one", "re two"]
            assert api.calls[-1][3] - began > 1

    play(scenario)


@pytest.mark.parametrize("status", [403, 400])
def test_refused_messages_are_dropped_and_the_bot_goes_on(status, tmp_path, capsys):
    async def scenario(api):
        api.answers += [(status, {"ok": False, "description": "secret"})]
        async with running(api, tmp_path):
            api.say(BOB, "one")
            await api.wait_for(lambda: not api.answers)
            api.say(BOB, "two")
            assert (await api.wait_for_sent(BOB, 1)) == ["re two"]

    play(scenario)
    kind = "Forbidden" if status == 403 else "BadRequest"
    assert capsys.readouterr().err.splitlines()[-1] == f"(Telegram refuses a message: {kind})"


def test_what_the_bot_api_would_not_answer_is_sent_again(tmp_path):
    async def scenario(api):
        api.answers += [(200, {"welcome": "to our hotel"})]
        async with running(api, tmp_path):
            api.say(BOB, "one")
            assert await api.wait_for_sent(BOB, 1) == ["re one"]

    play(scenario)


def test_a_message_is_not_sent_again_because_its_confirmation_is_of_a_new_kind(tmp_path):
    async def scenario(api):
        api.answers += [(200, {"ok": True, "result": {"kind": "new"}})]
        async with running(api, tmp_path) as bot:
            api.say(BOB, "one")
            await api.wait_for(lambda: not api.answers)
            api.say(BOB, "two")
            assert await api.wait_for_sent(BOB, 1) == ["re two"]
            turns = [turn.messages for turn in bot.chats[BOB].turns]
            assert turns == [["one"], ["re one"], ["two"], ["re two"]]

    play(scenario)


def test_an_update_that_cannot_be_read_is_skipped_with_one_line(tmp_path, capsys):
    async def scenario(api):
        async with running(api, tmp_path, history=str(tmp_path)):
            api.push({"update_id": 1001, "message": {"message_id": 1, "text": "a secret"}})
            api.say(BOB, "half of an emoji, a secret: \ud83e")
            api.say(BOB, "hi")
            assert await api.wait_for_sent(BOB, 1) == ["re hi"]
            await api.wait_for(lambda: not api.updates)

    play(scenario)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["(a message can't be read"] * 2
    assert "secret" not in "".join(lines)


def test_after_an_error_of_the_model_the_next_message_tries_again(tmp_path, capsys):
    def reply(request):
        messages = request.turns[-1].messages
        if len(messages) == 1:
            raise RuntimeError("a secret")
        return messages

    async def scenario(api):
        async with running(api, tmp_path, reply):
            api.say(BOB, "one")
            await asyncio.sleep(0.5)
            api.say(BOB, "two")
            assert await api.wait_for_sent(BOB, 2) == ["one", "two"]

    play(scenario)
    assert capsys.readouterr().err == "(no answer: RuntimeError)\n"


def test_network_cut_loses_and_doubles_nothing(tmp_path, capsys):
    """Of 1.5 seconds; `make soak` cuts 30."""

    async def scenario(api):
        async with running(api, tmp_path, reply=lambda r: [*echo(r), "and"], seconds=0.3) as bot:
            api.say(BOB, "before")
            await api.wait_for(lambda: bot.queue.requests)
            api.stop()  # while the model writes
            await asyncio.sleep(CUT)
            api.say(EVE, "meanwhile")
            await api.start()
            assert await api.wait_for_sent(BOB, 2, 60) == ["re before", "and"]
            assert await api.wait_for_sent(EVE, 2, 60) == ["re meanwhile", "and"]

    play(scenario)
    lines = capsys.readouterr().err.splitlines()
    assert lines[-2:] == [
        "(no connection to Telegram; trying again)",
        "(connected to Telegram again)",
    ]


def test_an_update_delivered_twice_is_answered_once(tmp_path):
    async def scenario(api):
        async with running(api, tmp_path):
            update = api.say(BOB, "one")
            await api.wait_for_sent(BOB, 1)
            api.push(update)
            api.push({**update, "update_id": update["update_id"] + 7})
            api.say(BOB, "two")
            assert await api.wait_for_sent(BOB, 2) == ["re one", "re two"]

    play(scenario)


def test_200_chats_at_once_each_get_their_own_answers(tmp_path):
    async def scenario(api):
        users = range(1001, 1201)
        reply = lambda request: [" and ".join(request.turns[-1].messages)]
        async with running(api, tmp_path, reply, allow=",".join(map(str, users))):
            for user in users:
                api.say(user, f"one {user}")
                api.say(user, f"two {user}")
            await api.wait_for(lambda: len(api.calls) >= 400, 120)
            for user in users:
                assert api.sent(user) == [f"one {user} and two {user}"]

    play(scenario)


def test_an_answer_of_5000_characters_comes_in_two_pieces(tmp_path):
    text = " ".join(["word"] * 1000)

    async def scenario(api):
        async with running(api, tmp_path, reply=lambda request: [text]) as bot:
            api.say(BOB, "go on")
            pieces = await api.wait_for_sent(BOB, 2)
            assert " ".join(pieces) == text and max(map(len, pieces)) <= 4096
            assert bot.chats[BOB].turns[-1].messages == [text]

    play(scenario)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from(["a" * 3000, "🦆" * 2000, " ", "\n", "b"]), max_size=9))
def test_pieces_fit_and_lose_no_character_but_spaces(parts):
    text = "".join(parts)
    pieces = list(telegram_api.split_text(text))
    assert all(len(piece.encode("utf-16-le")) <= 2 * 4096 for piece in pieces)
    assert "".join("".join(pieces).split()) == "".join(text.split())


# --- who may talk


def test_a_stranger_gets_one_line_and_the_model_is_not_asked(tmp_path):
    async def scenario(api):
        async with running(api, tmp_path) as bot:
            api.say(ZED, "hi")
            api.say(ZED, "/start")
            api.say(ZED, "Ann?", chat_id=GROUP)
            api.say(BOB, "hi")
            await api.wait_for_sent(BOB, 1)
            (line,) = api.sent(ZED)
            assert "9" in line and "Ann" not in line and not api.sent(GROUP)
            assert len(bot.queue.requests) == 1 and list(bot.chats) == [BOB]

    play(scenario)


def test_in_a_group_it_answers_when_named_or_replied_to(tmp_path):
    async def scenario(api):
        async with running(api, tmp_path, as_=("1=Bobby",)) as bot:
            say = lambda user, text, **fields: api.say(user, text, chat_id=GROUP, **fields)
            say(BOB, "tea, anyone? An annual thing")
            say(EVE, "yes")
            say(ZED, "Ann, me too")
            await asyncio.sleep(0.3)
            assert not bot.queue.requests
            say(EVE, "and you, ann?")
            await api.wait_for_sent(GROUP, 2)
            turns = [(turn.author, turn.messages) for turn in bot.queue.requests[0].turns]
            assert turns == [
                ("Bobby", ["tea, anyone? An annual thing"]),
                ("Eve", ["yes", "and you, ann?"]),
            ]
            assert bot.queue.requests[0].chat == ("Tea", True)
            say(BOB, "hm", reply_to_message=api.message(GROUP, BOT, text="re yes"))
            await api.wait_for_sent(GROUP, 3)
            say(BOB, "@ann_bot: really?")
            await api.wait_for_sent(GROUP, 4)
            say(BOB, "/reset@other_bot")
            say(EVE, "fine", reply_to_message=api.message(GROUP, {**BOT, "id": EVE}, text="x"))
            await asyncio.sleep(0.3)
            assert len(bot.queue.requests) == 3 and len(bot.chats[GROUP].turns) == 8

    play(scenario)


@pytest.mark.parametrize("unanswered, answers", [(0, 1), (1, 0)])
def test_in_a_group_it_speaks_up_as_often_as_i_did(unanswered, answers, tmp_path):
    persona = {"timing": {"groups": {"unanswered": unanswered}}}
    (tmp_path / "persona.json").write_text(json.dumps(persona))

    async def scenario(api):
        async with running(api, tmp_path, speaks_up=True):
            api.say(BOB, "tea, anyone?", chat_id=GROUP)
            await api.wait_for(lambda: len(api.sent(GROUP)) == answers)
            await asyncio.sleep(0.4)
            assert len(api.sent(GROUP)) == answers

    play(scenario)


def test_a_name_is_the_contact_of_as_or_their_own_but_not_mine(tmp_path, monkeypatch):
    monkeypatch.setitem(NAMES, EVE, "Ann Smith")

    async def scenario(api):
        async with running(api, tmp_path, as_=("1=Bob Stone",)) as bot:
            api.say(BOB, "hi")
            api.say(EVE, "hi")
            await api.wait_for_sent(EVE, 1)
            await api.wait_for_sent(BOB, 1)
            authors = {request.turns[-1].author for request in bot.queue.requests}
            assert authors == {"Bob Stone", "Ann Smith (2)"}

    play(scenario)


# --- what isn't text


def test_media_arrive_as_the_marks_of_the_export(tmp_path):
    photo = [{"file_id": "a", "file_unique_id": "b", "width": 1, "height": 1}]
    file = {"file_id": "a", "file_unique_id": "b"}
    sticker = {**file, "type": "regular", "width": 1, "height": 1, "is_animated": False}
    sticker["is_video"] = False

    async def scenario(api):
        async with running(api, tmp_path) as bot:
            api.say(BOB, voice={**file, "duration": 1})
            api.say(BOB, photo=photo)
            api.say(BOB, photo=photo, caption="the cat")
            api.say(BOB, animation={**file, "width": 1, "height": 1, "duration": 1}, document=file)
            api.say(BOB, sticker={**sticker, "emoji": "🦆"})
            api.say(BOB, sticker=sticker)
            api.say(BOB, location={"longitude": 1, "latitude": 1})
            api.say(BOB, pinned_message=api.message(BOB, BOT, text="x"))
            api.say(BOB, "ok")
            await api.wait_for(lambda: bot.queue.requests)
            (turn,) = bot.queue.requests[-1].turns
            marks = ["<voice>", "<photo>", "the cat", "<gif>", "🦆", "<sticker>", "<location>"]
            assert turn.messages == [*marks, "ok"]

    play(scenario)


def test_marks_are_those_of_the_export():
    names = {"voice": "voice_message", "video_note": "video_message", "video": "video_file"}
    names |= {"animation": "animation", "audio": "audio_file", "document": "file"}
    names |= {"checklist": "todo_list", "contact": "contact_information", "venue": "place_name"}
    names |= {"location": "location_information", "game": "game_title"}
    known = exported.MEDIA | dict(exported.MARKS)
    assert telegram_api.MARKS == {name: known[names.get(name, name)] for name in telegram_api.MARKS}
    assert all(map(data.MARK.fullmatch, telegram_api.MARKS.values()))


# --- commands


def test_commands_work_as_in_the_terminal(tmp_path):
    async def scenario(api):
        count = iter("abcdef")
        async with running(api, tmp_path, reply=lambda request: [next(count)]) as bot:
            api.say(BOB, "/start")
            (start,) = await api.wait_for_sent(BOB, 1)
            assert "AI imitation of Ann Smith" in start and "block this bot" in start
            api.say(BOB, "/retry")
            assert (await api.wait_for_sent(BOB, 2))[-1] == "(there are no messages yet)"
            api.say(BOB, "hi")
            api.say(BOB, "/temp 1.5")
            assert (await api.wait_for_sent(BOB, 4))[2:] == ["(temperature 1.5)", "a"]
            assert bot.queue.requests[-1].temperature == 1.5
            api.say(BOB, "/retry@ann_bot")
            assert (await api.wait_for_sent(BOB, 5))[-1] == "b"
            turns = bot.chats[BOB].turns
            assert [turn.messages for turn in turns] == [["hi"], ["b"]]
            api.say(BOB, "/undo")
            assert (await api.wait_for_sent(BOB, 6))[-1] == "(removed; 0 turns left)"
            api.say(BOB, "hi")
            await api.wait_for_sent(BOB, 7)
            api.say(BOB, "/reset")
            assert (await api.wait_for_sent(BOB, 8))[-1] == "(new conversation)"
            assert not bot.chats[BOB].turns
            api.say(BOB, "/temp 99")
            api.say(BOB, "/nonsense")
            assert (await api.wait_for_sent(BOB, 10))[-1] == start

    play(scenario)


def test_reset_stops_an_answer_that_waits(tmp_path):
    kept = (tmp_path / "1.jsonl").read_text

    async def scenario(api):
        async with running(api, tmp_path, seconds=0.3, history=str(tmp_path)) as bot:
            api.say(BOB, "hi")
            await api.wait_for(lambda: bot.queue.requests)
            assert "unanswered" in kept()
            api.say(BOB, "/reset")
            await asyncio.sleep(0.5)
            assert api.sent(BOB) == ["(new conversation)"] and not bot.chats[BOB].turns
            assert "unanswered" not in kept() and "hi" not in kept()

    play(scenario)


# --- pace


def timing(folder, **habits):
    typing = {"pause": 0.1, "characters_per_second": 1000, "spread": {"50%": 1}}
    everyone = {"delay": {"50%": 0.6}, **habits}
    persona = {"timing": {"everyone": everyone, "typing": typing, "opening_hours": [1] * 24}}
    (folder / "persona.json").write_text(json.dumps(persona))


def test_at_human_pace_it_waits_types_and_pauses(tmp_path):
    timing(tmp_path)

    async def scenario(api):
        async with running(api, tmp_path, reply=lambda request: ["a", "b"], pace=None):
            api.say(BOB, "hi")
            began = time.monotonic()
            await api.wait_for_sent(BOB, 2)
            times = [at - began for *_, at in api.calls]
            assert 0.45 < times[0] < times[1] and times[1] > 0.59  # typing, a
            assert times[3] - times[1] > 0.09  # b

    play(scenario)


def test_it_may_ignore_but_only_if_asked(tmp_path):
    timing(tmp_path, unanswered=1)

    async def scenario(api, may_ignore):
        async with running(api, tmp_path, may_ignore=may_ignore):
            api.say(BOB, "hi")
            api.say(BOB, "hello?")
            expected = [] if may_ignore else ["re hi", "re hello?"]
            await api.wait_for(lambda: api.sent(BOB) == expected)
            await asyncio.sleep(0.5)
            assert api.sent(BOB) == expected

    play(scenario, True)
    play(scenario, False)


def test_after_a_silence_an_ignored_turn_gets_another_chance(tmp_path):
    async def scenario(api):
        async with running(api, tmp_path, may_ignore=True) as bot:
            ignored = iter([True, False])
            bot.pacer.ignores = lambda contact: next(ignored)
            early = api.say(BOB, "hi")
            early["message"]["date"] -= 4000
            await api.wait_for(lambda: BOB in bot.chats)
            api.say(BOB, "hello?")
            assert await api.wait_for_sent(BOB, 2) == ["re hi", "re hello?"]

    play(scenario)


def test_it_opens_talks_at_most_so_often_a_day(tmp_path, monkeypatch):
    timing(tmp_path, openings_per_day=1000)
    for name, seconds in (("MINUTE", 0.02), ("SILENCE_SECONDS", 0.1)):
        monkeypatch.setattr(telegram_bot, name, seconds)

    async def scenario(api):
        reply = lambda request: ["yes"] if request.turns else ["hey"]
        async with running(api, tmp_path, reply=reply, initiates=2, seed=1) as bot:
            api.say(EVE, "hi", chat_id=GROUP)
            api.say(BOB, "hi")
            await api.wait_for(lambda: len(api.sent(BOB)) == 3)
            await asyncio.sleep(0.7)
            assert api.sent(BOB) == ["yes", "hey", "hey"] and not api.sent(GROUP)
            assert bot.queue.requests[-1].chat == ("Bob", False)

    if datetime.datetime.now().strftime("%H:%M") == "23:59":
        pytest.skip("a day ends in the middle")
    play(scenario)


# --- what is kept


def listing(folder):
    return {path.name: path.stat().st_size for path in Path(folder).rglob("*")}


def test_nothing_is_written_or_logged_without_history(tmp_path, caplog, capfd):
    caplog.set_level(logging.DEBUG)

    async def scenario(api):
        async with running(api, tmp_path):
            api.say(BOB, "a secret")
            api.say(BOB, "/temp 1")
            api.say(ZED, "a secret")
            api.answers += [(400, {"ok": False, "description": "a secret"})]
            await api.wait_for(lambda: len(api.sent(BOB)) + len(api.sent(ZED)) == 2)

    before = listing(tmp_path)
    play(scenario)
    captured = capfd.readouterr()
    for text in (caplog.text, captured.out, captured.err):
        assert "secret" not in text and TOKEN not in text and "bot123" not in text
    assert listing(tmp_path) == before


def test_history_is_a_file_a_chat_as_the_terminals(tmp_path):
    folder = tmp_path / "history"
    folder.mkdir()

    async def scenario(api):
        async with running(api, tmp_path, history=str(folder)):
            api.say(BOB, "hi")
            api.say(BOB, "Ann?", chat_id=GROUP)
            await api.wait_for_sent(BOB, 1)
            await api.wait_for_sent(GROUP, 1)

    play(scenario)
    assert set(listing(folder)) == {"1.jsonl", "-100.jsonl"}
    (session,) = data.load_sessions(folder / "1.jsonl")
    assert [turn.messages for turn in session.turns] == [["hi"], ["re hi"]]
    assert (session.chat, session.type) == ("Bob", "personal_chat")
    assert data.load_sessions(folder / "-100.jsonl")[0].chat == "Tea"
    terminal = chat.TerminalChat("Ann Smith", "Bob", None, folder / "1.jsonl")
    assert len(terminal.turns) == 2


def test_another_bot_goes_on_with_a_kept_chat_and_its_name(tmp_path):
    turns = [data.Turn("Bob (2)", False, "2024-01-01T00:00:00", ["hi"])]
    state = "telegram 1, bot 41, message 5000, unanswered"
    session = data.Session("Bob (2)", state, "personal_chat", turns[0].at, turns)
    (tmp_path / "1.jsonl").write_text(session.to_json())

    async def scenario(api):
        async with running(api, tmp_path, history=str(tmp_path)) as bot:
            await asyncio.sleep(0.2)
            assert not api.calls  # Bob has not pressed its Start
            api.say(BOB, "there?")
            assert await api.wait_for_sent(BOB, 2) == ["re hi", "re there?"]
            (turn,) = bot.queue.requests[-1].turns
            assert turn.author == "Bob (2)"

    play(scenario)
    assert "bot 42" in (tmp_path / "1.jsonl").read_text()


def test_a_full_disk_ends_the_bot_before_the_update_is_confirmed(tmp_path, monkeypatch):
    async def scenario(api):
        def full(path, text):
            raise OSError(28, "No space left on device", str(path))

        monkeypatch.setattr(telegram_bot.cli, "write_text", full)
        with pytest.raises(OSError):
            async with running(api, tmp_path, history=str(tmp_path)) as bot:
                api.say(BOB, "hi")
                await bot.run_task
        assert len(api.updates) == 1

    play(scenario)


# --- the program


@contextlib.contextmanager
def program(api, *args):
    """Run chat.py --telegram; yield its process and its output, to be read."""
    env = {"TELEGRAM_TOKEN": TOKEN, "TELEGRAM_API_URL": f"http://127.0.0.1:{api.port}"}
    flags = ("--telegram", "--allow", "1,2", "--device", "cpu", "--weights", "fp32", "--seed", 1)
    with tempfile.TemporaryFile("w+") as output:
        streams = [open(os.devnull), output, output]
        process = Program(["chat.py", *args, *flags], streams, env)
        try:
            yield process, output
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.wait(30)
            streams[0].close()


def test_stopped_while_it_waits_and_killed_later_it_answers_everything_once(clone, tmp_path):
    history = tmp_path / "history"
    history.mkdir()
    kept = history / "1.jsonl"
    flags = (clone, "--history", history, "--pace", "fast", "--max-tokens", 16)

    async def scenario(api):
        update = api.say(BOB, "hi")
        async with running(api, clone, history=str(history), pace="human", longest_wait=60):
            await api.wait_for(lambda: kept.exists() and not api.updates)
        assert not api.sent(BOB) and "unanswered" in kept.read_text()
        with program(api, *flags, "--temperature", 1.5) as (_, output):
            await api.wait_for(lambda: api.sent(BOB), 200)
            await api.wait_for(lambda: "unanswered" not in kept.read_text())
            output.seek(0)
            assert output.read().splitlines() == [
                "An AI imitation of Ann: https://t.me/Ann_bot (Ctrl-C exits)"
            ]
        sent = len(api.sent(BOB))
        api.push(update)
        api.say(EVE, "hi")
        async with running(api, clone, history=str(history)):
            await api.wait_for_sent(EVE, 1)
        assert len(api.sent(BOB)) == sent
        (session,) = data.load_sessions(kept)
        assert [turn.author for turn in session.turns] == ["Bob", "Ann"]
        assert session.turns[0].messages == ["hi"]

    play(scenario)


@pytest.fixture
def refusal(clone, monkeypatch):
    """Return what chat.py --telegram says to its flags, before it loads the model."""
    monkeypatch.delenv("TELEGRAM_TOKEN", raising=False)

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["chat.py", str(clone), "--telegram", *map(str, flags)])
        with pytest.raises((telegram_bot.UserError, OSError)) as info:
            chat.main()
        return str(info.value)

    return run


def test_flags_that_are_missing_or_wrong_are_named(refusal, tmp_path):
    assert "--allow ID" in refusal() and "--allow ID" in refusal("--allow", "me")
    allowed = ("--allow", "1, 3")
    assert "--as Bob" in refusal(*allowed, "--as", "Bob")
    assert "--as 2=…: --allow lacks" in refusal(*allowed, "--as", "3=Eve", "--as", "2=Bob")
    assert "--memory quotes your chats" in refusal(*allowed, "--memory", tmp_path)
    assert "--telegram and -p" in refusal(*allowed, "-p", "hi")
    assert "--telegram and --web" in refusal(*allowed, "--web")
    assert "TELEGRAM_TOKEN" in refusal(*allowed)


def test_the_token_comes_from_a_private_file_and_is_not_repeated(refusal, tmp_path):
    token = tmp_path / "token"
    token.write_text("a secret")
    flags = ("--allow", "1", "--token-file", token)
    token.chmod(0o644)
    assert f"chmod 600 {token}" in refusal(*flags)
    token.chmod(0o600)
    text = refusal(*flags)
    assert str(token) in text and "secret" not in text
    token.write_text(TOKEN + "\n")
    assert telegram_api.read_token(str(token)) == TOKEN
    token.unlink()
    assert "No such file" in refusal(*flags)


def test_a_proxy_that_cannot_be_used_is_named_before_the_model_loads(refusal, monkeypatch):
    monkeypatch.setenv("TELEGRAM_TOKEN", TOKEN)
    monkeypatch.setenv("ALL_PROXY", "ftp://ann:secret@proxy")
    text = refusal("--allow", "1")
    assert "The proxy in" in text and "secret" not in text and TOKEN not in text


def test_what_telegram_refuses_at_the_start_is_told_in_two_lines(monkeypatch):
    async def run(bot):
        raise telegram_bot.TelegramError("Logged out")

    monkeypatch.setattr(telegram_bot.TelegramBot, "run", run)
    monkeypatch.setattr(telegram_bot, "RequestQueue", lambda *_, **__: None)
    options = chat.Options(allow=("1",))
    pacer = Pacer(None, human=False, may_ignore=False)
    with pytest.raises(telegram_bot.UserError, match="refuses this bot: Logged out\n"):
        telegram_bot.serve(telegram_api.Api(TOKEN), None, "Ann", options, pacer)


def test_a_refusal_ends_with_code_2_and_two_lines(clone):
    refused(command("chat.py", clone, "--telegram"), "--allow ID")


@pytest.mark.parametrize("status", [401, 404])
def test_a_token_that_telegram_does_not_know_ends_the_bot(status, tmp_path):
    async def scenario(api):
        async def unknown(method, fields):
            return status, {"ok": False, "description": "Unauthorized"}

        api.answer = unknown
        with pytest.raises(telegram_bot.UserError) as info:
            async with running(api, tmp_path) as bot:
                await bot.run_task
        assert TOKEN not in str(info.value)

    play(scenario)


def test_a_folder_of_other_files_is_refused(tmp_path):
    session = data.Session("Bob", "chat.py", "personal_chat", "2024-01-01T00:00:00", [])
    (tmp_path / "talk.jsonl").write_text(session.to_json())

    async def scenario(api):
        with pytest.raises(telegram_bot.UserError, match="talk.jsonl is not a chat"):
            async with running(api, tmp_path, history=str(tmp_path)) as bot:
                await bot.run_task

    play(scenario)


def test_without_the_library_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "telegram", None)
    path = ROOT / "inference" / "telegram_api.py"
    spec = importlib.util.spec_from_file_location("telegram_api_alone", path)
    with pytest.raises(telegram_bot.UserError, match="needs telegram, which is not installed"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
