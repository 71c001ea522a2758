"""Serve a page and an OpenAI-compatible API: `python chat.py ckpt/ --web`.

    GET  /                       the page (page.html)
    GET  /persona                names for the page
    GET  /health                 {"status": "ok"}
    GET  /v1/models              the model's name
    POST /v1/chat/completions    replies, whole or streamed

One model, one thread: --slots replies are written side by side, other requests wait in a queue,
and a client that disconnects leaves it at once. Without --token the server listens on loopback and
accepts loopback's host names and --allow-host. With a token it accepts any host name (it may be
behind a proxy); without that token clients get only the page and /health. With --token and --as,
or on another --host, every client is --as; else a client may be anyone. Conversations are neither
written to disk nor logged.

To add an endpoint, write a function under "Endpoints" with the decorator `@endpoint`.
"""

import asyncio
import base64
import contextlib
import functools
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
import time
import webbrowser
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import cli
import data
from cli import UserError
from inference import generate
from inference.pace import Pacer, Schedule
from inference.request_queue import Job, QueueError, ReplyRequest, RequestQueue

try:
    import h11
    import uvicorn
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
    from starlette.routing import Route
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ImportError as error:
    raise UserError(
        f"--web needs {error.name}, which is not installed", "pip install -r requirements-extra.txt"
    ) from None

MAX_BODY_BYTES = 2**20
MAX_MESSAGES = 2000  # in a conversation
MAX_STOPS = 100  # strings in `stop`: many clients send more than OpenAI's four
MAX_STOP_CHARS = 200
MAX_NAME_CHARS = 200
MAX_CONNECTIONS = 256
BODY_SECONDS = 10  # that a client may take to send a request, or to read a part of the reply
IDLE_SECONDS = 10  # without a token, after which a stream sends a comment
DISCONNECT_SECONDS = 0.2  # between looks whether the client of a whole reply is still there
SECURITY_HEADERS = {
    "cache-control": "no-store",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
# Fields of a request that would change what a reply is → the values that don't
UNSUPPORTED: dict[str, list] = {
    "n": [1],
    # Tools may be offered (Open WebUI always does): a model is free not to call any
    "tool_choice": ["auto", "none"],
    "function_call": ["auto", "none"],
    "logprobs": [False],
    "response_format": [{"type": "text"}],
    "modalities": [["text"]],
    "audio": [],
    "web_search_options": [],
}
# Parts of a message that aren't text → what stands for them in the chats, see data.MARK
PART_MARKS = {
    "image_url": "<photo>",
    "video_url": "<video>",
    "input_audio": "<voice>",
    "file": "<file>",
}


# --- Errors, in OpenAI's shape


class ApiError(HTTPException):
    """An error for the client. `param`: the field of the request that it is about."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(status, message, headers)
        self.param = param
        self.code = code


def from_queue_error(error: QueueError) -> ApiError:
    status = 429 if error.code == "rate_limit_exceeded" else 503
    return ApiError(status, str(error), code=error.code, headers={"retry-after": "5"})


def error_body(error: BaseException) -> dict:
    """Describe an error; one that isn't meant for the client tells it nothing."""
    if isinstance(error, QueueError):
        error = from_queue_error(error)
    if not isinstance(error, HTTPException):
        error = ApiError(500, "Internal error; see the server's terminal")
    body = {
        "message": error.detail,
        "type": "server_error" if error.status_code >= 500 else "invalid_request_error",
        "param": getattr(error, "param", None),
        "code": getattr(error, "code", None),
    }
    return {"error": body}


async def error_response(request: Request | None, error: HTTPException | QueueError) -> Response:
    if isinstance(error, QueueError):
        error = from_queue_error(error)
    return JSONResponse(error_body(error), error.status_code, error.headers)


async def internal_error(request: Request, error: Exception) -> Response:
    return JSONResponse(error_body(error), 500)


# --- Requests


class ChatRequest(ReplyRequest):
    """The body of a chat completion, validated. `fixed_names`: clients may only be `you`."""

    def __init__(self, body: bytes, me: str, you: str, defaults, fixed_names: bool):
        try:
            fields = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"The body is not JSON: {str(error):.100}") from None
        if not isinstance(fields, dict):
            raise ApiError(400, "The body must be a JSON object")
        for name, neutral in UNSUPPORTED.items():
            if fields.get(name) is not None and fields[name] not in neutral:
                raise ApiError(400, f"{name} is not supported", name, "unsupported_parameter")
        self.turns = parse_turns(fields.get("messages"), me, you, fixed_names)
        num_chars = sum(len(text) for turn in self.turns for text in turn.messages)
        if num_chars > defaults.max_prompt:
            message = f"messages have {num_chars} characters, more than {defaults.max_prompt}"
            raise ApiError(400, message, "messages", "context_length_exceeded")
        self.stream = get_field(fields, "stream", bool, False)
        stream_options = get_field(fields, "stream_options", dict, {})
        self.include_usage = get_field(stream_options, "include_usage", bool, False)
        self.max_tokens = defaults.max_tokens
        for name in ("max_tokens", "max_completion_tokens"):
            limit = get_field(fields, name, int, -1, -1, 2**31)
            if limit >= 0:  # as in llama.cpp's server: -1 is no limit, 0 an empty reply
                self.max_tokens = min(self.max_tokens, limit)
        self.temperature = get_field(fields, "temperature", float, defaults.temperature, 0, 2)
        self.top_p = get_field(fields, "top_p", float, defaults.top_p, 0, 1)
        self.seed = get_field(fields, "seed", int, None, -(2**63), 2**63 - 1)
        self.stops = parse_stops(fields.get("stop"))


