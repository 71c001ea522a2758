"""A real server process over a random model, asked by sockets, by the official client, and by a browser."""

import concurrent.futures
import contextlib
import http.client
import json
import os
import re
import socket
import subprocess
import sys
import time

import openai
import pytest
import torch
from conftest import ROOT, command, refused

import checkpoint
import generate
import server
import tokenizer
from data import Turn

HOSTILE, TALKS = int(os.environ.get("HOSTILE", 200)), int(os.environ.get("TALKS", 10))
TOKEN = "correct-horse-battery"
HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def clone(base, words, tmp_path_factory):
    """A random model folder with ChatML tokens and a persona."""
    folder = tmp_path_factory.mktemp("clone")
    model = checkpoint.Transformer(checkpoint.with_vocabulary(checkpoint.read_config(base), 32002))
    checkpoint.fill(model, base)
    checkpoint.save_model(model, folder, words, torch.float32)
    words.save(folder)
    (folder / "persona.json").write_text(json.dumps({"me": "Ann", "contacts": [{"name": "Bob"}, {"name": "Eve"}]}))
    return folder


@contextlib.contextmanager
def serving(clone, *flags):
    """→ (port, process)"""
    words = [sys.executable, "chat.py", clone, "--web", "--port", 0, "--weights", "fp32", "--device", "cpu", "--max-tokens", 24, *flags]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*map(str, words)], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        found = re.search(r":(\d+)/", process.stdout.readline())
        assert found, process.stderr.read()
        yield int(found[1]), process
    finally:
        process.terminate()
        process.communicate(timeout=30)


@pytest.fixture(scope="module")
def port(clone):
    with serving(clone) as (port, process):
        yield port
        assert process.poll() is None


@pytest.fixture
def client(port):
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any", max_retries=0) as client:
        yield client


def ask(port, method="POST", path="/v1/chat/completions", body=None, **headers):
    """→ (status, headers, the JSON or text of the answer)"""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    if body is not None:
        headers = {"content-type": "application/json", **headers}
        body = body if isinstance(body, bytes | str) else json.dumps(body)
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, answer.headers, json.loads(text) if answer.headers["content-type"] == "application/json" else text


def greedy(port, messages=HI, **more):
    status, _, answer = ask(port, body={"messages": messages, "temperature": 0, **more})
    assert status == 200, answer
    return answer["choices"][0]["message"]["content"], answer["usage"], answer["choices"][0]["finish_reason"]


# --- the API


