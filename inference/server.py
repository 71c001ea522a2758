"""The page and the API of `python chat.py ckpt/ --web`, on one port: OpenAI's `/v1/chat/completions` and `/v1/models`, `/health`, and `/`.

One model, one thread: requests wait in line, and a client that leaves frees its place. With --token
it lets in who knows the token, under any host name (behind a proxy), and shows others the page and
/health alone. Without one it listens on loopback, and answers to loopback's names and --allow-host.
With --token and --as, or on another --host, every client is --as; else it may be anyone.
No conversation is written to disk or to a log.
"""

import asyncio
import base64
import concurrent.futures
import contextlib
import hashlib
import hmac
import ipaddress
import itertools
import json
import os
import re
import secrets
import socket
import sys
import threading
import time
import webbrowser
from pathlib import Path
from urllib.parse import quote

import cli
import data
from cli import UserError
from inference import generate

try:
    import h11
    import uvicorn
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
    from starlette.responses import HTMLResponse, JSONResponse, StreamingResponse
    from starlette.routing import Route
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ImportError as error:
    raise UserError(
        f"--web needs {error.name}, which is not installed", "pip install -r requirements-extra.txt"
    ) from None

MAX_QUEUE = 32  # requests in line, the one that is answered included
MAX_BODY_BYTES = 2**20  # bytes of a request
MAX_MESSAGES = 2000  # in a conversation
BODY_SECONDS = 10  # seconds that a client may take to send a request, or to read what it is sent
IDLE_SECONDS = 10  # seconds after which a stream says that it is still there
MAX_CONNECTIONS = 256
MAX_STOPS = 100  # strings in `stop`, as many clients send more than OpenAI's four
PUBLIC_PATHS = {"/", "/health", "/v1/health"}  # what needs no token: no name and no chat is in it
SECURITY_HEADERS = {
    "cache-control": "no-store",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
UNSUPPORTED = {  # fields of a request that change what an answer is → the values that leave it as it is
    "n": (1,), "tools": ([],), "functions": ([],), "logprobs": (False,), "response_format": ({"type": "text"},), "modalities": (["text"],),
    "audio": (), "web_search_options": (),
}  # fmt: skip


class ApiError(HTTPException):
    def __init__(self, status, message, param=None, code=None, headers=None):
        super().__init__(status, message, headers)
        self.param, self.code = param, code


# --- a request's text → what is asked


class ChatRequest:
    """A request for an answer, checked. `defaults`: chat.py's options; `fixed`: nobody may be anyone but `me` and `you`."""

    def __init__(self, body, me, you, defaults, fixed):
        try:
            fields = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"The body is not JSON: {str(error):.100}") from None
        if not isinstance(fields, dict):
            raise ApiError(400, "The body must be a JSON object")
        fields = {name: value for name, value in fields.items() if value is not None}
        for name, plain in UNSUPPORTED.items():
            if name in fields and fields[name] not in plain:
                raise ApiError(
                    400,
                    f"{name} is not supported: it answers with one text",
                    name,
                    "unsupported_parameter",
                )
        self.turns = messages_to_turns(fields.get("messages"), me, you, fixed)
        self.stream = parse_request(fields, "stream", bool, False)
        stream_options = parse_request(fields, "stream_options", dict, {})
        self.include_usage = parse_request(stream_options, "include_usage", bool, False)
        names = ("max_tokens", "max_completion_tokens")
        limits = [parse_request(fields, name, int, -1, -1, 2**31) for name in names]
        # As in llama.cpp's server: -1 is no limit of the client's own, 0 an empty answer.
        self.max_tokens = min([*(limit for limit in limits if limit >= 0), defaults.max_tokens])
        self.temperature = parse_request(fields, "temperature", float, defaults.temperature, 0, 2)
        self.temperature *= self.temperature >= 0.01  # what is nearly 0 would overflow
        self.top_p = parse_request(fields, "top_p", float, defaults.top_p, 0, 1)
        self.seed = parse_request(fields, "seed", int, None, -(2**63), 2**63 - 1)
        stops = fields.get("stop", [])
        stops = [stops] if isinstance(stops, str) else stops
        is_list = isinstance(stops, list) and all(isinstance(stop, str | None) for stop in stops)
        if not is_list or len(stops) > MAX_STOPS or any(len(stop or "") > 200 for stop in stops):
            limits = f"a string or up to {MAX_STOPS}, each of up to 200 characters"
            raise ApiError(400, f"stop must be {limits}", "stop")
        self.stops = [stop for stop in stops if stop]  # some clients send an empty one for none


