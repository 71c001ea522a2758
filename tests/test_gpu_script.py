"""bench/gpu.sh, as far as a CPU shows it: the table of stages, and what becomes of one that fails."""

import inspect
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from bench import gpu, gpu_stages
from bench.gpu import STAGES
from bench.step import random_base
from weights import hf
from weights.tokenizer import load_tokenizer


def stage_functions() -> set[str]:
    """Return the functions of bench/gpu_stages.py that have a stage's signature."""
    functions = inspect.getmembers(gpu_stages, inspect.isfunction)
    return {
        name
        for name, function in functions
        if list(inspect.signature(function).parameters)[-1:] == ["setup"]
        and inspect.signature(function).return_annotation is dict
    }


def test_every_stage_is_in_the_table_and_the_first_call_fits():
    functions = [getattr(stage.run, "func", stage.run) for stage in STAGES.values()]
    assert {function.__name__ for function in functions} == stage_functions()
    assert gpu.choose_stages(["1"])[0] == "versions"
    assert sorted(gpu.choose_stages(["1", "2"])) == sorted(STAGES)
    assert sum(stage.seconds for stage in STAGES.values() if stage.call == 1) <= gpu.SECONDS


def test_base_is_written_before_the_first_stage_that_needs_it(tmp_path):
    setup = gpu.Setup(tmp_path, dry=True)
    assert gpu.with_base(["one-rank", "lora", "profile"], setup) == [
        "one-rank", "base", "lora", "profile",
    ]  # fmt: skip
    assert gpu.with_base(["one-rank"], setup) == ["one-rank"]
    assert gpu.with_base(gpu.choose_stages(["1"]), setup) == gpu.choose_stages(["1"])
    (tmp_path / "rows").write_text("4")
    assert gpu.with_base(["lora"], setup) == ["lora"]


def test_gpu_sh_refuses_a_stage_that_is_not_there():
    command = ["bash", ROOT / "bench" / "gpu.sh", "halvings", "--dry-run"]
    env = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 2 and done.stderr.startswith("there is no stage halvings")


def test_main_ends_with_json_and_exit_code_1_if_a_stage_failed(monkeypatch, capsys):
    results = {"lora": {"tok_per_s": 15123.456}, "profile": {"failed": "exit code 1"}}
    monkeypatch.setattr(gpu, "run_stages", lambda *_: results)
    monkeypatch.setattr(sys, "argv", ["gpu", "2", "--dry-run"])
    with pytest.raises(SystemExit, match="1"):
        gpu.main()
    assert json.loads(capsys.readouterr().out)["lora"]["tok_per_s"] == 15120
    del results["profile"]
    gpu.main()


def test_a_failing_stage_leaves_the_next_one_alone(tmp_path, capsys):
    (tmp_path / "rows").write_text("4")  # a base without its model
    results = gpu.run_stages(["decode", "attention"], gpu.Setup(tmp_path, dry=True), 300)
    assert results["decode"]["failed"] == "exit code 2"
    assert 0 < results["attention"]["worst"] < gpu_stages.ROUNDING
    assert str(tmp_path / "base") in capsys.readouterr().out


def test_a_hanging_stage_is_ended(tmp_path):
    said = []
    setup = gpu.Setup(tmp_path, dry=True)
    result = gpu.run_stage("attention", setup, 0.2, str(tmp_path), said.append)
    assert result["failed"].startswith("not done after") and result["seconds"] < 30


def test_a_stage_is_skipped_without_time_or_without_its_base(tmp_path, capsys):
    results = gpu.run_stages(gpu.choose_stages(["1"]), gpu.Setup(tmp_path), 0)
    assert all("skipped" in figures for figures in results.values())
    assert "capped is skipped: it takes about" in capsys.readouterr().out


@pytest.mark.parametrize("installed", [True, False])
def test_random_base_has_a_tokenizer_of_its_size(tmp_path, monkeypatch, installed):
    if not installed:  # as on a rented GPU
        monkeypatch.setitem(sys.modules, "mistral_common", None)
    random_base(tmp_path, gpu_stages.TINY, "cpu")
    tokenizer = load_tokenizer(tmp_path / "base")
    assert hf.config_for_tokenizer(tmp_path / "base", tokenizer).vocab_size == 32002
    assert len(tokenizer) == 32002


def test_idle_share_is_the_time_that_no_kernel_covers():
    assert gpu_stages.idle_share([(5, 6), (0, 2), (1, 3), (1, 2)]) == pytest.approx(2 / 6)
