"""Small random models made by transformers' own classes, and small chats: CPU only, no network."""

import contextlib
import functools
import io
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import model  # noqa: E402
from weights import hf  # noqa: E402
from weights.load import load_weights  # noqa: E402
from weights.save import save_model  # noqa: E402
from weights.tokenizer import load_tokenizer  # noqa: E402

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
try:
    import mistral_common

    VOCABULARIES = Path(mistral_common.__file__).parent / "data"
except ImportError:  # on a rented GPU, where bench/gpu.sh runs tests/test_cuda.py alone
    VOCABULARIES = Path("mistral_common")
V1 = VOCABULARIES / "tokenizer.model.v1"
VOCAB = 2000  # pieces


@functools.cache
def vocabulary():
    """A tokenizer.model like Mistral's, of VOCAB pieces, trained on the example's text."""
    import sentencepiece

    writer, text = io.BytesIO(), (ROOT / "examples" / "pellhaven.txt").read_text().splitlines()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_writer=writer,
        vocab_size=VOCAB,
        minloglevel=2,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )
    return writer.getvalue()


def save_mistral(folder, **changes):
    """Save a random Mistral of 2 layers by transformers, with `vocabulary`'s tokenizer.

    Its weights are large enough for logits to differ.
    """
    import transformers

    torch.manual_seed(0)
    sizes = dict(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        sliding_window=None,
        initializer_range=0.2,
        rms_norm_eps=1e-5,
    )
    model = transformers.MistralForCausalLM(transformers.MistralConfig(**sizes | changes))
    model.save_pretrained(folder)
    (Path(folder) / "tokenizer.model").write_bytes(vocabulary())
    return Path(folder)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return save_mistral(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def tokenizer(base):
    return load_tokenizer(base)


@pytest.fixture(scope="module")
def clone(base, tokenizer, tmp_path_factory):
    """A random model folder with ChatML tokens and a persona."""
    folder = tmp_path_factory.mktemp("clone")
    random_model = model.Transformer(hf.with_vocab_size(hf.read_config(base), VOCAB + 2))
    load_weights(random_model, base)
    save_model(random_model, folder, tokenizer, torch.float32)
    tokenizer.save(folder)
    contacts = [{"name": "Bob"}, {"name": "Eve"}]
    (folder / "persona.json").write_text(json.dumps({"me": "Ann", "contacts": contacts}))
    return folder


@pytest.fixture(scope="session")
def chats(tmp_path_factory):
    """A data folder: Ann answers 'ok then' to all that Bob asks; 60 sessions, 12 held out."""
    folder = tmp_path_factory.mktemp("chats")
    lines = []
    for n in range(60):
        at = f"2024-01-01T00:{n:02}:00"
        session = {"chat": "Bob", "chat_id": "1", "type": "personal_chat", "start": at, "turns": []}
        for author, *messages in (
            ("Bob", f"shall we meet on day {n}?", "or not"),
            ("Ann", "ok then", f"day {n} it is"),
            ("Bob", "good"),
            ("Ann", "see you \U0001f986"),
        ):
            turn = {"author": author, "me": author == "Ann", "at": at, "messages": messages}
            session["turns"].append(turn)
        lines.append(json.dumps(session) + "\n")
    (folder / "train.jsonl").write_text("".join(lines[:48]))
    (folder / "val.jsonl").write_text("".join(lines[48:]))
    (folder / "persona.json").write_text(
        '{"me": "Ann", "contacts": [{"name": "Bob", "messages": 3}]}'
    )
    return folder


# --- a stand-in for CUDA's varlen_attn on a CPU


@torch.library.custom_op("standin::varlen_attn", mutates_args=())
def varlen_attn(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, window: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention by the plain formula, as an op that saves what torch's varlen_attn saves.

    That is q, k, v, the output, and a float32 per query and head.
    """
    probabilities, _, values = attention_probabilities(q, k, v, cu_seqlens, window)
    out = torch.einsum("hnm,mhd->nhd", probabilities, values).contiguous()
    return out, out.new_zeros(q.shape[1], len(q), dtype=torch.float32)


@torch.library.custom_op("standin::varlen_attn_backward", mutates_args=())
def varlen_attn_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    probabilities, keys, values = attention_probabilities(q, k, v, cu_seqlens, window)
    along = torch.einsum("nhd,mhd->hnm", grad, values)
    centred = along - (along * probabilities).sum(-1, keepdim=True)
    scores = probabilities * centred * q.shape[2] ** -0.5
    grad_q = torch.einsum("hnm,mhd->nhd", scores, keys)
    grad_k = torch.einsum("hnm,nhd->mhd", scores, q).unflatten(1, (k.shape[1], -1)).sum(2)
    grad_v = torch.einsum("hnm,nhd->mhd", probabilities, grad).unflatten(1, (k.shape[1], -1)).sum(2)
    return grad_q.contiguous(), grad_k.contiguous(), grad_v.contiguous()


def attention_probabilities(q, k, v, cu_seqlens, window):
    """Compute probabilities (H, N, N), and keys and values repeated for each head (N, H, D)."""
    keys, values = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    token = torch.arange(len(q), device=q.device)
    document = torch.searchsorted(cu_seqlens, token, right=True)
    ahead = token - token[:, None]
    mask = (ahead <= 0) & (ahead > -window) & (document == document[:, None])
    scores = torch.einsum("nhd,mhd->hnm", q, keys).float() * q.shape[2] ** -0.5
    return scores.masked_fill(~mask, -torch.inf).softmax(-1).to(q.dtype), keys, values


@varlen_attn.register_fake
def _(q, k, v, cu_seqlens, window):
    return torch.empty_like(q), q.new_empty(q.shape[1], len(q), dtype=torch.float32)


@varlen_attn_backward.register_fake
def _(grad, q, k, v, cu_seqlens, window):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4], *output)
    ctx.window = inputs[4]


def backward(ctx, grad, _):
    return *varlen_attn_backward(grad.contiguous(), *ctx.saved_tensors[:4], ctx.window), None, None


varlen_attn.register_autograd(backward, setup_context=setup_context)


@pytest.fixture
def varlen_on_cpu(monkeypatch):
    """Use the stand-in for batches whose `cu_seqlens` are a tensor, as on CUDA."""

    def kernel(q, k, v, documents):
        return varlen_attn(q, k, v, documents.cu_seqlens, documents.window or len(q))[0]

    monkeypatch.setattr(model, "varlen_kernel", lambda: kernel)


# --- programs


@functools.cache
def warm():
    """The connection to this worker's tests/warm.py, which ends with it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    args = [sys.executable, ROOT / "tests" / "warm.py", str(theirs.fileno())]
    subprocess.Popen(args, env={**os.environ, "OMP_NUM_THREADS": "1"}, pass_fds=[theirs.fileno()])
    theirs.close()
    ours.settimeout(600)
    return ours


class Program:
    """One of the project's programs in a fork of tests/warm.py; used like a subprocess.Popen.

    With `ranks`, so many of them that find each other as under torchrun. `streams`: its stdin,
    stdout and stderr, open files.
    """

    def __init__(self, args, streams, env=None, ranks=1):
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(env or {})}
        self.pids, self.reports, self.codes = [], [], [None] * ranks
        if ranks > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
            env |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        for rank in range(ranks):
            if ranks > 1:
                env |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            ours, theirs = socket.socketpair()
            message = json.dumps([[*map(str, args)], env, str(ROOT)]).encode()
            files = [*(file.fileno() for file in streams), theirs.fileno()]
            socket.send_fds(warm(), [message], files)
            theirs.close()
            self.reports.append(ours.makefile())
            self.pids.append(int(self.reports[rank].readline()))
        self.pid = self.pids[0]

    def poll(self, timeout=0):
        """Return None while it runs, then its exit code; of several ranks 0 or 1, as torchrun."""
        until = time.monotonic() + timeout
        for rank, report in enumerate(self.reports):
            if self.codes[rank] is None:
                left = max(0, until - time.monotonic())
                if select.select([report], [], [], left)[0]:
                    self.codes[rank] = int(report.readline())
        if None in self.codes:
            return None
        return self.codes[0] if len(self.codes) == 1 else int(any(self.codes))

    def wait(self, timeout=600):
        code = self.poll(timeout)
        if code is None:
            raise subprocess.TimeoutExpired("a program", timeout)
        return code

    def send_signal(self, number):
        for pid in self.pids:
            os.kill(pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)


def command(*args, env=None, stdin="", ranks=1):
    """Run one of the project's programs as a person does → CompletedProcess with text.

    With an `env`, in a Python of its own.
    """
    if env:
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env}
        args = [sys.executable, *map(str, args)]
        return subprocess.run(
            args, cwd=ROOT, env=env, input=stdin, capture_output=True, text=True, timeout=600
        )
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(3)]
        streams[0].write(stdin)
        streams[0].seek(0)
        code = Program(args, streams, ranks=ranks).wait()
        for stream in streams[1:]:
            stream.seek(0)
        return subprocess.CompletedProcess(args, code, *(s.read() for s in streams[1:]))


def refused(done, *expected):
    """Assert exit code 2, one or two lines on stderr without a traceback, and the `expected`."""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.returncode == 2, done.stderr
    assert 1 <= len(lines) <= 2 and "Traceback" not in done.stderr, done.stderr
    for text in expected:
        assert text in done.stderr, done.stderr
