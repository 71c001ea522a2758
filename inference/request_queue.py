"""Replies to several requests side by side: one model, in a thread of its own.

`RequestQueue.submit` takes a request between any two steps of the model, and a `Job` says when its
reply is there. The server and the Telegram bot share it.
"""

import asyncio
import collections
import concurrent.futures
import dataclasses
import time

import data
from inference import generate

MAX_QUEUE = 32  # requests, those that are answered included


class QueueError(Exception):
    """Why a request gets no reply. `code`: overloaded, rate_limit_exceeded or timeout."""

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code


@dataclasses.dataclass
class ReplyRequest:
    """What to reply to, and how. `stops`: texts that end the reply; `chat`: as in Answer."""

    turns: list[data.Turn]
    max_tokens: int
    temperature: float
    top_p: float
    seed: int | None = None
    stops: list[str] = dataclasses.field(default_factory=list)
    chat: tuple[str, bool] | tuple[()] = ()


@dataclasses.dataclass(eq=False)
class Job:
    """A request from its arrival to the end of its reply.

    `result`: (finish_reason, usage), as OpenAI calls them; cancel it to leave. `texts`: the pieces
    of the reply as they come. `deadline`: by time.monotonic(). `answer`, `row`: None while it
    waits.
    """

    request: ReplyRequest
    client: str
    deadline: float
    result: asyncio.Future
    texts: asyncio.Queue
    answer: generate.Answer | None = None
    row: generate.BatchRow | None = None
    sent: int = 0  # characters

    @property
    def waiting(self) -> bool:
        return self.row is None and not self.result.done()


# A piece of a reply, and at its end its result or what went wrong
Piece = tuple[Job, str, tuple[str, dict] | Exception | None]


class RequestQueue:
    """Requests that wait, and those that are answered side by side.

    The model has a thread of its own. Between two of its steps requests join and leave.
    """

    def __init__(self, decoder: generate.Decoder, me: str, options, max_queue: float = MAX_QUEUE):
        self.decoder = decoder
        self.me = me
        self.options = options
        self.max_queue = max_queue
        self.batch = generate.DecodeBatch(decoder)
        self.jobs: list[Job] = []  # in the order of arrival
        self.answered: list[Job] = []
        self.thread = concurrent.futures.ThreadPoolExecutor(1)
        self.worker: asyncio.Task | None = None

    def submit(self, request: ReplyRequest, client: str) -> Job:
        """Queue a request of a client. QueueError when there are too many."""
        self.jobs = [job for job in self.jobs if not job.result.done()]
        if len(self.jobs) >= self.max_queue:
            raise QueueError("overloaded", "Too many requests are waiting; try again")
        if sum(job.client == client for job in self.jobs) >= self.options.per_client:
            message = f"A client may have {self.options.per_client} requests at a time; try again"
            raise QueueError("rate_limit_exceeded", message)
        loop = asyncio.get_running_loop()
        deadline = time.monotonic() + self.options.timeout
        job = Job(request, client, deadline, loop.create_future(), asyncio.Queue())
        self.jobs.append(job)
        if self.worker is None or self.worker.done():
            self.worker = loop.create_task(self.work())
        return job

    async def work(self) -> None:
        """Let the model make steps while there are requests."""
        loop = asyncio.get_running_loop()
        while self.jobs:
            try:
                pieces = await loop.run_in_executor(self.thread, self.step, self.choose())
            except Exception as error:  # for example, no memory left
                pieces = [(job, "", error) for job in self.answered]
                self.batch.clear()
            for job, text, result in pieces:
                deliver(job, text, result)
            for job in self.jobs:
                if job.waiting and time.monotonic() > job.deadline:
                    message = f"There was no answer within {self.options.timeout} seconds"
                    deliver(job, "", QueueError("timeout", message))
            self.jobs = [job for job in self.jobs if not job.result.done()]

    def choose(self) -> list[Job]:
        """Choose who joins: of the clients with the fewest answers under way, the first to come."""
        waiting = [job for job in self.jobs if job.waiting]
        joining: list[Job] = []
        active = [job for job in self.answered if not job.result.done()]
        while waiting and len(active) < self.batch.max_rows:
            counts = collections.Counter(job.client for job in active)
            job = min(waiting, key=lambda job: counts[job.client])
            active.append(job)
            joining.append(job)
            waiting.remove(job)
        return joining

    def step(self, joining: list[Job]) -> list[Piece]:
        """Let requests leave and join, and take a step, in the model's thread."""
        left = [job for job in self.answered if job.result.done()]
        for job in left:
            self.answered.remove(job)
            if job.row in self.batch.rows:
                self.batch.remove(job.row)
        pieces: list[Piece] = []
        for job in joining:
            try:
                self.join(job)
            except Exception as error:
                pieces.append((job, "", error))
        self.batch.step()
        return [*pieces, *map(self.next_piece, self.answered)]

    def join(self, job: Job) -> None:
        request = job.request
        job.answer = generate.Answer(
            self.decoder, request.turns, self.me,
            request.max_tokens, request.temperature, request.top_p, request.seed,
            request.chat,
        )  # fmt: skip
        job.row = job.answer.join(self.batch)
        self.answered.append(job)

    def next_piece(self, job: Job) -> Piece:
        """Return what can be sent of a reply by now, and its result if it ends here."""
        answer = job.answer
        assert answer is not None, job.client  # not the job: an error must not show a chat
        done, late = job.row not in self.batch.rows, time.monotonic() > job.deadline
        answer.update(done)
        text = "\n".join(answer.messages)
        stopped, ready = cut_at_stop(text, job.request.stops)
        if (done or late) and not stopped:
            ready = len(text)
        piece = text[job.sent : ready]
        job.sent = max(job.sent, ready)
        if not (stopped or done or late):
            return job, piece, None
        usage = {
            "prompt_tokens": len(answer.prompt),
            "completion_tokens": len(answer.ids),
            "total_tokens": len(answer.prompt) + len(answer.ids),
        }
        return job, piece, ("stop" if stopped or answer.ended else "length", usage)


def deliver(job: Job, text: str, result: tuple[str, dict] | Exception | None) -> None:
    """Hand a piece of a reply to the one who waits for it, unless they left."""
    if job.result.done():
        return
    if text:
        job.texts.put_nowait(text)
    if isinstance(result, Exception):
        job.result.set_exception(result)
    elif result:
        job.result.set_result(result)


def cut_at_stop(text: str, stops: list[str]) -> tuple[bool, int]:
    """Return whether a stop string ends the text, and how many characters can be sent.

    The end of the text waits while it may still become a stop string.
    """
    starts = [text.index(stop) for stop in stops if stop in text]
    if starts:
        return True, min(starts)
    held = 0
    for stop in stops:
        for length in range(1, min(len(stop), len(text) + 1)):
            if text.endswith(stop[:length]):
                held = max(held, length)
    return False, len(text) - held