def test_the_official_client_gets_what_the_decoder_says_streamed_or_not(client, clone):
    decoder = generate.Decoder(checkpoint.load_model(str(clone)), tokenizer.load(clone), 512)
    turns = [Turn("Bob", False, "", ["hi", "you there?"]), Turn("Ann", True, "", ["yes"]), Turn("Bob", False, "", ["good"])]
    answer = generate.Answer(decoder, turns, "Ann", 24, 0)
    said = "\n".join([list(answer), answer.messages][1])
    messages = [
        {"role": "system", "content": "You are a pirate."},
        {"role": "user", "content": "hi"},
        {"role": "user", "content": [{"type": "text", "text": "you there?"}]},
        {"role": "assistant", "content": "yes\n\n"},
        {"role": "user", "content": " good "},
    ]
    whole = client.chat.completions.create(model="any", messages=messages, temperature=0)
    assert whole.choices[0].message.content == said and whole.choices[0].finish_reason == ("stop" if answer.ended else "length")
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(answer.prompt), len(answer.ids))
    chunks = list(
        client.chat.completions.create(model="x", messages=messages, temperature=0, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == said
    assert chunks[-1].usage == whole.usage and chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason


def test_names_are_authors_and_a_last_turn_of_mine_is_gone_on_with(port, clone):
    decoder = generate.Decoder(checkpoint.load_model(str(clone)), tokenizer.load(clone), 512)
    turns = [Turn("Eve", False, "", ["hi"]), Turn("Bob", False, "", ["ho"]), Turn("Ann", True, "", ["well"])]
    answer = generate.Answer(decoder, turns, "Ann", 24, 0)
    said = "\n".join([list(answer), answer.messages][1])
    messages = [
        {"role": "user", "name": "Eve", "content": "hi"},
        {"role": "user", "content": "ho"},
        {"role": "assistant", "content": "well"},
    ]
    assert greedy(port, messages)[0] == said


def test_a_stop_string_ends_it_and_no_part_of_it_is_shown(client, port):
    said = greedy(port)[0]
    stop = said[len(said) // 2 :][:3]
    wanted = said[: said.index(stop)]
    chunks = list(client.chat.completions.create(model="any", messages=HI, temperature=0, stop=stop, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == wanted and chunks[-1].choices[0].finish_reason == "stop"
    assert greedy(port, stop=["never said", stop])[0] == wanted
    assert greedy(port, stop=said + "x")[0] == said  # what was held back comes at the end


def test_what_may_still_become_a_stop_string_is_held_back():
    assert server.cut("hello", []) == (False, 5)
    assert server.cut("hello", ["lo w"]) == (False, 3)
    assert server.cut("hello wide", ["lo w", "e"]) == (True, 1)
    assert server.cut("aab", ["abc", "bx"]) == (False, 1)


def test_limits_and_seeds_are_kept(port):
    assert greedy(port, max_tokens=3)[1]["completion_tokens"] == 3 and greedy(port, max_completion_tokens=2)[2] == "length"
    assert greedy(port, max_tokens=10**6)[1]["completion_tokens"] <= 24
    draw = lambda seed: ask(port, body={"messages": HI, "temperature": 1.9, "seed": seed})[2]["choices"][0]["message"]["content"]
    assert draw(1) == draw(1) != draw(2)


def test_models_and_health(client, port):
    assert [model.id for model in client.models.list()] == ["Ann"] and client.models.retrieve("Ann").id == "Ann"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("Bob")
    assert ask(port, "GET", "/health")[2] == {"status": "ok"}
    assert ask(port, "GET", "/persona")[2] == {"me": "Ann", "you": "Bob", "contacts": ["Bob", "Eve"]}


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"n": 2}, "n"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": "1"}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"seed": 2**70}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "name": "a\nb", "content": "x"}]}, "messages[0]"),
        ({"messages": HI * 2001}, "messages"),
    ],
)
def test_what_it_cannot_do_is_a_400_that_names_the_field(port, fields, named):
    status, _, answer = ask(port, body={"messages": HI, **fields})
    assert (status, answer["error"]["param"]) == (400, named), answer
    assert set(answer["error"]) == {"message", "type", "param", "code"}


def test_sixteen_clients_at_once_get_what_each_gets_alone(port):
    talks = [[{"role": "user", "content": f"question {n}"}] * (n % 3 + 1) for n in range(16)]
    alone = [greedy(port, talk) for talk in talks]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        assert list(pool.map(lambda talk: greedy(port, talk), talks)) == alone


def test_more_than_the_line_holds_are_told_to_come_back_and_who_leaves_frees_the_place(clone):
    body = json.dumps({"messages": [{"role": "user", "content": "word " * 200}], "stream": True, "seed": 1}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with serving(clone, "--max-tokens", 200) as (port, _):
        began = time.time()
        greedy(port, max_tokens=200)
        one_takes = time.time() - began
        those = [socket.create_connection(("127.0.0.1", port)) for _ in range(server.PLACES + 8)]
        for one in those:
            one.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        over = [text for text in (one.recv(4096) for one in those) if b" 503 " in text]
        assert over and all(b"retry-after: 5" in text and b"overloaded" in text for text in over)
        for one in those:
            one.close()
        began = time.time()
        while ask(port, body={"messages": HI, "max_tokens": 1})[0] == 503:
            time.sleep(0.02)
        assert time.time() - began < server.PLACES * one_takes / 4


# --- who is let in


def test_strangers_are_refused_in_openais_shape(port):
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


def test_a_body_too_long_is_a_413_and_a_slow_one_a_408(port):
    assert ask(port, body=b'"' + b"x" * 2**21 + b'"')[0] == 413
    with socket.create_connection(("127.0.0.1", port)) as slow:
        slow.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
        )
        slow.settimeout(server.SLOW + 5)
        assert b" 408 " in slow.recv(4096)


def test_elsewhere_a_token_and_a_name_are_needed(clone):
    refused(command("chat.py", clone, "--web", "--host", "0.0.0.0"), "--token", "--as")
    refused(command("chat.py", clone, "--web", "--host", "0.0.0.0", "--token", TOKEN), "--as")
    refused(command("chat.py", clone, "--web", "--token", "short"), "--token")
    refused(command("chat.py", clone, "--web", "--host", "nowhere.invalid", "--token", TOKEN, "--as", "Eve"), "--host nowhere.invalid")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        refused(command("chat.py", clone, "--web", "--port", taken.getsockname()[1]), "--port")


def test_a_missing_package_is_named(clone, tmp_path):
    (tmp_path / "starlette.py").write_text("raise ImportError('no', name='starlette')")
    refused(command("chat.py", clone, "--web", env={"PYTHONPATH": f"{tmp_path}:{ROOT}"}), "pip install -r requirements-extra.txt")


def test_elsewhere_the_token_is_checked_and_one_is_who_one_is(clone):
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
            assert (status, answer["error"]["code"], headers["www-authenticate"]) == (401, "invalid_api_key", "Bearer")
            assert ask(port, "GET", "/persona", **wrong)[0] == ask(port, body={"messages": HI}, **wrong)[0] == 401
        page = ask(port, "GET", "/")
        assert page[0] == 200 and not {"Ann", "Bob", "Eve"} & set(re.findall(r"\w+", page[2]))
        assert ask(port, "GET", "/persona", **mine)[2] == {"me": "Ann", "you": "Eve", "contacts": []}
        assert ask(port, "GET", "/persona", Host="192.168.1.5:8000", **mine)[0] == 200
        assert ask(port, "GET", "/persona", Host="evil.example", **mine)[0] == 403
        as_bob = {"messages": [{"role": "user", "name": "Bob", "content": "hi"}]}
        assert ask(port, body=as_bob, **mine)[0] == 403
        assert ask(port, body={"messages": HI}, **mine)[0] == 200