def get_field(
    fields: dict, name: str, kind: type, default: Any, low: float = 0, high: float = 0
) -> Any:
    """Return a field of type `kind`, a number from `low` to `high`; `default` if it is missing."""
    value = fields.get(name)
    if value is None:
        return default
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)  # JavaScript and Lua have only floats
    number = kind in (int, float)
    kinds = (int, float) if kind is float else (kind,)  # 1 is a float, True isn't an int
    if type(value) not in kinds or number and not low <= value <= high:
        limits = f" from {low} to {high}" if number else ""
        raise ApiError(400, f"{name} must be {kind.__name__}{limits}", name)
    return value


def parse_stops(stop: Any) -> list[str]:
    """Return the strings of `stop`. Some clients send an empty string or null for none."""
    stops = stop if isinstance(stop, list) else [stop]
    stops = [text for text in stops if text is not None and text != ""]
    strings = all(isinstance(text, str) and len(text) <= MAX_STOP_CHARS for text in stops)
    if len(stops) > MAX_STOPS or not strings:
        allowed = f"a string or up to {MAX_STOPS}, each of up to {MAX_STOP_CHARS} characters"
        raise ApiError(400, f"stop must be {allowed}", "stop")
    return stops


def parse_turns(messages: Any, me: str, you: str, fixed_names: bool) -> list[data.Turn]:
    """Convert OpenAI's messages: each line is a message of ours.

    Consecutive messages of one author are one turn.
    """
    if not isinstance(messages, list) or not 0 < len(messages) <= MAX_MESSAGES:
        raise ApiError(400, f"messages must be a list of 1 to {MAX_MESSAGES}", "messages")
    turns: list[data.Turn] = []
    for index, message in enumerate(messages):
        param = f"messages[{index}]"
        if not isinstance(message, dict):
            raise ApiError(400, f"{param} must be an object", param)
        role = message.get("role")
        if role in ("system", "developer"):
            continue  # the model learned from chats, which have no instructions
        if role not in ("user", "assistant") or message.get("tool_calls"):
            allowed = "role must be user, assistant or system, without tools"
            raise ApiError(400, f"{param}: {allowed}", param)
        default = me if role == "assistant" else you
        author = message.get("name") or default
        if not is_name(author):
            allowed = f"name must be one line of up to {MAX_NAME_CHARS} characters"
            raise ApiError(400, f"{param}: {allowed}", param)
        if fixed_names and author != default:
            raise ApiError(403, f"{param}: on this server {role} is {default}", param)
        lines = [line.strip() for line in parse_content(message.get("content"), param).split("\n")]
        lines = [line for line in lines if line]
        if lines and turns and turns[-1].author == author:
            turns[-1].messages += lines
        elif lines:
            turns.append(data.Turn(author, author == me, "", lines))
    if not turns:
        raise ApiError(400, "messages hold no text of a user or an assistant", "messages")
    return turns