def parse_request(fields, name, kind, missing, least=None, most=None):
    """A field of a request, of that kind and within these limits, or `missing`."""
    if fields.get(name) is None:
        return missing
    value = fields[name]
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)  # JavaScript and Lua know no other numbers
    if type(value) not in ((int, float) if kind is float else (kind,)) or (
        least is not None and not least <= value <= most
    ):
        limits = "" if least is None else f" from {least} to {most}"
        raise ApiError(400, f"{name} must be {kind.__name__}{limits}", name)
    return value


def messages_to_turns(messages, me, you, fixed):
    """OpenAI's messages → turns: each line of a content is a message, what one author says in a row is one turn."""
    if not isinstance(messages, list) or not 0 < len(messages) <= MAX_MESSAGES:
        raise ApiError(400, f"messages must be a list of 1 to {MAX_MESSAGES}", "messages")
    found = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, dict):
            raise ApiError(400, f"{where} must be an object", where)
        role = message.get("role")
        if role in ("system", "developer"):
            continue  # it learned from chats, where nobody instructs
        if role not in ("user", "assistant") or message.get("tool_calls"):
            raise ApiError(
                400, f"{where}: role must be user, assistant or system, without tools", where
            )
        default = me if role == "assistant" else you
        author = message.get("name") or default
        if (
            not isinstance(author, str)
            or not 0 < len(author.strip()) <= 200
            or not author.isprintable()
        ):
            raise ApiError(400, f"{where}: name must be one line of up to 200 characters", where)
        if fixed and author != default:
            raise ApiError(403, f"{where}: here {role} is {default}, and nobody else", where)
        lines = [line.strip() for line in text_of(message.get("content"), where).split("\n")]
        lines = [line for line in lines if line]
        if lines and found and found[-1].author == author:
            found[-1].messages += lines
        elif lines:
            found.append(data.Turn(author, author == me, "", lines))
    if not found:
        raise ApiError(400, "messages hold no text of a user or an assistant", "messages")
    return found


def text_of(content, where):
    parts = (
        [{"type": "text", "text": content or ""}] if isinstance(content, str | None) else content
    )
    plain = isinstance(parts, list) and all(
        isinstance(part, dict) and part.get("type") == "text" for part in parts
    )
    if not plain or not all(isinstance(part.get("text"), str) for part in parts):
        raise ApiError(400, f"{where}: content must be text, or a list of text parts", where)
    text = "\n".join(part["text"] for part in parts)
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ApiError(400, f"{where}: content holds half a character (a lone surrogate)", where)
    return text


# --- the line before the model


class RequestQueue:
    """Answers one request after another, in a thread of its own."""

    def __init__(self, decoder, me):
        self.decoder, self.me, self.places = decoder, me, 0
        self.thread = concurrent.futures.ThreadPoolExecutor(1)  # first come, first served

    def enter(self, ask):
        """→ (a future of how it ends, the queue of the texts that it says). Cancel the future to leave."""
        if self.places >= MAX_QUEUE:
            raise ApiError(
                503,
                "Too many are waiting; try again",
                code="overloaded",
                headers={"retry-after": "5"},
            )
        self.places += 1
        loop, said, left = asyncio.get_running_loop(), asyncio.Queue(), threading.Event()

        def say(text):
            loop.call_soon_threadsafe(said.put_nowait, text)

        def leave(end):
            self.places -= 1
            left.set()

        end = loop.run_in_executor(self.thread, self.answer, ask, say, left)
        end.add_done_callback(leave)
        return end, said

    def answer(self, ask, say, left):
        """Say an answer piece by piece, until it ends or the client has `left`. → (why it ended, usage), as OpenAI calls them"""
        answer = generate.Answer(
            self.decoder, ask.turns, self.me, ask.max_tokens, ask.temperature, ask.top_p, ask.seed
        )
        text, sent, stopped = "", 0, False
        with contextlib.closing(iter(answer)) as steps:
            for messages in steps:
                text = "\n".join(messages)
                stopped, ready = cut_at_stop(text, ask.stops)
                say(text[sent:ready])
                sent = max(sent, ready)
                if stopped or left.is_set():
                    break
        if not stopped:
            say(text[sent:])
        read, wrote = len(answer.prompt), len(answer.ids)
        usage = {"prompt_tokens": read, "completion_tokens": wrote, "total_tokens": read + wrote}
        return "stop" if stopped or answer.ended else "length", usage


