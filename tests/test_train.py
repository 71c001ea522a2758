import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import VOCAB, command, refused, save_mistral
from safetensors.torch import load_file

import cli
import data
import lora
import train
from training import distributed, optim, step
from training.run import Plan, plan_run
from training.run_dir import BestTracker, EvalPoint, RunDir
from weights import hf
from weights.load import load_model
from weights.tokenizer import load_tokenizer

ALONE = distributed.Distributed(torch.device("cpu"))
QUICK = ("--seq-len", 160, "--device", "cpu", "--dtype", "fp32", "--samples", 0)


def curve(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line], [
        line for line in lines if "val_loss" in line
    ]


def fine_tune(base, chats, out, *flags, ranks=1, env=None):
    done = command(
        "train.py",
        "--model",
        base,
        "--data",
        chats,
        "--out",
        out,
        *QUICK,
        *flags,
        ranks=ranks,
        env=env,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module", params=["lora", "qlora", "full"])
def reference_run(request, base, chats, tmp_path_factory):
    """(flags, out, output) of a run in one process, one micro-batch. The base lacks ChatML tokens:
    new rows are added and trained."""
    flags = ("--lr", 3e-3) if request.param == "full" else (f"--{request.param}", "--lr", 1e-2)
    flags = (*flags, "--max-steps", 6, "--micro-batch", 8)
    out = tmp_path_factory.mktemp("alone") / "ckpt"
    return flags, out, fine_tune(base, chats, out, *flags, "--samples", 1)


def test_ranks_and_micro_batches_give_the_same_curve(reference_run, base, chats, tmp_path):
    flags, out, _ = reference_run
    losses, val_lines = curve(out)
    assert len(losses) == 6 and losses[-1] < losses[0]
    for name, other in {
        "two ranks": {"ranks": 2, "more": ("--samples", 1)},
        "three ranks, recomputing": {"ranks": 3, "more": ("--activation-checkpointing", "full")},
        "four micro-batches": {"micro": 2},
    }.items():
        changed = [*flags[:-1], other.get("micro", 8), *other.get("more", ())]
        fine_tune(base, chats, tmp_path / name, *changed, ranks=other.get("ranks", 1))
        other_losses, other_val_lines = curve(tmp_path / name)
        assert other_losses == pytest.approx(losses, rel=2e-4), name
        assert [line["val_bits_per_char"] for line in other_val_lines] == pytest.approx(
            [line["val_bits_per_char"] for line in val_lines], rel=1e-3
        ), name
        for file in ("adapter_model.safetensors", "model.safetensors"):
            if (out / file).exists():
                one, two = load_file(out / file), load_file(tmp_path / name / file)
                assert one.keys() == two.keys(), name
                # AdamW's first steps are signs of gradients: near 0 they may differ by some lr.
                for key in one:
                    off = (one[key].float() - two[key].float()).abs()
                    assert off.mean() < 2e-3 and one[key].shape == two[key].shape, (name, key)


def test_output_folder_is_complete(reference_run, base, tokenizer):
    flags, out, done = reference_run
    names = {path.name for path in out.iterdir()}
    assert {
        "tokenizer.json",
        "tokenizer_config.json",
        "persona.json",
        "run.json",
        "metrics.jsonl",
    } <= names
    assert names & {"adapter_model.safetensors", "model.safetensors"} and not [
        n for n in names if n.endswith(".new")
    ]
    assert out.stat().st_mode & 0o777 == 0o700
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert set(lines[1]) == {
        "step",
        "loss",
        "lr",
        "grad_norm",
        "tokens",
        "trained_tokens",
        "tok_per_s",
        "mfu",
        "hfu",
        "peak_gib",
        "seconds",
    }
    assert {"val_loss", "val_bits_per_char", "val_format_loss"} <= set(lines[0]) and lines[0][
        "step"
    ] == 0
    run = json.loads((out / "run.json").read_text())
    assert (
        run["config"]["lora"] == ("--lora" in flags or "--qlora" in flags)
        and torch.__version__.startswith(run["versions"]["torch"])
        and run["result"]["steps"] == 6
    )
    assert "you wrote" in done.stderr + done.stdout and "best at epoch" in done.stderr + done.stdout
    if "--lora" in flags or "--qlora" in flags:
        rows = json.loads((out / "adapter_config.json").read_text())["trainable_token_indices"]
        assert rows == {"embed_tokens": tokenizer.added, "lm_head": tokenizer.added}


def test_init_starts_from_the_earlier_run(reference_run, base, chats, tmp_path):
    flags, out, _ = reference_run
    ended = min(line["val_loss"] for line in curve(out)[1][1:])
    kind = [flag for flag in flags if flag in ("--lora", "--qlora")]
    for ranks in (1, 2):
        to = tmp_path / f"on {ranks}"
        fine_tune(
            out if not kind else base,
            chats,
            to,
            *kind,
            "--init",
            out,
            "--max-steps",
            1,
            ranks=ranks,
        )
        assert curve(to)[1][0]["val_loss"] == pytest.approx(
            ended, rel=2e-3
        )  # a full fine-tune's folder is bf16
    refused(
        command(
            "train.py",
            "--data",
            chats,
            "--init",
            chats,
            "--out",
            tmp_path / "no",
            "--device",
            "cpu",
        ),
        "--init",
        "holds no model",
    )


def test_auto_micro_batch_and_measured_prediction(base, chats, tmp_path):
    own = {
        "OMP_NUM_THREADS": "1"
    }  # a Python of its own: of a fork the pages of torch aren't counted
    done = fine_tune(base, chats, tmp_path / "ckpt", "--lora", "--max-steps", 4, env=own)
    run = json.loads((tmp_path / "ckpt" / "run.json").read_text())
    assert (
        run["config"]["micro_batch"] == 2
        and "2 rows at a time, activation checkpointing none" in done.stdout + done.stderr
    )
    pairs = run["prediction"]
    assert (
        set(pairs) == {"gib", "measured_gib", "tok_per_s", "measured_tok_per_s"}
        and min(pairs.values()) > 0
    )
    assert pairs["gib"] == pytest.approx(pairs["measured_gib"], rel=0.15)
    assert f"measured {pairs['measured_gib']:.2f}" in done.stdout
    assert f"timed: {pairs['tok_per_s']:,.0f} tok/s, 4 steps in about" in done.stdout + done.stderr


def test_saved_weights_are_the_best_not_the_last(base, chats, tmp_path):
    """With a rate that ruins the model after a while, the saved one has the best line's loss."""
    fine_tune(
        base,
        chats,
        tmp_path / "ckpt",
        "--lora",
        "--lr",
        3.0,
        "--epochs",
        40,
        "--patience",
        4,
        "--warmup",
        1,
    )
    losses, val_lines = curve(tmp_path / "ckpt")
    best = min(line["val_loss"] for line in val_lines[1:])
    assert best < val_lines[-1]["val_loss"]
    assert [line["val_loss"] for line in val_lines[-5:]].index(
        best
    ) == 0  # patience: four worse ones, then the end
    model = load_model(str(tmp_path / "ckpt"), torch.float32)
    rows = data.load_rows(chats / "val.jsonl", load_tokenizer(tmp_path / "ckpt"), 160)
    assert step.evaluate(model, rows, ALONE, 2).metrics["val_loss"] == pytest.approx(best, rel=1e-3)


def test_from_scratch_needs_no_weights_and_equals_two_ranks(base, chats, tmp_path):
    shape = tmp_path / "shape"
    shape.mkdir()
    for name in ("config.json", "tokenizer.model"):
        (shape / name).write_bytes((base / name).read_bytes())
    flags = ("--from-scratch", "--max-steps", 3, "--lr", 1e-3, "--loss-on", "everyone")
    fine_tune(shape, chats, tmp_path / "one", *flags)
    fine_tune(shape, chats, tmp_path / "two", *flags, ranks=2)
    assert curve(tmp_path / "one")[0] == pytest.approx(curve(tmp_path / "two")[0], rel=1e-4)
    assert curve(tmp_path / "one")[0][0] == pytest.approx(math.log(VOCAB + 2), rel=0.05)


def test_tied_weights_stay_tied_on_two_ranks(chats, tmp_path):
    tied = save_mistral(tmp_path / "tied", tie_word_embeddings=True)
    for n, flags in enumerate([("--lora", "--lr", 1e-2), ("--lr", 1e-3)]):
        fine_tune(tied, chats, tmp_path / f"one{n}", *flags, "--max-steps", 3)
        fine_tune(tied, chats, tmp_path / f"two{n}", *flags, "--max-steps", 3, ranks=2)
        assert curve(tmp_path / f"one{n}")[0] == pytest.approx(
            curve(tmp_path / f"two{n}")[0], rel=2e-4
        )


def test_pure_bf16_trains_and_saves_bf16(base, chats, tmp_path):
    fine_tune(
        base,
        chats,
        tmp_path / "ckpt",
        "--pure-bf16",
        "--lr",
        1e-3,
        "--max-steps",
        5,
        "--dtype",
        "bf16",
        "--samples",
        0,
    )
    losses, _ = curve(tmp_path / "ckpt")
    assert losses[-1] < losses[0] - 0.5
    saved = load_file(tmp_path / "ckpt" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    assert hf.open_folder(tmp_path / "ckpt").dtype == torch.bfloat16
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ckpt")
    assert theirs.dtype == torch.bfloat16 and torch.equal(
        theirs.model.norm.weight, saved["model.norm.weight"]
    )


BILLIONS, MILLIONS = 7_000_000_000, 135_000_000


@pytest.mark.parametrize(
    ("rows", "batch", "steps"),
    [(1000, 8, 375), (200, 8, 75), (52, 8, 50), (20, 1, 60), (3, 1, 51), (1, 1, 50)],
)
def test_little_data_still_gets_50_steps(rows, batch, steps):
    plan = plan_run(rows, train.Options(), BILLIONS)
    assert plan.batch <= batch + 2 and plan.steps >= 50 and abs(plan.steps - steps) <= 5, plan
    evaluations = [s for s in plan.evaluate_at if s <= plan.epoch]
    assert len(evaluations) >= min(4, plan.epoch) and plan.steps in plan.evaluate_at


def test_recompute_is_an_alias_of_activation_checkpointing():
    options = cli.parse(train.Options, ["--recompute", "full"])
    assert options.activation_checkpointing == "full"


def test_best_tracker_counts_evaluations_since_the_best():
    tracker = BestTracker()
    assert not tracker.add(EvalPoint(0, 0.0, 1.0, 1.0))  # before training: never the best
    added = [
        tracker.add(EvalPoint(n, n / 9, loss, loss)) for n, loss in ((1, 3.0), (2, 2.0), (3, 2.0))
    ]
    assert added == [True, True, False]
    assert (tracker.best.step, tracker.last.step, tracker.since_best) == (2, 3, 1)
    assert BestTracker.from_metadata(json.loads(json.dumps(tracker.state()))) == tracker


def test_default_learning_rates_are_those_of_help():
    """A LoRA's rate would ruin the weights of a full fine-tune; a small base learns too slowly."""
    for adapter, lr, parameters, expected in (
        (True, None, BILLIONS, 2e-4),
        (False, None, BILLIONS, 2e-5),
        (True, None, MILLIONS, 2e-3),
        (False, None, MILLIONS, 2e-4),
        (True, 1e-3, MILLIONS, 1e-3),
    ):
        plan = plan_run(1000, train.Options(lora=adapter, lr=lr), parameters)
        assert plan.lr == pytest.approx(expected)


def test_learning_rate_warms_up_then_follows_a_cosine():
    rates = [optim.lr_at(n, 100, 1.0, 0.03) for n in range(1, 101)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1]) and rates[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(rates[2:], rates[3:]))


def test_each_epoch_has_every_row_once_in_a_new_order():
    plan = Plan(batch=4, epoch=3, steps=7, lr=1.0, evaluate_at=frozenset())
    steps = list(train.step_rows(list(range(10)), plan, seed=0))
    epochs = [sum(steps[0:3], []), sum(steps[3:6], [])]
    assert (
        [len(b) for b in steps] == [4, 4, 2, 4, 4, 2, 4]
        and [sorted(e) for e in epochs] == [list(range(10))] * 2
        and epochs[0] != epochs[1]
    )
    assert steps == list(train.step_rows(list(range(10)), plan, seed=0))


def test_generate_samples_leaves_dropout_on(base, chats, tokenizer):
    shape = hf.with_vocab_size(hf.read_config(base), VOCAB + 2)
    model = step.build_model(shape, ALONE, step.ModelSpec({"dropout": 0.5}, torch.float32))
    prompts = train.sample_prompts(train.Options(data=str(chats), samples=1))
    (sample,) = train.generate_samples(model, tokenizer, prompts, ALONE, 0)
    assert "you wrote: ok then / day" in sample and model.training


def test_sharded_adapter_is_saved_in_fp32(base, tokenizer, monkeypatch):
    """After a forward pass FSDP2 shows the root's parameters in bf16: not those must be saved."""
    # Private: two ranks in one process, without a network.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    saved = {}
    monkeypatch.setattr(lora, "save", lambda model, out, base, tensors: saved.update(tensors))
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        ranks = distributed.Distributed(torch.device("cpu"), 0, 2)
        shape = hf.with_vocab_size(hf.read_config(base), tokenizer.rows_needed)
        options = train.Options(lora=True, model=str(base))
        model = step.build_model(shape, ranks, step.ModelSpec({"rows": tokenizer.added}))
        with torch.no_grad():
            model(torch.arange(3, 9)[None])
        run = SimpleNamespace(options=options, base=SimpleNamespace(folder=base))
        RunDir(run, ranks).save_weights(model)
    finally:
        torch.distributed.destroy_process_group()
    assert len(saved) == 2 * 7 * 2 + 2 and {tensor.dtype for tensor in saved.values()} == {
        torch.float32
    }


# --- errors that a user can fix


def test_missing_data_gpu_or_network_say_what_to_do(base, chats, tmp_path):
    refused(
        command("train.py", "--lora", "--data", tmp_path / "none"), "python data.py result.json"
    )
    if not torch.cuda.is_available():
        refused(command("train.py", "--lora", "--data", chats), "No GPU", "--device cpu")
        refused(
            command("train.py", "--lora", "--data", chats, "--model", "nope"),
            "nope: there is no such folder",
        )
    refused(
        command("train.py", "--download-only", "--model", "nobody/nothing"),
        "nobody/nothing",
        "--model",
    )
    refused(
        command("train.py", "--model", tmp_path / "nowhere", "--data", chats, "--device", "cpu"),
        "no such folder",
    )


def test_overwrite_forgets_the_earlier_micro_batch(base, chats, tmp_path):
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt" / "micro-batch.json").write_text('{"micro_batch": 1}')
    fine_tune(base, chats, tmp_path / "ckpt", "--lora", "--max-steps", 1, "--overwrite")
    assert not (tmp_path / "ckpt" / "micro-batch.json").exists()


def test_enospc_of_metrics_says_what_is_kept(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(
        cli.UserError,
        match="metrics.jsonl can't be written: the disk is full\n.* holds no model yet. Free some",
    ):
        RunDir(SimpleNamespace(options=train.Options(out=str(tmp_path))), ALONE).append({"step": 1})


def test_bad_flags_and_folders_write_nothing(base, chats, tmp_path):
    common = ("--model", base, "--data", chats, "--out", tmp_path / "ckpt", *QUICK)
    refused(command("train.py", *common, "--lora", "--lora-targets", "q_proj,w1"), "w1", "q_proj")
    for flag, value in (
        ("--micro-batch", 0),
        ("--micro-batch", "many"),
        ("--max-steps", -1),
        ("--lr", 0),
        ("--lora-dropout", 1.5),
        ("--seed", -1),
        ("--warmup", 3),
        ("--device", "abacus"),
    ):
        refused(command("train.py", *common, flag, value), flag)
    refused(command("train.py", *common, "--seq-len", 1024), "512 tokens")
    refused(command("train.py", *common, "--lora", "--pure-bf16"), "--pure-bf16", "adapter")
    refused(
        command("train.py", *common, "--loss-on", "everyone", "--short-weight", 0.5),
        "--short-weight",
        "--loss-on everyone",
    )
    uneven = save_mistral(tmp_path / "uneven", hidden_size=96)
    refused(
        command("train.py", "--qlora", "--model", uneven, *common[2:]),
        "--qlora",
        "blocks of 64",
        "96 wide",
    )
    refused(command("train.py", *common[:4], "--out", base, "--overwrite", *QUICK), "is an input")
    assert not (tmp_path / "ckpt").exists()
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt" / "mine.txt").write_text("precious")
    refused(command("train.py", *common, "--lora"), "--overwrite")
    assert [p.name for p in (tmp_path / "ckpt").iterdir()] == ["mine.txt"]