def is_name(name: Any) -> bool:
    if not isinstance(name, str) or not name.isprintable():
        return False
    return 0 < len(name.strip()) <= MAX_NAME_CHARS


def parse_content(content: Any, param: str) -> str:
    """Return the text of a message's content: a string, a list of parts, or null."""
    if content is None:
        return ""
    try:
        if isinstance(content, list):
            parts = [PART_MARKS.get(part.get("type")) or part["text"] for part in content]
            content = "\n".join(parts)
        content.encode()  # UnicodeEncodeError for half a character
    except (AttributeError, KeyError, TypeError, UnicodeEncodeError):
        message = f"{param}: content must be text, or a list of text and media"
        raise ApiError(400, message, param) from None
    return content


async def read_body(request: Request) -> bytes:
    """Return the body. One that is too long is read to its end, then refused."""
    body, size = b"", 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size <= MAX_BODY_BYTES:
                    body += part
    except TimeoutError:
        headers = {"connection": "close"}
        raise ApiError(408, "The request took too long to arrive", headers=headers) from None
    if size > MAX_BODY_BYTES:
        raise ApiError(413, f"A request has at most {MAX_BODY_BYTES} bytes")
    return body


# --- Endpoints


ROUTES: list[Route] = []
TOKENLESS_PATHS: set[str] = set()  # need no token: they tell no name and no chat


def endpoint(*paths: str, method: str = "GET", tokenless: bool = False) -> Callable:
    """Register a handler, which finds what it needs in request.app.state (see `application`).

    The API is below /v1; some clients leave that out.
    """

    def register(handler: Callable) -> Callable:
        ROUTES.extend(Route(path, handler, methods=[method]) for path in paths)
        TOKENLESS_PATHS.update(paths if tokenless else ())
        return handler

    return register


@endpoint("/", tokenless=True)
async def home(request: Request) -> Response:
    state = request.app.state
    headers = {"content-security-policy": content_security_policy(state.page)}
    return HTMLResponse(state.page, headers=headers)


@endpoint("/health", "/v1/health", tokenless=True)
async def health(request: Request) -> Response:
    return JSONResponse({"status": "ok"})


@endpoint("/persona")
async def persona(request: Request) -> Response:
    state = request.app.state
    return JSONResponse({"me": state.me, "you": state.you, "contacts": state.contacts or []})


@endpoint("/v1/models", "/models")
async def list_models(request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [request.app.state.model]})


@endpoint("/v1/models/{id:path}", "/models/{id:path}")
async def get_model(request: Request) -> Response:
    if request.path_params["id"] != request.app.state.me:
        raise ApiError(404, "There is one model, see /v1/models", "model", "model_not_found")
    return JSONResponse(request.app.state.model)


@endpoint("/v1/chat/completions", "/chat/completions", method="POST")
async def chat_completions(request: Request) -> Response:
    state = request.app.state
    body = await read_body(request)
    fixed_names = state.contacts is None
    chat = ChatRequest(body, state.me, state.you, state.options, fixed_names)
    if chat.seed is None:
        chat.seed = next(state.seeds)
    contact = chat.turns[-1].author
    if state.pacer.ignores(contact):
        chat.max_tokens = 0
    job = state.queue.submit(chat, client_address(request))
    head = {
        "id": f"chatcmpl-{secrets.token_hex(12)}",
        "object": "chat.completion.chunk" if chat.stream else "chat.completion",
        "created": int(time.time()),
        "model": state.me,
    }
    if chat.stream:
        chunks = stream_chunks(job, head, chat.include_usage, state.pacer.schedule(contact))
        headers = {"x-accel-buffering": "no"}  # else nginx holds back the first 4 kB
        return StreamingResponse(chunks, 200, headers, "text/event-stream")
    return await whole_reply(request, job, head)


