"""Compiled blocks, as on CUDA: few graphs, the same numbers, and a line where compiling fails.

CPU tensors go through Dynamo and AOTAutograd, with a stand-in for CUDA's attention kernel.
"""

import dataclasses
import functools
import shutil

import pytest
import torch
from conftest import ROOT, command
from torch._dynamo.utils import counters

from model import IGNORE_INDEX, ModelConfig
from training import distributed, metrics, optim, step

CONFIG = ModelConfig(200, 64, 128, 10, 4, 2, 16, sliding_window=40)
ADAPTER = {"rank": 4, "alpha": 8}
SPECS = {
    "lora": step.ModelSpec(ADAPTER, torch.float32),
    "lora with new rows": step.ModelSpec({**ADAPTER, "rows": [198, 199]}, torch.float32),
    "lora with dropout": step.ModelSpec({**ADAPTER, "dropout": 0.1}, torch.float32),
    "qlora": step.ModelSpec(ADAPTER, torch.float32, nf4=True),
    "full": step.ModelSpec(dtype=torch.float32),
    "pure": step.ModelSpec(pure_bf16=True),
}
LENGTH = 32


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def random_batch(seed: int, rows: int, documents: int) -> step.Batch:
    """A batch of exactly so many documents, each within a row, as `step.collate` makes on CUDA."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 200, (rows, LENGTH), generator=generator)
    labels = tokens.where(torch.rand(rows, LENGTH, generator=generator) < 0.4, IGNORE_INDEX)
    inner = [i for i in range(1, rows * LENGTH) if i % LENGTH]
    borders = [inner[i] for i in torch.randperm(len(inner), generator=generator)]
    borders = sorted([*range(0, rows * LENGTH + 1, LENGTH), *borders[: documents - rows]])
    lengths = [end - begin for begin, end in zip(borders, borders[1:])]
    assert len(lengths) == documents
    positions = torch.cat([torch.arange(n) for n in lengths]).view(rows, LENGTH)
    targets = (labels != IGNORE_INDEX).flatten().nonzero().flatten()
    return step.Batch(tokens, positions, labels, torch.tensor(borders, dtype=torch.int32), targets)


def train_and_evaluate(model, ranks, rows: int) -> None:
    for seed, documents in enumerate((rows, rows + 4, 5 * rows)):
        batch = random_batch(seed, rows, documents)
        step.accumulate_gradients(model, [batch], ranks, 1)
        with torch.no_grad():
            model.eval()(**batch._asdict(), reduction="none")
        model.train()


MODES = dict(zip(SPECS, ["selective", "none", "selective", "full", "none", "full"]))


@pytest.mark.parametrize("kind, mode", MODES.items())
def test_at_most_four_graphs_for_ten_blocks_and_any_documents(kind, mode, varlen_on_cpu, caplog):
    spec = dataclasses.replace(SPECS[kind], activation_checkpointing=mode)
    ranks = distributed.Distributed(torch.device("cpu"))
    model = step.build_model(CONFIG, ranks, spec)
    step.compile_model(model, optim.make_optimizer(model, 1e-3, 0.0, spec.pure_bf16))
    graphs = []
    for rows in (2, 1):  # the second as after an out-of-memory error, on top of the first
        train_and_evaluate(model, ranks, rows)
        graphs.append(metrics.count_compiled_graphs())
    assert 1 <= graphs[0] <= 4
    assert graphs[1] <= 2 * graphs[0]
    assert not counters["graph_break"]
    assert "limit" not in caplog.text


def test_a_recompile_limit_is_said_in_one_line(varlen_on_cpu, capsys):
    ranks = distributed.Distributed(torch.device("cpu"))
    model = step.build_model(CONFIG, ranks, SPECS["full"])
    step.compile_model(model, optim.make_optimizer(model, 1e-3, 0.0))
    with torch._dynamo.config.patch(recompile_limit=2):
        for rows in range(1, 6):
            step.accumulate_gradients(model, [random_batch(0, rows, 9)], ranks, 1)
    said = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(said) == 1 and "not compiled" in said[0], said


FSDP = """
import functools, json, sys
sys.path.insert(0, sys.argv[1])
import conftest, model, torch
from test_compile import CONFIG, SPECS, random_batch
from training import distributed, optim, step

if sys.argv[3] == "compiled":
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
kernel = lambda q, k, v, documents: conftest.varlen_attn(
    q, k, v, documents.cu_seqlens, documents.window or len(q))[0]
model.varlen_kernel = lambda: kernel
ranks = distributed.init_distributed("cpu")
spec = SPECS[sys.argv[2]]
trained = step.build_model(CONFIG, ranks, spec)
optimizer = optim.make_optimizer(trained, 3e-2, 0.0, spec.pure_bf16)
if sys.argv[3] == "compiled":
    step.compile_model(trained, optimizer)
losses = []
for documents in (3, 7, 12):
    batch = random_batch(ranks.rank, 2, documents)  # the same tokens each time: something to learn
    losses.append(step.train_step(trained, optimizer, [batch, batch], ranks)[0])
if ranks.is_main:
    print(json.dumps(losses))
torch.distributed.destroy_process_group()
"""


@pytest.mark.parametrize("kind", ["lora with new rows", "qlora", "full"])
def test_compiled_shards_train_as_eager_ones(kind, tmp_path):
    script = tmp_path / "fsdp.py"
    script.write_text(FSDP)
    losses = []
    for how in ("eager", "compiled"):
        done = command(script, ROOT / "tests", kind, how, ranks=2)
        assert done.returncode == 0, done.stderr
        losses.append(eval(done.stdout.splitlines()[-1]))
    assert losses[0][-1] < losses[0][0] - 0.02  # something is learned
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_compiled_bf16_update_equals_the_eager_one_but_for_rounding():
    """The moments to the last bit; the weights at most one bf16 step apart, whatever the rate."""
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(n).bfloat16()) for n in (64, 1000, 333)]
    copies = [torch.nn.Parameter(w.detach().clone()) for w in weights]
    eager, compiled = (optim.BF16AdamW(w, 1e-3, 0.1) for w in (weights, copies))
    optim.compile_update(compiled)
    for rate in (1e-3, 2e-3, 3e-3, 4e-3):
        for one, other in zip(weights, copies):
            other.data.copy_(one)
            one.grad = other.grad = torch.randn(len(one)).bfloat16()
        for optimizer in (eager, compiled):
            optim.set_lr(optimizer, rate)
            optimizer.step()
        for one, other in zip(weights, copies):
            for name in optim.ADAM_STATE:
                assert torch.equal(eager.state[one][name], compiled.state[other][name])
            assert (one.view(torch.int16) - other.view(torch.int16)).abs().max() <= 1
    assert metrics.count_compiled_graphs() <= 2


def test_a_missing_compiler_is_named(tmp_path):
    """A rented box has no compiler. A CPU needs one for everything, a GPU for Triton's launcher."""
    script = tmp_path / "try.py"
    script.write_text(
        "import torch\nfrom training import step\n"
        "print(step.compiler_problem(torch.device('cpu')))\n"
    )
    environment = {"PATH": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = command(script, env=environment)
    assert done.returncode == 0, done.stderr
    problem = done.stdout.strip()
    assert problem != "None" and len(problem.splitlines()) == 1
    if shutil.which("g++"):
        done = command(script, env={"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")})
        assert done.stdout.strip() == "None", done.stdout + done.stderr
