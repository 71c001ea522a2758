"""A server process with a random model, tested by sockets, OpenAI's client and a browser."""

import asyncio
import concurrent.futures
import contextlib
import http.client
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import openai
import pytest
from conftest import ROOT, command, refused, save_mistral
from starlette.testclient import TestClient

import chat
from data import Turn
from inference import generate, request_queue, server
from inference.pace import Pace, Pacer
from weights.load import load_model
from weights.tokenizer import load_tokenizer

HOSTILE = int(os.environ.get("HOSTILE", 200))  # requests
TALKS = int(os.environ.get("TALKS", 10))
STORM = float(os.environ.get("STORM", 5))  # seconds
TOKEN = "correct-horse-battery"
HI = [{"role": "user", "content": "hi"}]
POST_HEAD = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
)


@contextlib.contextmanager
def serving(clone, *flags):
    """Run the server; yield its port and process."""
    argv = [
        sys.executable,
        "chat.py",
        clone,
        "--web",
        "--port",
        0,
        "--weights",
        "fp32",
        "--device",
        "cpu",
        "--max-tokens",
        24,
        *flags,
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    errors = tempfile.TemporaryFile("w+")  # a pipe that nobody reads would fill up, and stop it
    process = subprocess.Popen(
        [*map(str, argv)], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=errors, text=True
    )
    process.errors = lambda: [errors.seek(0), errors.read()][1]
    try:
        match = re.search(r":(\d+)/", process.stdout.readline())
        assert match, process.errors()
        yield int(match[1]), process
    finally:
        process.terminate()
        process.wait(30)
        process.stdout.close()
        errors.close()


@pytest.fixture(scope="module")
def port(clone):
    with serving(clone) as (port, process):
        yield port
        assert process.poll() is None


@pytest.fixture
def client(port):
    with openai.OpenAI(
        base_url=f"http://127.0.0.1:{port}/v1", api_key="any", max_retries=0
    ) as client:
        yield client


def ask(port, method="POST", path="/v1/chat/completions", body=None, **headers):
    """Return the status, headers, and JSON or text of the response."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    if body is not None:
        headers = {"content-type": "application/json", **headers}
        body = body if isinstance(body, bytes | str) else json.dumps(body)
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return (
        answer.status,
        answer.headers,
        json.loads(text) if answer.headers["content-type"] == "application/json" else text,
    )


def greedy(port, messages=HI, **more):
    status, _, answer = ask(port, body={"messages": messages, "temperature": 0, **more})
    assert status == 200, answer
    return (
        answer["choices"][0]["message"]["content"],
        answer["usage"],
        answer["choices"][0]["finish_reason"],
    )


# --- the API


def test_openai_client_gets_the_decoders_reply_streamed_or_not(client, clone):
    decoder = generate.Decoder(load_model(str(clone)), load_tokenizer(clone), 512)
    turns = [
        Turn("Bob", False, "", ["hi", "you there?"]),
        Turn("Ann", True, "", ["yes"]),
        Turn("Bob", False, "", ["good"]),
    ]
    answer = generate.Answer(decoder, turns, "Ann", 24, 0)
    reply = "\n".join([list(answer), answer.messages][1])
    messages = [
        {"role": "system", "content": "You are a pirate."},
        {"role": "user", "content": "hi"},
        {"role": "user", "content": [{"type": "text", "text": "you there?"}]},
        {"role": "assistant", "content": "yes\n\n"},
        {"role": "user", "content": " good "},
    ]
    whole = client.chat.completions.create(model="any", messages=messages, temperature=0)
    assert whole.choices[0].message.content == reply and whole.choices[0].finish_reason == (
        "stop" if answer.ended else "length"
    )
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (
        len(answer.prompt),
        len(answer.ids),
    )
    chunks = list(
        client.chat.completions.create(
            model="x",
            messages=messages,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == reply
    assert (
        chunks[-1].usage == whole.usage
        and chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    )


def test_names_are_authors_and_a_last_turn_of_mine_is_continued(port, clone):
    decoder = generate.Decoder(load_model(str(clone)), load_tokenizer(clone), 512)
    turns = [
        Turn("Eve", False, "", ["hi"]),
        Turn("Bob", False, "", ["ho"]),
        Turn("Ann", True, "", ["well"]),
    ]
    answer = generate.Answer(decoder, turns, "Ann", 24, 0)
    reply = "\n".join([list(answer), answer.messages][1])
    messages = [
        {"role": "user", "name": "Eve", "content": "hi"},
        {"role": "user", "content": "ho"},
        {"role": "assistant", "content": "well"},
    ]
    assert greedy(port, messages)[0] == reply


def test_stop_string_ends_the_reply_and_is_not_sent(client, port):
    reply = greedy(port)[0]
    stop = reply[len(reply) // 2 :][:3]
    expected = reply[: reply.index(stop)]
    chunks = list(
        client.chat.completions.create(
            model="any", messages=HI, temperature=0, stop=stop, stream=True
        )
    )
    assert (
        "".join(c.choices[0].delta.content or "" for c in chunks) == expected
        and chunks[-1].choices[0].finish_reason == "stop"
    )
    assert greedy(port, stop=["never said", stop])[0] == expected
    assert greedy(port, stop=reply + "x")[0] == reply  # what was held back comes at the end


def test_a_possible_stop_string_is_held_back():
    assert request_queue.cut_at_stop("hello", []) == (False, 5)
    assert request_queue.cut_at_stop("hello", ["lo w"]) == (False, 3)
    assert request_queue.cut_at_stop("hello wide", ["lo w", "e"]) == (True, 1)
    assert request_queue.cut_at_stop("aab", ["abc", "bx"]) == (False, 1)


def test_max_tokens_and_seed(port):
    assert (
        greedy(port, max_tokens=3)[1]["completion_tokens"] == 3
        and greedy(port, max_completion_tokens=2)[2] == "length"
    )
    assert greedy(port, max_tokens=10**6)[1]["completion_tokens"] <= 24
    draw = lambda seed: ask(port, body={"messages": HI, "temperature": 1.9, "seed": seed})[2][
        "choices"
    ][0]["message"]["content"]
    assert draw(1) == draw(1) != draw(2)


def test_max_tokens_as_in_llama_cpp(port):
    plain = greedy(port)
    for no_limit in (-1, -1.0, None):
        assert (
            greedy(port, max_tokens=no_limit)
            == greedy(port, max_completion_tokens=no_limit)
            == plain
        )
    assert (
        greedy(port, max_tokens=3.0)
        == greedy(port, max_tokens=3, max_completion_tokens=-1)
        == greedy(port, max_tokens=3)
    )
    text, usage, reason = greedy(port, max_tokens=0)
    assert (text, usage["completion_tokens"], reason) == ("", 0, "length") and usage[
        "prompt_tokens"
    ] == plain[1]["prompt_tokens"]
    _, _, streamed = ask(port, body={"messages": HI, "max_tokens": 0, "stream": True})
    events = [json.loads(line[6:]) for line in streamed.split("\n\n")[:-2]]
    assert [event["choices"][0]["finish_reason"] for event in events] == [
        None,
        "length",
    ] and streamed.endswith("data: [DONE]\n\n")


def test_many_stop_strings_count_and_empty_ones_are_ignored(port):
    plain = greedy(port)
    stop = plain[0][len(plain[0]) // 2 :][:3]
    assert (
        greedy(port, stop=[f"never {n}" for n in range(99)] + [stop])[0]
        == plain[0][: plain[0].index(stop)]
    )
    for nothing in ("", [], [""], ["", None], None):
        assert greedy(port, stop=nothing) == plain


def test_paths_may_have_extra_slashes_and_lack_v1(port):
    expected = greedy(port)[0]
    for path in (
        "/v1/chat/completions/",
        "/v1//chat/completions/",
        "//v1/chat//completions",
        "/chat/completions",
    ):
        status, _, answer = ask(port, path=path, body={"messages": HI, "temperature": 0})
        assert status == 200 and answer["choices"][0]["message"]["content"] == expected, (
            path,
            answer,
        )
    for path in ("/v1/models/", "/models", "//v1//models"):
        assert [model["id"] for model in ask(port, "GET", path)[2]["data"]] == ["Ann"]
    assert ask(port, "GET", "/v1/models/Ann/")[2]["id"] == "Ann"
    assert ask(port, "GET", "/health/")[2] == ask(port, "GET", "/v1/health")[2] == {"status": "ok"}
    assert ask(port, path="/v1/v1/chat/completions", body={"messages": HI})[0] == 404


def test_seed_flag_makes_replies_repeatable_and_retries_differ(clone):
    runs = []
    for _ in range(2):
        with serving(clone, "--seed", 1, "--temperature", 1.9) as (port, _):
            runs.append(
                [
                    ask(port, body={"messages": HI})[2]["choices"][0]["message"]["content"]
                    for _ in range(3)
                ]
            )
    assert runs[0] == runs[1] and len({*runs[0]}) == 3


def test_models_and_health(client, port):
    assert [model.id for model in client.models.list()] == ["Ann"] and client.models.retrieve(
        "Ann"
    ).id == "Ann"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("Bob")
    assert ask(port, "GET", "/health")[2] == {"status": "ok"}
    assert ask(port, "GET", "/persona")[2] == {
        "me": "Ann",
        "you": "Bob",
        "contacts": ["Bob", "Eve"],
    }


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"n": 2}, "n"),
        ({"tools": [{"type": "function"}], "tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"functions": [{"name": "f"}], "function_call": {"name": "f"}}, "function_call"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": "1"}, "top_p"),
        ({"max_tokens": -2}, "max_tokens"),
        ({"max_tokens": 20.5}, "max_tokens"),
        ({"max_tokens": "20"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_completion_tokens": 1e300}, "max_completion_tokens"),
        ({"seed": 2**70}, "seed"),
        ({"stop": [1]}, "stop"),
        ({"stop": {"a": "b"}}, "stop"),
        ({"stop": ["x"] * 101}, "stop"),
        ({"stop": "x" * 201}, "stop"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "refusal"}]}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": [{"type": []}]}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": [{"text": 1}]}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "name": "a\nb", "content": "x"}]}, "messages[0]"),
        ({"messages": HI * 2001}, "messages"),
    ],
)
def test_unsupported_and_invalid_fields_are_a_400_with_param(port, fields, named):
    status, _, answer = ask(port, body={"messages": HI, **fields})
    assert (status, answer["error"]["param"]) == (400, named), answer
    assert set(answer["error"]) == {"message", "type", "param", "code"}


def test_sixteen_clients_at_once_get_the_same_replies_as_alone(port):
    talks = [[{"role": "user", "content": f"question {n}"}] * (n % 3 + 1) for n in range(16)]
    alone = [greedy(port, talk) for talk in talks]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        assert list(pool.map(lambda talk: greedy(port, talk), talks)) == alone


def test_full_queue_is_a_503_and_clients_that_leave_free_their_place(clone):
    body = json.dumps(
        {"messages": [{"role": "user", "content": "word " * 200}], "stream": True, "seed": 1}
    ).encode()
    head = POST_HEAD
    with serving(clone, "--max-tokens", 200, "--per-client", 99) as (port, _):
        began = time.time()
        greedy(port, max_tokens=200)
        one_takes = time.time() - began
        clients = [
            socket.create_connection(("127.0.0.1", port))
            for _ in range(request_queue.MAX_QUEUE + 8)
        ]
        for one in clients:
            one.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        over = []
        for one in clients:
            if b" 503 " in (text := one.recv(4096)):
                while b"}}" not in text and (part := one.recv(4096)):  # the body may come behind
                    text += part
                over.append(text)
        assert over and all(b"retry-after: 5" in text and b"overloaded" in text for text in over)
        for one in clients:
            one.close()
        began = time.time()
        while ask(port, body={"messages": HI, "max_tokens": 1})[0] == 503:
            time.sleep(0.02)
        assert time.time() - began < request_queue.MAX_QUEUE * one_takes / 4


# --- other programs: what they sent when they were run against the server, see docs/OTHER_TOOLS.md

TOOL = {"type": "function", "function": {"name": "search_web", "parameters": {"type": "object"}}}
PIXEL = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
SYSTEM = {"role": "system", "content": "Write Ann's next reply in a fictional chat."}
SILLYTAVERN = {
    "model": "Ann",
    "max_tokens": 300,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "top_p": 1,
}
TITLE_TASK = (
    "### Task:\nGenerate a concise title summarizing the chat history.\n"
    '### Output:\nJSON format: { "title": "your concise title here" }'
)


@pytest.mark.parametrize(
    "sent, like",
    [
        ({"model": "Ann", "messages": HI}, HI),
        ({"model": "Ann", "messages": HI, "tools": [TOOL]}, HI),
        ({"model": "Ann", "messages": HI, "functions": [{"name": "f"}]}, HI),
        ({"model": "Ann", "messages": HI, "tools": [TOOL], "tool_choice": "auto"}, HI),
        ({**SILLYTAVERN, "messages": [SYSTEM, *HI]}, HI),
        ({**SILLYTAVERN, "messages": HI, "tools": [TOOL], "tool_choice": "auto"}, HI),
        (
            {
                **SILLYTAVERN,
                "messages": [*HI, {"role": "assistant", "content": "yes"}, SYSTEM],
            },  # Continue
            [*HI, {"role": "assistant", "content": "yes"}],
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}, PIXEL]}]},
            [{"role": "user", "content": "hi\n<photo>"}],
        ),
        (
            {"messages": [{"role": "user", "content": [PIXEL]}]},
            [{"role": "user", "content": "<photo>"}],
        ),
        (
            {"messages": [{"role": "user", "content": TITLE_TASK}], "max_tokens": 1000},
            [{"role": "user", "content": TITLE_TASK}],
        ),
    ],
)
def test_requests_of_open_webui_and_sillytavern_are_answered(port, sent, like):
    expected = greedy(port, like, top_p=1)[0]
    sent = {**sent, "temperature": 0, "top_p": 1}
    for authorization in ("Bearer ", "Bearer none"):  # without a key
        status, _, answer = ask(port, body=sent, authorization=authorization)
        assert status == 200, answer
        assert answer["choices"][0]["message"] == {"role": "assistant", "content": expected}
    streamed = {**sent, "stream": True, "stream_options": {"include_usage": True}}
    status, _, text = ask(port, body=streamed)
    events = [json.loads(line[6:]) for line in text.split("\n\n")[:-2]]
    deltas = [choice["delta"] for event in events for choice in event["choices"]]
    assert "".join(delta.get("content", "") for delta in deltas) == expected
    assert events[-1]["usage"]["completion_tokens"] > 0


# --- many requests at a time


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_asyncio_openai_client_gets_sixteen_replies_at_once_as_alone(port, stream):
    talks = [
        {
            "messages": [{"role": "user", "content": "the same beginning " * 20 + f"of {n}"}],
            "temperature": n % 3,
            "seed": n,
            "max_tokens": 8 + n,
        }
        for n in range(16)
    ]
    alone = [ask(port, body=talk)[2]["choices"][0] for talk in talks]

    async def reply(client, talk):
        answer = await client.chat.completions.create(model="any", stream=stream, **talk)
        if not stream:
            return answer.choices[0].message.content, answer.choices[0].finish_reason
        chunks = [chunk.choices[0] async for chunk in answer]
        return "".join(c.delta.content or "" for c in chunks), chunks[-1].finish_reason

    async def together():
        url = f"http://127.0.0.1:{port}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="any", max_retries=0) as client:
            return await asyncio.gather(*(reply(client, talk) for talk in talks))

    expected = [(choice["message"]["content"], choice["finish_reason"]) for choice in alone]
    assert asyncio.run(together()) == expected


def test_one_address_has_a_limit_and_behind_a_proxy_addresses_differ(clone):
    body = {"messages": HI, "max_tokens": 200, "seed": 1}
    with serving(clone, "--max-tokens", 200, "--per-client", 2) as (port, _):
        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            for headers in ({}, {"X-Forwarded-For": "6.6.6.6, 10.0.0.1"}):
                asked = [pool.submit(ask, port, body=body, **headers) for _ in range(6)]
                answers = [future.result() for future in asked]
                over = [answer for answer in answers if answer[0] != 200]
                assert 1 <= len(over) <= 4
                for status, head, answer in over:
                    assert (status, head["retry-after"]) == (429, "5")
                    assert answer["error"]["code"] == "rate_limit_exceeded"
            others = [{"X-Forwarded-For": f"6.6.6.6, 10.0.0.{n}"} for n in range(6)]
            asked = [pool.submit(ask, port, body=body, **headers) for headers in others]
            assert all(future.result()[0] == 200 for future in asked)


def test_too_long_a_conversation_is_a_400_that_says_so(clone):
    with serving(clone, "--max-prompt", 100) as (port, _):
        status, _, answer = ask(port, body={"messages": [{"role": "user", "content": "x" * 101}]})
        error = answer["error"]
        assert (status, error["param"], error["code"]) == (
            400,
            "messages",
            "context_length_exceeded",
        )
        assert greedy(port, [{"role": "user", "content": "x" * 100}])[0]


@pytest.fixture(scope="module")
def decoder(clone):
    return generate.Decoder(load_model(str(clone)), load_tokenizer(clone), 512, slots=2)


def make_queue(decoder, per_client=99, timeout=60):
    """Return a RequestQueue whose batch notes what each step reads, and takes a while."""
    queue = request_queue.RequestQueue(
        decoder, "Ann", SimpleNamespace(per_client=per_client, timeout=timeout)
    )
    queue.steps = []
    step = queue.batch.step

    def noting_step():
        time.sleep(0.005)
        try:
            return step()
        finally:
            queue.steps.append([len(row.cached) for row in queue.batch.rows])

    queue.batch.step = noting_step
    return queue


def make_request(text="hi", max_tokens=20, **fields):
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": max_tokens, "seed": 1}
    defaults = SimpleNamespace(max_tokens=400, temperature=0.7, top_p=0.95, max_prompt=10**6)
    return server.ChatRequest(json.dumps(body | fields).encode(), "Ann", "Bob", defaults, False)


def text_of(job):
    return "".join(job.texts.get_nowait() for _ in range(job.texts.qsize()))


def test_who_has_fewer_answers_under_way_is_next(decoder):
    async def main():
        queue, ended = make_queue(decoder), []
        for client in ("a", "a", "a", "a", "a", "b"):
            job = queue.submit(make_request(f"question {len(ended)}"), client)
            job.result.add_done_callback(lambda _, client=client: ended.append(client))
        await queue.worker
        return ended

    # Two slots: when the first of a's leaves, b is next, though it came last
    assert "b" in asyncio.run(main())[:4]


def test_timeout_ends_a_reply_early_and_refuses_who_waits(decoder):
    async def main():
        whole = make_queue(decoder)
        complete = whole.submit(make_request(max_tokens=200), "a")
        await whole.worker
        queue = make_queue(decoder, timeout=0.3)
        jobs = [queue.submit(make_request(max_tokens=200), "a") for _ in range(3)]
        await queue.worker
        text = text_of(complete)
        for job in jobs[:2]:
            reason, usage = job.result.result()
            assert reason == "length" and usage["completion_tokens"] < 200
            assert text.startswith(text_of(job))
        error = jobs[2].result.exception()
        response = await server.error_response(None, error)
        assert (response.status_code, error.code) == (503, "timeout")
        assert response.headers["retry-after"] == "5"
        events = [json.loads(text[6:]) async for text in server.stream_chunks(jobs[2], {}, False)]
        assert events[-1]["error"]["code"] == "timeout" and len(events) == 2

    asyncio.run(main())


def test_hanging_up_frees_the_place_while_a_prompt_is_read(decoder):
    async def main():
        queue = make_queue(decoder)
        first = queue.submit(make_request(max_tokens=200), "a")
        while not queue.steps:
            await asyncio.sleep(0)
        long = queue.submit(make_request("word " * 1000), "b")
        while not (long.row and long.row.cached):
            await asyncio.sleep(0)
        long.result.cancel()
        next_one = queue.submit(make_request("hello", max_tokens=1), "b")
        await next_one.result
        assert not long.row.ids and len(long.row.cached) < len(long.row.prompt)
        assert queue.batch.rows == [first.row] and not first.result.done()
        await queue.worker
        assert first.result.result()[1]["completion_tokens"] > 20

    asyncio.run(main())


def test_next_turn_of_a_talk_reads_only_what_is_new_though_another_talked_between(decoder):
    async def main():
        queue, reads = make_queue(decoder), []
        job = queue.submit(make_request("what do you think of it? " * 20), "a")
        await queue.submit(make_request("another talk"), "b").result
        await queue.worker
        messages = [
            {"role": "user", "content": "what do you think of it? " * 20},
            {"role": "assistant", "content": text_of(job)},
            {"role": "user", "content": "why?"},
        ]
        handle = decoder.model.register_forward_pre_hook(
            lambda model, args: reads.append(args[0].numel())
        )
        await queue.submit(make_request(messages=messages, max_tokens=1), "a").result
        handle.remove()
        assert sum(reads) <= 32 < len(job.row.prompt), reads

    asyncio.run(main())


def test_a_failing_step_is_a_500_for_those_in_it_and_the_next_are_answered(decoder, monkeypatch):
    async def main():
        queue = make_queue(decoder)
        job = queue.submit(make_request(), "a")
        await queue.worker
        expected = text_of(job)
        with monkeypatch.context() as patch:

            def fails(*_):
                raise MemoryError

            patch.setattr(queue.batch, "forward", fails)
            jobs = [queue.submit(make_request(), "a") for _ in range(2)]
            stream = server.stream_chunks(jobs[0], {}, False)
            events = []
            with contextlib.suppress(MemoryError):
                async for chunk in stream:
                    events.append(chunk)
            assert json.loads(events[-1][6:])["error"]["type"] == "server_error"
            assert isinstance(jobs[1].result.exception(), MemoryError)
        job = queue.submit(make_request(), "a")
        await queue.worker
        assert text_of(job) == expected

    asyncio.run(main())


def test_slots_take_the_memory_that_is_said_at_the_start(tokenizer, tmp_path):
    sizes = {"num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 8}
    folder = save_mistral(tmp_path, head_dim=128, **sizes)
    predicted = 512 * 6 * 2 * 8 * 128 * 4 / 2**20  # MiB a slot: tokens, layers, k and v, heads
    body = {"messages": [{"role": "user", "content": "word " * 1000}], "max_tokens": 4}
    taken = {}
    for slots in (1, 5):
        with serving(folder, "--slots", slots) as (port, process):
            answers = f"{slots} answer{'s' * (slots > 1)} at a time"
            line = process.stdout.readline()
            assert f"{answers} in {slots * predicted / 1024:.2f} GiB" in line
            with concurrent.futures.ThreadPoolExecutor(6) as pool:
                asked = [pool.submit(ask, port, body=body | {"seed": n}) for n in range(6)]
                assert all(future.result()[0] == 200 for future in asked)
            taken[slots] = resources(process)[1]
    assert taken[5] - taken[1] == pytest.approx(4 * predicted, rel=0.1)


# --- access


def test_other_hosts_and_origins_are_refused_in_openais_shape(port):
    for method, path, headers, status in [
        ("GET", "/none", {}, 404),
        ("GET", "/v1/chat/completions", {}, 405),
        ("DELETE", "/", {}, 405),
        ("OPTIONS", "/v1/chat/completions", {}, 405),
        ("GET", "/v1/models", {"Host": "evil.example"}, 403),
        ("GET", "/", {"Host": "192.168.1.5"}, 403),
        ("GET", "/health", {"Host": f"localhost:{port}@evil"}, 403),
        ("GET", "/v1/models", {"Origin": "https://evil.example"}, 403),
        ("GET", "/v1/models", {"Origin": "null"}, 403),
        ("GET", "/v1/models", {"Origin": f"http://127.0.0.1:{port + 1}"}, 403),
        ("GET", "/v1/models", {"Origin": f"http://127.0.0.1:{port}"}, 200),
    ]:
        got, headers, answer = ask(port, method, path, **headers)
        assert got == status, (path, headers, answer)
        assert status == 200 or set(answer["error"]) == {"message", "type", "param", "code"}
        assert (
            headers["cache-control"] == "no-store"
            and headers["x-content-type-options"] == "nosniff"
            and headers["referrer-policy"] == "no-referrer"
        )
        assert "access-control-allow-origin" not in headers
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        assert ask(port, body={"messages": HI}, content_type=kind)[0] == 415


def test_long_body_is_a_413_and_slow_body_a_408(port):
    assert ask(port, body=b'"' + b"x" * 2**21 + b'"')[0] == 413
    with socket.create_connection(("127.0.0.1", port)) as slow:
        slow.sendall(POST_HEAD + b"Content-Length: 99\r\n\r\n{")
        slow.settimeout(server.BODY_SECONDS + 60)
        assert b" 408 " in slow.recv(4096)


def test_public_host_needs_token_and_name(clone, chats):
    refused(command("chat.py", clone, "--web", "--host", "0.0.0.0"), "--token", "--as")
    refused(command("chat.py", clone, "--web", "--host", "0.0.0.0", "--token", TOKEN), "--as")
    refused(command("chat.py", clone, "--web", "--token", "short"), "--token")
    for host in ("nowhere.invalid", "a..b"):
        web = ("chat.py", clone, "--web", "--host", host)
        refused(command(*web, "--token", TOKEN, "--as", "Eve"), f"--host {host}")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        web = ("chat.py", clone, "--web", "--port", taken.getsockname()[1])
        refused(command(*web), "--port")
        for flags in (("--as", "Eve"), ("--host", "0.0.0.0")):
            refused(command(*web, "--memory", chats, "--token", TOKEN, *flags), "--memory")
        for address in ("http://box", "box:8000", "a/b", "*", ""):
            refused(command(*web, "--allow-host", address), f"--allow-host {address}:")


def test_missing_package_is_named(clone, tmp_path):
    (tmp_path / "starlette.py").write_text("raise ImportError('no', name='starlette')")
    refused(
        command("chat.py", clone, "--web", env={"PYTHONPATH": f"{tmp_path}:{ROOT}"}),
        "pip install -r requirements-extra.txt",
    )


def test_public_host_checks_the_token_and_fixes_the_name(clone):
    with serving(clone, "--host", "0.0.0.0", "--token", TOKEN, "--as", "Eve") as (port, _):
        mine = {"Authorization": f"Bearer {TOKEN}"}
        for wrong in (
            {},
            {"Authorization": "Bearer "},
            {"Authorization": TOKEN},
            {"Authorization": f"Bearer {TOKEN}x"},
            {"Authorization": "Bearer \xe9"},
        ):
            status, headers, answer = ask(port, "GET", "/v1/models", **wrong)
            assert (status, answer["error"]["code"], headers["www-authenticate"]) == (
                401,
                "invalid_api_key",
                "Bearer",
            )
            assert (
                ask(port, "GET", "/persona", **wrong)[0]
                == ask(port, body={"messages": HI}, **wrong)[0]
                == 401
            )
        page = ask(port, "GET", "/")
        assert page[0] == 200 and not {"Ann", "Bob", "Eve"} & set(re.findall(r"\w+", page[2]))
        assert ask(port, "GET", "/persona", **mine)[2] == {
            "me": "Ann",
            "you": "Eve",
            "contacts": [],
        }
        for host in ("192.168.1.5:8000", "clone.example.org", "host.docker.internal:8000"):
            assert (
                ask(port, "GET", "/persona", Host=host, Origin="https://clone.example.org", **mine)[
                    0
                ]
                == 200
            )
            assert (
                ask(port, "GET", "/", Host=host)[0]
                == ask(port, "GET", "/health", Host=host)[0]
                == 200
            )
            assert ask(port, "GET", "/persona", Host=host)[0] == 401
        as_bob = {"messages": [{"role": "user", "name": "Bob", "content": "hi"}]}
        assert ask(port, body=as_bob, **mine)[0] == 403
        assert ask(port, body={"messages": HI}, **mine)[0] == 200


def test_without_the_token_only_the_page_and_health_exist(clone):
    """However a path is spelled, and whether it exists or not; on loopback too."""
    tricks = (
        "/v1/models /models /persona //v1/models ///persona /v1//models/ /persona/ /%2fpersona "
        "/%70ersona /v1%2fmodels /%76%31/models /./persona /%2e/persona /x/../persona "
        "/health/../persona /health/..%2fpersona /health/%2e%2e/persona /health/persona /PERSONA "
        "/;/persona /persona;x /persona?x /none /v1 /docs /static/../server.py /health%00 "
        "/healthz /v1/health/x \\persona * http://127.0.0.1/persona http://evil.example//v1/models"
    )
    with serving(clone, "--token", TOKEN, "--as", "Eve") as (port, _):
        for path in tricks.split():
            for method in ("GET", "HEAD", "OPTIONS", "DELETE"):
                status = status_of(port, method, path)
                assert status == 401, (method, path, status)
            assert ask(port, path=path, body={"messages": HI})[0] == 401, path
        mine = {"Authorization": f"Bearer {TOKEN}"}
        assert ask(port, "GET", "/none", **mine)[0] == 404
        assert ask(port, "GET", "//persona/", **mine)[2] == {
            "me": "Ann",
            "you": "Eve",
            "contacts": [],
        }


def status_of(port, method, path):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        connection.request(method, path)
        return connection.getresponse().status


def test_without_a_token_only_allowed_host_names_are_answered(clone):
    with serving(clone, "--allow-host", "host.docker.internal", "--allow-host", "Box.example") as (
        port,
        _,
    ):
        for host, status in [
            ("localhost", 200),
            (f"127.0.0.1:{port}", 200),
            ("host.docker.internal:8000", 200),
            ("BOX.example", 200),
            ("evil.example", 403),
            ("box.example.evil.example", 403),
            ("box.example:80:80", 403),
            ("", 403),
        ]:
            for path in ("/", "/health", "/persona", "/v1/models", "//persona"):
                got, _, answer = ask(port, "GET", path, Host=host)
                assert got == status, (host, path, answer)
        assert (
            ask(port, "GET", "/persona", Host="box.example", Origin="https://box.example")[0] == 200
        )
        assert (
            ask(port, "GET", "/persona", Host="box.example", Origin="https://evil.example")[0]
            == 403
        )


# --- behind a proxy


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


def nginx_config(snippet, port, folder):
    """Return docs/SERVE.md's server on loopback, without HTTPS, that writes into `folder` alone."""
    snippet = re.sub(r"    ssl_.*\n", "", snippet)
    snippet = snippet.replace("listen 443 ssl;", f"listen 127.0.0.1:{port};")
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    folders = " ".join(f"{kind}_temp_path {folder}/{kind};" for kind in kinds)
    return (
        f"daemon off; pid {folder}/pid; error_log stderr; events {{}}\n"
        f"http {{ access_log off; {folders}\n{snippet}}}\n"
    )


def caddy_config(snippet, port, folder):
    bound = f"http://clone.example.org:{port} {{\n\tbind 127.0.0.1"
    return "{\n\tadmin off\n}\n" + snippet.replace("clone.example.org {", bound)


PROXIES = {
    "nginx": (nginx_config, ["-e", "stderr", "-p", ".", "-c"]),
    "caddy": (caddy_config, ["run", "--adapter", "caddyfile", "--config"]),
}


@contextlib.contextmanager
def proxied(name, port, folder):
    """Run the proxy of docs/SERVE.md in front of `port`; yield its own port."""
    program = shutil.which(name) or shutil.which(name, path="/usr/sbin")
    if not program:
        pytest.skip(f"no {name}: apt-get install {name}")
    config, flags = PROXIES[name]
    docs = (ROOT / "docs/SERVE.md").read_text()
    (snippet,) = re.findall(rf"^```{name}\n(.*?)^```", docs, re.M | re.S)
    outside = free_port()
    snippet = snippet.replace("127.0.0.1:8000", f"127.0.0.1:{port}")
    (folder / "proxy.conf").write_text(config(snippet, outside, folder))
    env = os.environ | dict.fromkeys(("HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME"), str(folder))
    with open(folder / "errors", "w") as errors:
        process = subprocess.Popen(
            [program, *flags, folder / "proxy.conf"],
            cwd=folder,
            env=env,
            stdout=errors,
            stderr=errors,
        )
    try:
        deadline = time.time() + 30
        while time.time() < deadline and process.poll() is None:
            with contextlib.suppress(ConnectionError):
                socket.create_connection(("127.0.0.1", outside)).close()
                break
            time.sleep(0.05)
        assert process.poll() is None, (folder / "errors").read_text()
        yield outside
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.parametrize("name", PROXIES)
def test_proxies_pass_the_page_the_api_and_streams(clone, tmp_path, name):
    os.chmod(tmp_path, 0o755)  # nginx's worker is another user
    site = {"Host": "clone.example.org", "Origin": "https://clone.example.org"}
    mine = {**site, "Authorization": f"Bearer {TOKEN}"}
    with (
        serving(clone, "--token", TOKEN, "--as", "Eve", "--max-tokens", 200) as (port, _),
        proxied(name, port, tmp_path) as outside,
    ):
        assert (
            "AI imitation" in ask(outside, "GET", "/", **site)[2]
            and ask(outside, "GET", "/health", **site)[0] == 200
        )
        for path in ("/persona", "//persona", "/health/../persona", "/v1/models", "/none"):
            assert ask(outside, "GET", path, **site)[0] == 401
        assert ask(outside, "GET", "/persona", **mine)[2]["you"] == "Eve"
        body = {"messages": HI, "temperature": 0, "max_tokens": 20}
        status, _, answer = ask(outside, body=body, **mine)
        assert status == 200 and answer == {
            **ask(port, body=body, **mine)[2],
            **{key: answer[key] for key in ("id", "created")},
        }
        assert ask(outside, body=body, **site)[0] == 401
        # While others are answered the first event comes at once, if nothing holds it back.
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            long = {"messages": HI * 20, "seed": 1, "max_tokens": 200}
            others = [
                pool.submit(ask, port, body=long, Authorization=mine["Authorization"])
                for _ in range(4)
            ]
            time.sleep(0.2)
            came = [(time.time(), "")]
            connection = http.client.HTTPConnection("127.0.0.1", outside, timeout=60)
            text = json.dumps({**body, "stream": True, "stop": ["never"] * 5})
            connection.request(
                "POST", "/v1/chat/completions/", text, {"content-type": "application/json", **mine}
            )
            came += [(time.time(), line) for line in connection.getresponse()]
            connection.close()
            assert all(other.result()[0] == 200 for other in others)
        began, first, end = (came[number][0] for number in (0, 1, -1))
        assert first - began < (end - began) / 3, (first - began, end - began)
        chunks = [json.loads(line[6:]) for _, line in came[1:] if line.startswith(b"data: {")]
        reply = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
        assert (
            reply == answer["choices"][0]["message"]["content"] and came[-2][1] == b"data: [DONE]\n"
        )


# --- hostile clients


class Hostile:
    """Random requests, valid and broken, one for each number."""

    values = [
        None, True, -1, 0, 1e308, -1e-320, 10**400, "", "x", "\ud800", "\0", "<|im_end|>",
        "\u202e\u2066", [], {}, [[]], [None], {"": ""}, "9" * 999, "\n" * 999, [{"type": "text"}],
        [{"type": "text", "text": "\udfff"}], "\U0001f986" * 300, ">>> >>>\n>>>",
        "\ufffd\ufeff\u2028",
    ]  # fmt: skip
    names = [
        "model", "messages", "stream", "stop", "temperature", "top_p", "max_tokens",
        "max_completion_tokens", "seed", "n", "tools", "stream_options", "logprobs",
        "response_format", "user",
    ]  # fmt: skip
    message_names = ["role", "content", "name", "tool_calls"]
    methods = [b"POST"] * 9 + [b"GET", b"PUT", b"HEAD", b"OPTIONS", b"BREW", b"CONNECT"]
    paths = [b"/v1/chat/completions"] * 12 + [
        b"/v1/models/%00%ff", b"//", b"/../server.py", b"/" + b"x" * 9000, b"*", b"/persona?x=%",
        b"http://evil/",
    ]  # fmt: skip
    versions = [b" HTTP/1.1"] * 9 + [b" HTTP/1.0", b"", b" HTTP/9"]
    hosts = [b"localhost"] * 9 + [b"", b"[", b"[::1]:99999999", b"evil", b"127.0.0.1:x", b"\xe9"]
    content_types = [b"application/json"] * 9 + [
        b"application/json; charset=\xff", b"text/plain", b"",
    ]  # fmt: skip
    headers = [
        b"Authorization: \xe9", b"Expect: 100-continue", b"Origin: null", b"X: " + b"y" * 70000,
        b"Upgrade: websocket\r\nConnection: upgrade", b"Bad Header", b"Content-Length: -1",
        b"Transfer-Encoding: gzip", b"Host: other", b"Cookie: " + b";" * 999,
    ]  # fmt: skip

    def __init__(self, number):
        self.random = random.Random(number)
        self.choice = self.random.choice

    def fields(self):
        fields = {"messages": [{"role": "user", "content": "hi"}]}
        fields["max_tokens"] = self.random.randint(1, 4)
        for _ in range(self.random.randint(0, 3)):
            target, names = fields, self.names
            messages = fields.get("messages")
            if isinstance(messages, list) and messages and isinstance(messages[0], dict):
                if self.random.random() < 0.5:
                    target, names = messages[0], self.message_names
            target[self.choice(names)] = self.choice(self.values)
        return fields

    def body(self):
        text = json.dumps(self.fields()).encode()
        broken = [
            text[: self.random.randint(0, len(text))],
            b"[" * 100000,
            b'{"a":' * 50000,
            text.replace(b"1", b"NaN"),
            text.replace(b"hi", b"\xff\xfe"),
            b"9" * 5000,
            b"",
            text[:-1] + b',"n":Infinity}',
            self.random.randbytes(99),
            text + text,
            b"\xef\xbb\xbf" + text,
        ]
        return self.choice([text, text, text, *broken])

    def request(self):
        body = self.body()
        lines = [
            self.choice(self.methods) + b" " + self.choice(self.paths) + self.choice(self.versions),
            b"Host: " + self.choice(self.hosts),
            b"Content-Type: " + self.choice(self.content_types),
            *self.random.sample(self.headers, self.choice([0, 0, 0, 1, 2])),
        ]
        if self.random.random() < 0.25:
            lines.append(b"Transfer-Encoding: chunked")
            pieces = [body[n : n + 50] for n in range(0, min(len(body), 5000), 50)]
            body = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
            body += self.choice([b"0\r\n\r\n", b"zz\r\n", b""])
        else:
            length = len(body) + self.choice([0] * 9 + [9, -9])
            lines.append(b"Content-Length: %d" % max(0, length))
        request = b"\r\n".join(lines) + b"\r\n\r\n" + body
        if self.random.random() < 0.15:
            return request[: self.random.randint(0, len(request))]
        return request


def resources(process):
    """Return the server's number of threads, MiB of memory and number of open files."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    read = lambda name: int(re.search(rf"{name}:\s*(\d+)", status)[1])
    return read("Threads"), read("VmRSS") / 1024, len(os.listdir(f"/proc/{process.pid}/fd"))


def test_hostile_requests_neither_crash_nor_grow_the_server(clone):
    with serving(clone) as (port, process):
        expected = greedy(port)
        begin = resources(process)
        for number in range(HOSTILE):
            with (
                socket.create_connection(("127.0.0.1", port)) as one,
                contextlib.suppress(ConnectionError, TimeoutError),
            ):
                one.settimeout(0.3 if number % 4 else 0.02)  # some wait for the answer, some leave
                one.sendall(Hostile(number).request())
                answer = one.recv(65536)
                assert not answer.startswith(b"HTTP/1.1 500"), (number, answer)
            assert process.poll() is None, number
        deadline = time.time() + 30
        while resources(process)[2] > begin[2] and time.time() < deadline:
            time.sleep(0.1)
        threads, memory, files = resources(process)
        assert greedy(port) == expected
        assert threads <= begin[0] and files <= begin[2] and memory < begin[1] + 60, (
            begin,
            (threads, memory, files),
        )
        assert "Traceback" not in process.errors()


def test_silent_and_slow_connections_are_closed(port):
    ends = []
    for opening in (
        b"",
        b"GET / HTTP/1.1\r\nHost: loc",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET / HT",
    ):
        one = socket.create_connection(("127.0.0.1", port))
        one.settimeout(2 * server.BODY_SECONDS + 60)
        one.sendall(opening)
        ends.append(one)
    for one in ends:
        with one, contextlib.suppress(ConnectionResetError):
            while one.recv(4096):
                pass


def test_many_talks_at_once_get_the_same_replies_as_alone(port):
    def talk(number):
        draw, messages, replies = random.Random(number), [], []
        for _ in range(draw.randint(1, 4)):
            messages.append(
                {
                    "role": "user",
                    "name": draw.choice(["Bob", "Eve", "Zoë"]),
                    "content": draw.choice(["hi", "why?", "да", "🦆", "a\nb"]) * draw.randint(1, 5),
                }
            )
            text, usage, reason = greedy(port, messages, max_tokens=12)
            assert text and usage["completion_tokens"] <= 12 and reason in ("stop", "length")
            messages.append({"role": "assistant", "content": text})
            replies.append(text)
        return replies

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        together = list(pool.map(talk, range(TALKS)))
    assert together == [talk(number) for number in range(TALKS)]


# --- clients that come and go


class Storm:
    """Clients that ask, stall, hang up and come back; each reply is compared with the one alone."""

    def __init__(self, port):
        self.port = port
        self.talks, texts = [], set()
        for seed in range(24):
            draw = random.Random(seed)
            begin = draw.choice(["hi", "the same long beginning " * draw.randint(1, 40)])
            body = {"messages": [], "seed": seed, "temperature": draw.choice([0, 0.7, 1.5])}
            body["max_tokens"] = draw.randint(1, 24)
            for turn in ("one", "two"):
                content = f"{begin} {turn} {draw.randint(0, 9)}"
                body["messages"] = [*body["messages"], {"role": "user", "content": content}]
                status, _, answer = ask(port, body=body)
                assert status == 200, answer
                reply = answer["choices"][0]["message"]["content"]
                # The server looks up a turn's ids by its text: the latest that had it
                if reply in texts:
                    break
                texts.add(reply)
                self.talks.append((dict(body), self.outcome(answer)))
                body["messages"] = [
                    *body["messages"],
                    {"role": "assistant", "content": reply},
                ]
        self.counts = dict.fromkeys(("whole", "streamed", "left", "refused"), 0)
        self.failures = []

    @staticmethod
    def outcome(answer):
        choice = answer["choices"][0]
        return choice["message"]["content"], choice["finish_reason"], answer["usage"]

    def run(self, seconds):
        until = time.time() + seconds
        threads = [threading.Thread(target=self.client, args=(n, until)) for n in range(32)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def client(self, number, until):
        draw = random.Random(number)
        while time.time() < until and not self.failures:
            try:
                self.request(draw)
            except Exception as error:
                self.failures.append(repr(error))
            if draw.random() < 0.3:
                time.sleep(draw.random() / 2)

    def request(self, draw):
        body, expected = draw.choice(self.talks)
        stream = draw.random() < 0.5
        if stream:
            body = body | {"stream": True, "stream_options": {"include_usage": True}}
        text = json.dumps(body).encode()
        request = POST_HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(text) + text
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as one:
            if draw.random() < 0.1:  # stalls in its request
                half = draw.randrange(len(request))
                one.sendall(request[:half])
                if draw.random() < 0.5:
                    self.counts["left"] += 1
                    return
                time.sleep(draw.random())
                request = request[half:]
            one.sendall(request)
            if draw.random() < 0.3:  # hangs up
                time.sleep(draw.choice([0, 0.02, 0.3]))
                if draw.random() < 0.5:
                    one.recv(200)
                self.counts["left"] += 1
                return
            if draw.random() < 0.1:  # stalls in the reply
                time.sleep(draw.random())
            answer = http.client.HTTPResponse(one)
            answer.begin()
            text = answer.read().decode()
        if answer.status in (503, 429):
            self.counts["refused"] += 1
            return
        assert answer.status == 200, text
        got = self.streamed_outcome(text) if stream else self.outcome(json.loads(text))
        assert got == expected, (body, got, expected)
        self.counts["streamed" if stream else "whole"] += 1

    @staticmethod
    def streamed_outcome(text):
        events = text.split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""], text
        chunks = [json.loads(event[6:]) for event in events[:-2] if event.startswith("data: ")]
        choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
        content = "".join(choice["delta"].get("content", "") for choice in choices)
        return content, choices[-1]["finish_reason"], chunks[-1]["usage"]


def test_clients_that_stall_hang_up_and_come_back_get_the_replies_of_each_alone(clone):
    with serving(clone, "--slots", 4, "--per-client", 99) as (port, process):
        storm = Storm(port)
        storm.run(2)
        begin = resources(process)
        storm.run(STORM)
        assert not storm.failures, storm.failures[:3]
        assert min(storm.counts[kind] for kind in ("whole", "streamed", "left")) > 0, storm.counts
        deadline = time.time() + 30
        while resources(process)[2] > begin[2] and time.time() < deadline:
            time.sleep(0.1)
        for body, expected in storm.talks:
            assert Storm.outcome(ask(port, body=body)[2]) == expected
        threads, memory, files = resources(process)
        print(storm.counts, f"memory {memory / begin[1]:.3f} of that after two seconds")
        assert threads <= begin[0] and files <= begin[2] + 1, (begin, threads, files)
        assert memory < 1.05 * begin[1], (begin, memory)
        assert "Traceback" not in process.errors()


# --- the page, in a browser


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium")
    if not chromium:
        pytest.skip("no chromium: apt-get install chromium")
    sync = pytest.importorskip("playwright.sync_api")
    with sync.sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path=chromium, args=["--no-sandbox"]
        )  # root may not have one
        yield browser
        browser.close()


def test_human_pace_streams_when_due_and_may_ignore_leaves_unanswered(decoder, monkeypatch):
    """Waits are noted, not waited for."""
    waits = []

    async def sleep_until(moment):
        waits.append(moment - time.monotonic())
        return
        yield  # it's a generator

    monkeypatch.setattr(server, "sleep_until", sleep_until)
    everyone = {"delay": {"50%": 60}, "unanswered": 0}
    timing = {"everyone": everyone, "contacts": {"Eve": {"unanswered": 1}}}
    pacer = Pacer(Pace(timing, longest_wait=99), human=True, may_ignore=True, seed=1)
    options = chat.Options(max_tokens=24, temperature=0)
    app = server.application(decoder, "Ann", "Bob", ["Bob", "Eve"], options, pacer)
    with TestClient(app) as client:
        post = lambda **body: client.post("/v1/chat/completions", json={"messages": HI, **body})
        content = lambda answer: answer.json()["choices"][0]["message"]["content"]
        whole = content(post())
        assert whole and not waits  # only streams are paced
        text = post(stream=True).text
        from_eve = post(messages=[{"role": "user", "name": "Eve", "content": "hi"}])
        assert content(from_eve) == ""
    comments = re.findall("^: ([a-z]+)$", text, re.MULTILINE)
    lines = [line for line in whole.split("\n") if line.strip()]
    assert comments == ["read"] + ["typing"] * len(lines)
    chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    contents = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(contents) == "\n".join(lines)
    assert len(waits) == 2 * len(lines) and 30 < waits[1] <= 60


@pytest.fixture
def page(browser):
    """A page; an error in its script or against its policy fails the test."""
    page = browser.new_page()
    page.errors = []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on(
        "console",
        lambda line: page.errors.append(line.text) if "Failed to load" not in line.text else None,
    )
    page.set_default_timeout(15000)
    yield page
    assert page.errors == []
    page.close()


def bubbles(page):
    return page.locator(".bubble > span:last-child").all_text_contents()


def say(page, text):
    page.fill("#text", text)
    page.press("#text", "Enter")


def test_page_shows_the_reply_as_bubbles_and_sends_the_conversation(page, port):
    page.goto(f"http://127.0.0.1:{port}/")
    page.wait_for_selector("text=AI imitation of Ann")
    page.select_option("#you", "Eve")
    with page.expect_request("**/v1/chat/completions") as asked:
        say(page, "hi <b>there</b>\n\n  two ")
    assert asked.value.post_data_json["messages"] == [
        {"role": "user", "name": "Eve", "content": "hi <b>there</b>\ntwo"}
    ]
    page.wait_for_selector("#send:visible")
    texts = bubbles(page)
    assert (
        texts[:2] == ["hi <b>there</b>", "two"]
        and len(texts) > 2
        and page.locator("#log b").count() == 0
    )
    with page.expect_request("**/v1/chat/completions") as asked:
        say(page, "more")
    assert [m["role"] for m in asked.value.post_data_json["messages"]] == [
        "user",
        "assistant",
        "user",
    ]
    assert asked.value.post_data_json["messages"][1]["content"] == "\n".join(texts[2:])
    page.wait_for_selector("#send:visible")
    page.click("#retry")
    page.wait_for_selector("#send:visible")
    assert bubbles(page)[: len(texts) + 1] == [*texts, "more"]
    page.click("#clear")
    assert (
        bubbles(page) == []
        and page.is_visible("#empty")
        and page.evaluate("document.activeElement.id") == "text"
    )


WATCH_STATUS = """
    window.states = [];
    new MutationObserver(() => {
        const shown = ["read", "typing"].filter(id => !document.getElementById(id).hidden);
        const state = shown.join() || "message";
        if (states.at(-1) != state) states.push(state);
    }).observe(document.querySelector("main"), {subtree: true, attributes: true, childList: true});
"""


@contextlib.contextmanager
def serving_here(monkeypatch, *args):
    """Call server.serve(socket, *args) in a thread, until the block ends; yield the port."""
    servers = []

    class Server(server.uvicorn.Server):
        def run(self, sockets):
            servers.append(self)
            super().run(sockets)

    monkeypatch.setattr(server.uvicorn, "Server", Server)
    sock = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.serve, args=(sock, *args))
    thread.start()
    try:
        yield sock.getsockname()[1]
    finally:
        servers[0].should_exit = True
        thread.join(30)


def test_page_shows_read_then_typing_then_the_message(page, decoder, tmp_path, monkeypatch):
    """Bob is answered after 1.5 seconds, Eve never."""
    timing = {
        "everyone": {"delay": {"50%": 1.5}, "unanswered": 0},
        "contacts": {"Eve": {"unanswered": 1}},
        "typing": {"pause": 0.7, "characters_per_second": 1000, "spread": {"50%": 0.1}},
    }
    contacts = [{"name": "Bob"}, {"name": "Eve"}]
    persona = {"me": "Ann", "contacts": contacts, "timing": timing}
    (tmp_path / "persona.json").write_text(json.dumps(persona))
    flags = {"temperature": 0, "max_tokens": 24, "pace": "human", "may_ignore": True}
    options = chat.Options(str(tmp_path), **flags)
    pacer = Pacer.load(tmp_path, options)
    with serving_here(monkeypatch, decoder, "Ann", "Bob", options, pacer) as port:
        greedy(port)  # the first reply is the slowest
        page.goto(f"http://127.0.0.1:{port}/")
        page.wait_for_selector("text=AI imitation of Ann")
        page.evaluate(WATCH_STATUS)
        say(page, "hi")
        page.wait_for_selector("#send:visible")
        states = page.evaluate("states")  # it begins before the server has said that it waits
        assert states[:4] == ["typing", "read", "typing", "message"], states
        assert len(bubbles(page)) > 1
        page.click("#clear")
        page.select_option("#you", "Eve")
        say(page, "hi")
        page.wait_for_selector("#send:visible")
        assert bubbles(page) == ["hi"] and page.is_visible("#read")


def stream(*texts, end=True):
    chunks = [
        {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}
        for text in texts
    ]
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + (
        "data: [DONE]\n\n" if end else ""
    )


def test_page_retries_a_lost_connection_and_keeps_typed_text(page, port):
    replies = [None, stream("half an ans", end=False), stream("well", "\nhere ", "I am")]

    def reply(route):
        text = replies.pop(0)
        route.fulfill(content_type="text/event-stream", body=text) if text else route.abort()

    page.route("**/v1/chat/completions", reply)
    page.goto(f"http://127.0.0.1:{port}/")
    page.wait_for_selector("text=AI imitation of Ann")
    say(page, "still there?")
    page.wait_for_selector("text=The connection was lost")
    page.fill("#text", "being written")
    page.wait_for_selector("text=here I am")
    page.wait_for_selector("#send:visible")
    assert (
        bubbles(page) == ["still there?", "well", "here I am"]
        and page.input_value("#text") == "being written"
    )
    assert page.is_hidden("#error") and not replies


def test_page_stops_a_reply_and_retries(page, port):
    page.route("**/v1/chat/completions", lambda route: None)  # it never comes
    page.goto(f"http://127.0.0.1:{port}/")
    page.wait_for_selector("text=AI imitation of Ann")
    say(page, "hi")
    page.wait_for_selector("#typing:visible")
    page.press("#text", "Escape")
    page.wait_for_selector("#send:visible")
    assert bubbles(page) == ["hi"] and page.is_hidden("#typing")
    page.unroute("**/v1/chat/completions")
    page.click("#retry")
    page.wait_for_selector(".bubble:not(.me)")


def test_page_has_a_strict_policy_and_accessible_names(page, port, browser):
    policy = page.goto(f"http://127.0.0.1:{port}/").headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    page.wait_for_selector("text=AI imitation of Ann")
    assert (
        page.get_by_role("log", name="Conversation").count()
        == page.get_by_role("textbox", name="Message").count()
        == 1
    )
    assert (
        page.get_by_role("combobox", name="You are").count()
        == page.get_by_role("button", name="Send").count()
        == 1
    )
    assert page.evaluate("try { document.body.innerHTML = '<i>'; false } catch { true }")
    page.errors.clear()  # of just that
    for width in (320, 375, 1200):
        page.set_viewport_size({"width": width, "height": 700})
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_page_takes_the_token_from_its_address(page, clone):
    with serving(clone, "--host", "0.0.0.0", "--token", TOKEN, "--as", "Eve") as (port, _):
        page.goto(f"http://127.0.0.1:{port}/")
        page.wait_for_selector("text=needs the token")
        page.goto(f"http://127.0.0.1:{port}/#{TOKEN}")
        page.wait_for_selector("text=AI imitation of Ann")
        assert page.is_hidden("#you") and page.text_content("#fixed") == "Eve"
        say(page, "hi")
        page.wait_for_selector(".bubble:not(.me)")


def test_page_behind_a_proxy_takes_the_token_from_its_address(page, clone, tmp_path):
    os.chmod(tmp_path, 0o755)
    with (
        serving(clone, "--token", TOKEN, "--as", "Eve") as (port, _),
        proxied("nginx", port, tmp_path) as outside,
    ):
        page.goto(
            f"http://127.0.0.1:{outside}/#{TOKEN}"
        )  # its Origin is not the Host that nginx sends
        page.wait_for_selector("text=AI imitation of Ann")
        assert page.is_hidden("#you") and page.text_content("#fixed") == "Eve"
        say(page, "hi")
        page.wait_for_selector(".bubble:not(.me)")