def cut_at_stop(text, stops):
    """→ (does a stop string end it, how many characters are certainly said)."""
    found = [at for at in (text.find(stop) for stop in stops) if at >= 0]
    if found:
        return True, min(found)
    held = [
        n
        for stop in stops
        for n in range(1, min(len(stop), len(text) + 1))
        if text.endswith(stop[:n])
    ]
    return False, len(text) - max(held, default=0)


# --- pages and answers


def application(decoder, me, you, contacts, options, page):
    """The whole site as an ASGI app, behind its `gate`. `contacts`: whom one may be, None where one is `you`."""
    line, created = RequestQueue(decoder, me), int(time.time())
    seeds = (
        itertools.repeat(None) if options.seed is None else itertools.count(options.seed)
    )  # one an answer: Retry asks the same again
    model = {"id": me, "object": "model", "created": created, "owned_by": "doppelganger"}
    sources = {
        kind: re.search(f"<{kind}>(.*?)</{kind}>", page, re.DOTALL)[1].encode()
        for kind in ("script", "style")
    }
    hashes = {
        kind: f"'sha256-{base64.b64encode(hashlib.sha256(source).digest()).decode()}'"
        for kind, source in sources.items()
    }
    policy = (
        f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; img-src data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types"
    )

    async def home(request):
        return HTMLResponse(page, headers={"content-security-policy": policy})

    async def health(request):
        return JSONResponse({"status": "ok"})

    async def persona(request):
        return JSONResponse({"me": me, "you": you, "contacts": contacts or []})

    async def models(request):
        if request.path_params.get("id", me) != me:
            raise ApiError(
                404, "There is one model here, see /v1/models", "model", "model_not_found"
            )
        return JSONResponse(model if request.path_params else {"object": "list", "data": [model]})

    async def completions(request):
        ask = ChatRequest(await read_body(request), me, you, options, contacts is None)
        ask.seed = next(seeds) if ask.seed is None else ask.seed
        end, said = line.enter(ask)
        kind = "chat.completion.chunk" if ask.stream else "chat.completion"
        head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": me,
        }
        if ask.stream:
            unbuffered = {"x-accel-buffering": "no"}  # or nginx holds back what is not yet 4 kB
            events = stream(ask, head, end, said)
            return StreamingResponse(events, 200, unbuffered, "text/event-stream")
        leaving = asyncio.create_task(is_disconnected(request))
        try:
            await asyncio.wait({end, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            end.cancel()
        if end.cancelled():
            return JSONResponse({})  # to nobody
        reason, usage = end.result()
        message = {
            "role": "assistant",
            "content": "".join(said.get_nowait() for _ in range(said.qsize())),
        }
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
        return JSONResponse({**head, "choices": [choice], "usage": usage})

    async def stream(ask, head, end, said):
        def chunk(delta, reason=None):
            usage = {"usage": None} if ask.include_usage else {}
            return event(
                {
                    **head,
                    "choices": [
                        {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
                    ],
                    **usage,
                }
            )

        end.add_done_callback(said.put_nowait)  # behind all that it says
        try:
            yield chunk({"role": "assistant", "content": ""})
            while True:
                try:
                    text = await asyncio.wait_for(said.get(), IDLE_SECONDS)
                except TimeoutError:
                    yield ": waiting\n\n"
                    continue
                if text is end:
                    break
                if text:
                    yield chunk({"content": text})
            reason, usage = end.result()
            yield chunk({}, reason)
            if ask.include_usage:
                yield event({**head, "choices": [], "usage": usage})
            yield "data: [DONE]\n\n"
        finally:
            end.cancel()

    api = [
        ("/health", health, "GET"),
        ("/models", models, "GET"),
        ("/models/{id:path}", models, "GET"),
        ("/chat/completions", completions, "POST"),
    ]
    routes = [Route("/", home), Route("/persona", persona)]
    for prefix in ("/v1", ""):  # as llama.cpp's server: some clients leave it out
        routes += [Route(prefix + path, answer, methods=[method]) for path, answer, method in api]
    app = Starlette(
        routes=routes, exception_handlers={HTTPException: error_response, Exception: internal_error}
    )
    app.router.redirect_slashes = False
    return app


def event(value):
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


async def read_body(request):
    """The body, at most BODY bytes: what is longer is read to its end, and refused."""
    body, size = b"", 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size <= MAX_BODY_BYTES:
                    body += part
    except TimeoutError:
        raise ApiError(
            408, "The request took too long to come", headers={"connection": "close"}
        ) from None
    if size > MAX_BODY_BYTES:
        raise ApiError(413, f"A request has at most {MAX_BODY_BYTES} bytes")
    return body


async def is_disconnected(request):
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def error_response(request, error):
    kind = "server_error" if error.status_code >= 500 else "invalid_request_error"
    param, code = getattr(error, "param", None), getattr(error, "code", None)
    value = {"error": {"message": error.detail, "type": kind, "param": param, "code": code}}
    return JSONResponse(value, error.status_code, error.headers)


async def internal_error(request, error):
    return await error_response(request, HTTPException(500, "It failed; the terminal says why"))


# --- the gate


def auth_middleware(app, hosts, token):
    """Put before `app`: refuse who lacks the token; without one, other host names than `hosts`."""

    async def gated(scope, receive, send):
        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }

        async def secured(message):
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message["headers"],
                    *((name.encode(), value.encode()) for name, value in SECURITY_HEADERS.items()),
                ]
            await send(message)

        # What is checked is what is routed: no doubled slash and none at the end.
        path = "/" + "/".join(filter(None, scope["path"].split("/")))
        scope = {**scope, "path": path}
        refusal = refused(scope["method"], path, headers)
        answer = await error_response(None, refusal) if refusal else app
        with contextlib.suppress(
            ConnectionError, ClientDisconnect, h11.LocalProtocolError
        ):  # it left, or sent what is no HTTP
            await answer(scope, receive, secured)

    def refused(method, path, headers):
        given = headers.get("authorization", "").encode()
        if token:
            if path not in PUBLIC_PATHS and not hmac.compare_digest(
                given, b"Bearer " + token.encode()
            ):
                message = "The token is missing or wrong: Authorization: Bearer TOKEN"
                scheme = {"www-authenticate": "Bearer"}
                return ApiError(401, message, code="invalid_api_key", headers=scheme)
        else:
            # A site can make its own name mean 127.0.0.1 (DNS rebinding): without a token only the
            # Host and the Origin tell its page from ours.
            host = headers.get("host", "").lower()
            if re.sub(r":\d{1,5}$", "", host) not in hosts:
                message = "Not by this host name: --allow-host NAME allows it, --token any"
                return ApiError(403, message)
            own = (f"http://{host}", f"https://{host}")
            if headers.get("origin", own[0]).lower() not in own:
                return ApiError(403, "Not from another site's page")
        if (
            method == "POST"
            and headers.get("content-type", "").partition(";")[0].strip().lower()
            != "application/json"
        ):
            return ApiError(415, "POST needs Content-Type: application/json")

    return gated


def is_address(text):
    try:
        return bool(ipaddress.ip_address(text.removeprefix("[").removesuffix("]")))
    except ValueError:
        return False


class Protocol(H11Protocol):
    """uvicorn's, which hangs up on who doesn't send a whole request, or doesn't read, within two looks."""

    def connection_made(self, transport):
        super().connection_made(transport)
        self.look()

    def look(self, before=None):
        """Each SLOW seconds. (A slow body is told so first, see `body_of`.)"""
        sending = self.conn.their_state in (h11.IDLE, h11.SEND_BODY)
        now = (
            self.cycle,
            sending,
            self.flow.write_paused,
        )  # `cycle`: the request that is answered, or was answered last
        if now == before and (sending or self.flow.write_paused):
            self.transport.abort()
        elif not self.transport.is_closing():
            self.loop.call_later(BODY_SECONDS, self.look, now)

    def send_400_response(self, msg):
        try:
            super().send_400_response(msg)
        except h11.LocalProtocolError:  # in the middle of an answer
            self.transport.abort()


# --- start


def is_loopback(host):
    return host == "localhost" or is_address(host) and ipaddress.ip_address(host).is_loopback


def is_public(options) -> bool:
    """Whether clients are others than the owner, who are --as and see no contacts."""
    return not is_loopback(options.host) or bool(options.token and options.as_)


def listen(options):
    """Before the model loads: may it be served like this? → the socket."""
    token = options.token
    if options.memory and is_public(options):
        raise UserError(
            "--memory quotes your chats with everyone; --host, or --token with --as, lets others ask",
            "Leave --memory out, or talk to it on this machine alone.",
        )
    if not is_loopback(options.host) and not (token and options.as_):
        missing = " and ".join(
            flag for flag, value in (("--token", token), ("--as", options.as_)) if not value
        )
        raise UserError(
            f"--host {options.host} lets others in, and needs {missing}",
            f"Say also: --token {secrets.token_urlsafe(16)} --as NAME (who is it that will talk to it?)",
        )
    if token is not None and not re.fullmatch(r"[!-~]{16,200}", token):
        raise UserError(
            "--token must have 16 characters or more, none of them a space",
            f"Here is one: {secrets.token_urlsafe(16)}",
        )
    for name in options.allow_host:
        if not re.fullmatch(r"[A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.]+\]", name):
            raise UserError(
                f"--allow-host {name}: it takes a host name, without http:// and port",
                "For example: --allow-host host.docker.internal",
            )
    try:
        family, _, _, _, address = socket.getaddrinfo(
            options.host, options.port, type=socket.SOCK_STREAM
        )[0]
        return socket.create_server(address, family=family)
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(
            f"--host {options.host} --port {options.port}: {why}",
            "Choose another --port (0: any that is free).",
        ) from None


def serve(door, decoder, me, you, options):
    """Until Ctrl-C. `door`: from `listen`."""
    host, port = options.host, door.getsockname()[1]
    persona = cli.read_json(Path(options.ckpt) / "persona.json", {})
    names = [you, *(contact["name"] for contact in persona.get("contacts", []))]
    contacts = None if is_public(options) else list(dict.fromkeys(names))
    page = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    hosts = {"localhost", "127.0.0.1", "[::1]", host.lower(), f"[{host.lower()}]"}
    hosts |= {name.lower() for name in options.allow_host}
    app = auth_middleware(
        application(decoder, me, you, contacts, options, page), hosts, options.token
    )
    everywhere = host in ("0.0.0.0", "::")
    shown = socket.gethostname().lower() if everywhere else f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{port}/" + (
        f"#{quote(options.token, safe='')}" if options.token else ""
    )
    print(
        f"An AI imitation of {me}: {address}\nThe API: http://{shown}:{port}/v1 (Ctrl-C ends)",
        flush=True,
    )
    if sys.stdout.isatty() and (
        sys.platform in ("darwin", "win32")
        or os.environ.get("DISPLAY")
        or os.environ.get("WAYLAND_DISPLAY")
    ):
        webbrowser.open(address)
    settings = uvicorn.Config(
        app, http=Protocol, ws="none", lifespan="off", log_level="error", access_log=False, server_header=False, proxy_headers=False,
        limit_concurrency=MAX_CONNECTIONS, timeout_keep_alive=5, timeout_graceful_shutdown=1,
    )  # fmt: skip
    uvicorn.Server(settings).run(sockets=[door])
