"""Memory doesn't grow with the number of shapes: after 300 rounds the peak is near that after 10.

`make soak` runs it. Each case is a process of its own: oneDNN keeps kernels of bf16 shapes.
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

import cli
import data
from inference import generate, scoring
from model import ModelConfig
from training import distributed, metrics, optim, step
from weights.tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent
ROUNDS = int(os.environ.get("GROWTH", 0))
SEQ_LEN = 1024
SLACK = 20  # MiB


def make_model(adapter=None):
    import torch

    config = ModelConfig(2048, 256, 768, 8, 4, 2, 64, max_position_embeddings=SEQ_LEN)
    ranks = distributed.Distributed(torch.device("cpu"))
    return step.build_model(config, ranks, step.ModelSpec(adapter))


def random_row(rng):
    """A full row of random documents, a random share of its tokens targets."""
    import numpy as np

    lengths = []
    while sum(lengths) < SEQ_LEN:
        lengths.append(min(rng.randint(1, rng.choice((20, 100, 400))), SEQ_LEN - sum(lengths)))
    ids = np.array([rng.randrange(3, 2000) for _ in range(SEQ_LEN)], np.int32)
    labels = np.where(np.arange(SEQ_LEN) % 10 < rng.randint(1, 9), ids, data.IGNORE_INDEX)
    sizes = np.array(lengths, np.int32)
    return data.Row(ids, labels, labels != data.IGNORE_INDEX, sizes, sizes, np.zeros_like(sizes))


def random_turns(rng):

    def text():
        return " ".join(rng.choices(TEXT, k=rng.randint(1, rng.choice((5, 60)))))

    count = rng.choice((1, 1, 3, 5))
    return [data.Turn(("Ann", "Bob")[i % 2], bool(i % 2), "", [text()]) for i in range(count)]


def trains(rng):
    import torch

    model = make_model({"rank": 8, "alpha": 16}).train()
    optimizer = optim.make_optimizer(model, 1e-4, 0.0)
    ranks = distributed.Distributed(torch.device("cpu"))
    while True:
        step.train_step(model, optimizer, step.micro_batches([random_row(rng)], 1, ranks), ranks)
        yield


def trains_all_weights(rng):
    import torch

    model = make_model().train()
    optimizer = optim.make_optimizer(model, 1e-4, 0.0)
    ranks = distributed.Distributed(torch.device("cpu"))
    while True:
        rows = [random_row(rng), random_row(rng)]
        step.train_step(model, optimizer, step.micro_batches(rows, 2, ranks), ranks)
        yield


def chats(rng):

    model, tokenizer = make_model().eval(), base_tokenizer()
    decoder = generate.Decoder(model, tokenizer, SEQ_LEN)
    while True:
        room = rng.randint(1, 40)
        for _ in generate.Answer(decoder, random_turns(rng), "Bob", room, seed=rng.randrange(99)):
            pass
        yield


def evaluates(rng):
    import torch

    model, tokenizer = make_model().eval(), base_tokenizer()
    decoder = generate.Decoder(model, tokenizer, scoring.cache_size(SEQ_LEN))
    ranks = distributed.Distributed(torch.device("cpu"))
    while True:
        examples = []
        for number in range(3):
            replies = [random_turns(rng)[0].messages for _ in range(3)]
            examples.append(scoring.Example(number, random_turns(rng), "Bob", replies))
        if rng.random() < 0.25:  # up to 64 tokens each: most of the time
            scoring.answer(decoder, examples, SEQ_LEN, rng.randrange(99))
        else:
            scoring.reply_nats(decoder, examples[0], SEQ_LEN)
        step.evaluate(model, [random_row(rng)], ranks, 1)
        model.eval()
        yield


def base_tokenizer():
    return load_tokenizer(os.environ["BASE"])


CASES = (trains, trains_all_weights, chats, evaluates)
TEXT = (ROOT / "examples" / "pellhaven.txt").read_text().split()


def main():
    """Print the peak after 10 rounds and after all of them, in MiB."""
    import torch

    torch.manual_seed(0)
    case = {case.__name__: case for case in CASES}[sys.argv[1]](random.Random(0))
    peaks = []
    for number in range(1, int(sys.argv[2]) + 1):
        next(case)
        if number in (10, int(sys.argv[2])):
            peaks.append(1024 * metrics.peak_gib(torch.device("cpu")))
    print(json.dumps(peaks))


@pytest.mark.skipif(not ROUNDS, reason="300 rounds of each take minutes: make soak")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_peak_memory_does_not_grow_while_it(case, base):
    command = [sys.executable, __file__, case.__name__, str(ROUNDS)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "BASE": str(base)}
    done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    early, late = json.loads(done.stdout)
    print(f"{case.__name__}: peak {early:.0f} MiB after 10 rounds, {late:.0f} after {ROUNDS}")
    assert late < 1.1 * early + SLACK


if __name__ == "__main__":
    training = sys.argv[1].startswith("trains")
    cli.run(main, cli.TRAINING_MMAP_BYTES if training else cli.MMAP_BYTES)