def client_address(request: Request) -> str:
    """Return a client's address; behind a proxy on this machine, the one that the proxy tells."""
    address = request.client.host if request.client else ""
    forwarded = ",".join(request.headers.getlist("x-forwarded-for")).rpartition(",")[2].strip()
    return forwarded if forwarded and is_loopback(address) else address


async def whole_reply(request: Request, job: Job, head: dict) -> Response:
    try:
        while not job.result.done():
            if await request.is_disconnected():
                return JSONResponse({})  # nobody reads it
            await asyncio.wait({job.result}, timeout=DISCONNECT_SECONDS)
    finally:
        job.result.cancel()
    reason, usage = job.result.result()
    text = "".join(job.texts.get_nowait() for _ in range(job.texts.qsize()))
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
    return JSONResponse({**head, "choices": [choice], "usage": usage})


async def stream_chunks(
    job: Job, head: dict, include_usage: bool, schedule: Schedule | None = None
) -> AsyncIterator[str]:
    """Yield a reply as server-sent events. With a schedule each line comes whole, when it's due."""

    def chunk(delta: dict, reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        usage = {"usage": None} if include_usage else {}
        return event({**head, "choices": [choice], **usage})

    job.result.add_done_callback(job.texts.put_nowait)  # comes after the last text
    try:
        yield chunk({"role": "assistant", "content": ""})
        pieces = hold_back(read_pieces(job), schedule) if schedule else read_pieces(job)
        async for piece in pieces:
            yield chunk({"content": piece}) if isinstance(piece, str) else f": {piece.text}\n\n"
        error = job.result.exception()
        if isinstance(error, Exception):
            yield event(error_body(error))
            if not isinstance(error, (ApiError, QueueError)):
                raise error
            return
        reason, usage = job.result.result()
        yield chunk({}, reason)
        if include_usage:
            yield event({**head, "choices": [], "usage": usage})
        yield "data: [DONE]\n\n"
    finally:
        job.result.cancel()


class Comment(NamedTuple):
    """A line that API clients ignore. The page reads two: `read`, `typing`."""

    text: str


async def read_pieces(job: Job) -> AsyncIterator[str | Comment]:
    """Yield the text of a reply as it comes; while there is none, a comment now and then."""
    while True:
        try:
            text = await asyncio.wait_for(job.texts.get(), IDLE_SECONDS)
        except TimeoutError:
            yield Comment("waiting")
            continue
        if text is job.result:
            return
        yield text


async def hold_back(
    pieces: AsyncIterator[str | Comment], schedule: Schedule
) -> AsyncIterator[str | Comment]:
    """Yield each line of a reply when it is due. The model doesn't wait for that."""
    yield Comment("read")
    lines, start = [""], ""

    async def wait_for(line: str) -> AsyncIterator[str | Comment]:
        typing, due = schedule.next(line)
        async for comment in sleep_until(typing):
            yield comment
        yield Comment("typing")
        async for comment in sleep_until(due):
            yield comment
        yield start + line

    async for piece in pieces:
        if isinstance(piece, Comment):
            yield piece
            continue
        lines = (lines[-1] + piece).split("\n")
        for line in filter(str.strip, lines[:-1]):
            async for text in wait_for(line):
                yield text
            start = "\n"
    if lines[-1].strip():
        async for text in wait_for(lines[-1]):
            yield text


async def sleep_until(moment: float) -> AsyncIterator[Comment]:
    """Sleep until `moment`, by time.monotonic(); yield a comment now and then."""
    while (left := moment - time.monotonic()) > IDLE_SECONDS:
        await asyncio.sleep(IDLE_SECONDS)
        yield Comment("waiting")
    await asyncio.sleep(max(0, left))


def event(value: dict) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def application(
    decoder: generate.Decoder,
    me: str,
    you: str,
    contacts: list[str] | None,
    options,
    pacer: Pacer,
) -> Starlette:
    """Return the endpoints as an ASGI app, without access control.

    `contacts`: the names that a client may take, None if every client is `you`.
    """
    handlers: dict[Any, Any] = {
        HTTPException: error_response,
        QueueError: error_response,
        Exception: internal_error,
    }
    app = Starlette(routes=ROUTES, exception_handlers=handlers)
    app.router.redirect_slashes = False
    state = app.state
    state.me, state.you = me, you
    state.contacts = contacts
    state.options = options
    state.pacer = pacer
    state.queue = RequestQueue(decoder, me, options)
    state.page = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    about = {"object": "model", "created": int(time.time()), "owned_by": "doppelganger"}
    state.model = {"id": me, **about}
    # A seed for each reply, so that Retry gives another one
    state.seeds = itertools.repeat(None) if options.seed is None else itertools.count(options.seed)
    return app


@functools.cache
def content_security_policy(page: str) -> str:
    """Allow the page its own script and style, by their hashes, and nothing else."""
    hashes = {}
    for tag in ("script", "style"):
        source = page.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        digest = hashlib.sha256(source.encode()).digest()
        hashes[tag] = f"'sha256-{base64.b64encode(digest).decode()}'"
    return (
        f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; "
        "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types"
    )


# --- Access


def auth_middleware(app: Callable, hosts: set[str], token: str | None) -> Callable:
    """Wrap an ASGI app: requests that `check_access` refuses don't reach it."""
    encoded_headers = [(name.encode(), value.encode()) for name, value in SECURITY_HEADERS.items()]

    async def middleware(scope, receive, send):
        async def send_secured(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *encoded_headers]
            await send(message)

        headers = {}
        for name, value in scope["headers"]:
            headers[name.decode("latin-1")] = value.decode("latin-1")
        # What is checked is what is routed: no doubled slash and none at the end
        path = "/" + "/".join(filter(None, scope["path"].split("/")))
        scope = {**scope, "path": path}
        error = check_access(scope["method"], path, headers, hosts, token)
        response = await error_response(None, error) if error else app
        # The client may have left, or have sent something that isn't HTTP
        with contextlib.suppress(ConnectionError, ClientDisconnect, h11.LocalProtocolError):
            await response(scope, receive, send_secured)

    return middleware


def check_access(
    method: str, path: str, headers: dict[str, str], hosts: set[str], token: str | None
) -> ApiError | None:
    """Return why a request is refused, or None."""
    if token:
        sent = headers.get("authorization", "").encode()
        valid = hmac.compare_digest(sent, f"Bearer {token}".encode())
        if not valid and path not in TOKENLESS_PATHS:
            message = "The token is missing or wrong: Authorization: Bearer TOKEN"
            scheme = {"www-authenticate": "Bearer"}
            return ApiError(401, message, code="invalid_api_key", headers=scheme)
    else:
        # A site can point its own host name at 127.0.0.1 (DNS rebinding): without a token only
        # the Host and Origin headers tell its page from ours
        host = headers.get("host", "").lower()
        if re.sub(r":\d{1,5}$", "", host) not in hosts:
            message = "This host name is not allowed: --allow-host NAME allows it, --token any"
            return ApiError(403, message)
        origin = headers.get("origin", f"http://{host}").lower()
        if origin not in (f"http://{host}", f"https://{host}"):
            return ApiError(403, "Requests from other sites' pages are not allowed")
    content_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if method == "POST" and content_type != "application/json":
        return ApiError(415, "POST needs Content-Type: application/json")
    return None


class Protocol(H11Protocol):
    """uvicorn's HTTP protocol, which also closes connections that make no progress.

    Between two checks the client must complete its request, or read a part of the reply.
    """

    def connection_made(self, transport):
        super().connection_made(transport)
        self.check_progress()

    def check_progress(self, before=None):
        # A slow body gets an error first, see read_body
        receiving = self.conn.their_state in (h11.IDLE, h11.SEND_BODY)
        state = (self.cycle, receiving, self.flow.write_paused)  # cycle: the latest request
        if state == before and (receiving or self.flow.write_paused):
            self.transport.abort()
        elif not self.transport.is_closing():
            self.loop.call_later(BODY_SECONDS, self.check_progress, state)

    def send_400_response(self, msg):
        try:
            super().send_400_response(msg)
        except h11.LocalProtocolError:  # in the middle of a reply
            self.transport.abort()


# --- Start


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_public(options) -> bool:
    """Return whether clients are other people: they are --as, and see no contacts."""
    return not is_loopback(options.host) or bool(options.token and options.as_)


def validate(options) -> None:
    token = options.token
    if options.memory and is_public(options):
        raise UserError(
            "--memory quotes your chats, and --host, or --token with --as, lets others ask",
            "Leave --memory out, or serve this machine alone.",
        )
    if not is_loopback(options.host) and not (token and options.as_):
        flags = {"--token": token, "--as": options.as_}
        missing = " and ".join(flag for flag, value in flags.items() if not value)
        raise UserError(
            f"--host {options.host} lets others in, and needs {missing}",
            f"Add: --token {secrets.token_urlsafe(16)} --as NAME (of who will talk to it)",
        )
    if token is not None and not re.fullmatch(r"[!-~]{16,200}", token):
        raise UserError(
            "--token must have at least 16 characters and no spaces",
            f"For example: --token {secrets.token_urlsafe(16)}",
        )
    for name in options.allow_host:
        if not re.fullmatch(r"[A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.]+\]", name):
            raise UserError(
                f"--allow-host {name}: give a host name, without http:// and port",
                "For example: --allow-host host.docker.internal",
            )


def listen(options) -> socket.socket:
    """Check the flags and open the port, before the model loads."""
    validate(options)
    try:
        addresses = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)
        family, *_, address = addresses[0]
        return socket.create_server(address, family=family)
    except (OSError, OverflowError, UnicodeError) as error:  # UnicodeError: no name of a host
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"--host {options.host} --port {options.port}: {reason}",
            "Choose another --port (0: any that is free).",
        ) from None


