"""bases.toml has each base's published config, and plan.py needs no hub for it."""

import json
import re
import socket
import sys

import pytest
import torch
import transformers
from conftest import ROOT
from test_plan import refuse, run

import bench.tokens
import plan
from cli import UserError
from training import cost
from training.step import ModelSpec
from weights import devices, hf, hub

KINDS = {"mistral": "Mistral", "ministral3": "Ministral3", "qwen3": "Qwen3", "llama": "Llama"}
PAGE = (ROOT / "docs" / "BASES.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
VISION = [name for name in plan.BASE_CONFIGS if re.search(r"Ministral-3-|Small-3\.", name)]


def theirs(name):
    """Make transformers' config of a base from bases.toml, with RoPE in its newer key."""
    raw_config = {
        key: value for key, value in vars(plan.BASE_CONFIGS[name]).items() if key != "rope_scaling"
    }
    rope = {"rope_type": "default", "rope_theta": raw_config.pop("rope_theta")}
    rope |= plan.BASE_CONFIGS[name].rope_scaling or {}
    return getattr(transformers, f"{KINDS[raw_config['model_type']]}Config")(
        **raw_config, rope_parameters=rope
    )


@pytest.mark.parametrize("name", plan.BASE_CONFIGS)
def test_parameter_count_is_the_published_one_and_that_of_transformers(name):
    shape, published = plan.BASE_CONFIGS[name], plan.BASES[name]["published"]
    last_digit = 10.0 ** -len(published.partition(".")[2])
    assert abs(shape.num_parameters / 1e9 - float(published)) < last_digit
    settings = theirs(name)
    with torch.device("meta"):
        model = getattr(transformers, f"{KINDS[shape.model_type]}ForCausalLM")(settings)
    assert shape.num_parameters == model.num_parameters()


@pytest.mark.parametrize("name", plan.BASE_CONFIGS)
def test_config_json_is_read_to_the_same_config(name, tmp_path):
    """A vision model's language model is in `text_config`, which alone ties the head or doesn't."""
    raw_config = theirs(name).to_dict()
    if name in VISION:
        raw_config = {
            "architectures": ["Mistral3ForConditionalGeneration"],
            "model_type": "mistral3",
            "text_config": raw_config,
            "vision_config": {},
        }
    (tmp_path / "config.json").write_text(json.dumps(raw_config))
    assert hf.read_config(tmp_path) == plan.BASE_CONFIGS[name]


def test_ministral_in_fp8_is_refused(tmp_path):
    raw_config = {
        "model_type": "mistral3",
        "text_config": theirs("mistralai/Ministral-3-3B-Base-2512").to_dict(),
    }
    raw_config |= {"quantization_config": {"quant_method": "fp8", "activation_scheme": "static"}}
    (tmp_path / "config.json").write_text(json.dumps(raw_config))
    with pytest.raises(UserError, match="quantized weights"):
        hf.read_config(tmp_path)


@pytest.mark.parametrize("name", plan.BASE_CONFIGS)
def test_base_has_a_source_and_a_place_on_the_page(name):
    assert plan.BASES[name]["source"] and plan.BASES[name]["published"]
    assert f"`{name}`" in PAGE


def offline(monkeypatch):
    def refuses(*_, **__):
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuses)
    monkeypatch.setattr(hub, "cached_folder", lambda model: None)


@pytest.mark.parametrize("name", plan.BASE_CONFIGS)
def test_base_is_planned_without_the_hub(name, capsys, monkeypatch):
    offline(monkeypatch)
    monkeypatch.setattr(cost, "peak_memory", lambda *_, **__: {"weights": devices.GIB})
    found = json.loads(
        run(capsys, monkeypatch, "--model", name, "--gpu", "4090", "--lora", "--json")
    )
    assert found["fits"] and found["disk_gb"]["base"] == pytest.approx(
        plan.BASE_CONFIGS[name].num_parameters * 2e-9, abs=0.1
    )


def test_new_rows_are_the_missing_chatml_tokens():
    for name, shape in plan.BASE_CONFIGS.items():
        grown, rows, _ = (
            plan.base_config(name) if not hub.cached_folder(name) else (shape, (), None)
        )
        has = name.startswith(("Qwen/", "HuggingFaceTB/", "teknium/"))
        assert bool(plan.BASES[name].get("chatml")) == has and len(rows) == (0 if has else 2), name
        assert grown.vocab_size == shape.vocab_size + len(rows)


@pytest.mark.parametrize("name", ["Qwen/Qwen99-8B", "someone/else"])
def test_unknown_base_error_lists_the_known_ones(name, monkeypatch):
    monkeypatch.setattr(
        hub,
        "fetch_config",
        lambda model: (_ for _ in ()).throw(UserError(f"{model} is nowhere", "Give a folder.")),
    )
    monkeypatch.setattr(hub, "cached_folder", lambda model: None)
    message = refuse(monkeypatch, "--gpu", "3090", "--model", name)
    assert message.startswith(f"{name} is nowhere\nGive a folder. ") and all(
        known in message for known in plan.BASE_CONFIGS
    )


def test_memory_on_the_page_is_what_plan_prints(
    model="mistralai/Ministral-3-8B-Base-2512", way="lora"
):
    """One row of the table is enough: all come from the same program."""
    row = re.search(
        rf"^\| `{re.escape(model)}` \| `--gpu (\S+) --{way}` \| ([\d.]+) of", PAGE, re.M
    )
    card = cost.GPUS[row[1]]
    shape, added, _ = plan.base_config(model)
    spec = ModelSpec({"rank": 32, "alpha": 16, "rows": added}, nf4=way == "qlora")
    choice = cost.choose_micro_batch(
        cost.StepWorkload(shape, spec, 8), card, (card.gib - 2) * devices.GIB
    )
    assert choice.fits and choice.bytes / devices.GIB + 2 == pytest.approx(float(row[2]), abs=0.06)


def test_readme_recommends_known_bases():
    table = README.partition("## Which base")[2].partition("\n## ")[0]
    names = re.findall(r"^\| [^|]*\| `(\S+/\S+)`", table, re.M)
    assert len(names) >= 5 and set(names) <= {*plan.BASE_CONFIGS, "examples/base"}


def test_tokens_in_four_languages_are_those_of_mistral_common(capsys, monkeypatch):
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    path = bench.tokens.OURS["tekken (Nemo, Small 3)"]
    monkeypatch.setattr(bench.tokens, "OURS", {})
    monkeypatch.setattr(sys, "argv", ["bench.tokens", f"tekken={path}"])
    bench.tokens.main()
    *found, added = map(
        float, re.search(r"^tekken +(.*)$", capsys.readouterr().out, re.M)[1].split()
    )
    talks, reference = bench.tokens.read_talks(), Tekkenizer.from_file(path)
    counts = [len(reference.encode(text, bos=False, eos=False)) for text in talks.values()]
    assert found[::2] == [
        round(1000 * count / len(text)) for count, text in zip(counts, talks.values())
    ]
    assert found[1::2] == [round(count / counts[0], 2) for count in counts] and added == 2
    assert (
        "| tekken: Nemo, Small 3; Ministral 3 | "
        + " | ".join(
            f"{each:.0f}" + (f" ({times})" if times != 1 else "")
            for each, times in zip(found[::2], found[1::2])
        )
        in PAGE
    )
    messages = {len(text.splitlines()) for text in talks.values()}
    assert len(messages) == 1, "the talks have the same messages"