def serve(
    sock: socket.socket, decoder: generate.Decoder, me: str, you: str, options, pacer: Pacer
) -> None:
    """Serve on `sock`, from `listen`, until Ctrl-C."""
    host = options.host.lower()
    persona = cli.read_json(Path(options.ckpt) / "persona.json", {})
    names = [you, *(contact["name"] for contact in persona.get("contacts", []))]
    contacts = None if is_public(options) else list(dict.fromkeys(names))
    app = application(decoder, me, you, contacts, options, pacer)
    hosts = {"localhost", "127.0.0.1", "[::1]", host, f"[{host}]"}
    hosts.update(name.lower() for name in options.allow_host)

    shown = f"[{host}]" if ":" in host else host
    if host in ("0.0.0.0", "::"):
        shown = socket.gethostname().lower()
    base_url = f"http://{shown}:{sock.getsockname()[1]}"
    # A browser doesn't send what follows #
    page_url = f"{base_url}/#{quote(options.token, safe='')}" if options.token else f"{base_url}/"
    print(f"An AI imitation of {me}: {page_url}", flush=True)
    slots = cli.counted(len(decoder.slots.rows), "answers")
    gib = sum(layer.nbytes for layer in decoder.slots.layers) / 2**30
    print(f"API: {base_url}/v1, {slots} at a time in {gib:.2f} GiB (Ctrl-C exits)", flush=True)
    display = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if sys.stdout.isatty() and (display or sys.platform in ("darwin", "win32")):
        webbrowser.open(page_url)
    settings = uvicorn.Config(
        auth_middleware(app, hosts, options.token),
        http=Protocol,
        ws="none",
        lifespan="off",
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=1,
    )
    uvicorn.Server(settings).run(sockets=[sock])
