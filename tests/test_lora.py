import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from conftest import VOCAB, command, refused, save_mistral
from safetensors.torch import load_file

import lora
from cli import UserError
from model import Linear, Transformer
from training import distributed, memory, step
from weights import hf, quantize, shards
from weights.load import load_model, load_weights
from weights.merge import merge_and_check

ALONE = distributed.Distributed(torch.device("cpu"))
ROWS = [VOCAB, VOCAB + 1]


def grown(folder, **adapter):
    """Our model of `folder` with room for two ChatML tokens, and an adapter with values that aren't at their start."""
    shape = hf.with_vocab_size(hf.read_config(folder), VOCAB + 2)
    model = Transformer(shape)
    load_weights(model, folder)
    lora.inject(model, rows=ROWS, **adapter)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in lora.adapter_parameters(model).values():
            parameter += torch.randn_like(parameter) * 0.1
    return model


def tokens():
    return torch.randint(
        0, VOCAB + 2, (2, 21), generator=torch.Generator().manual_seed(3)
    ).index_fill(1, torch.tensor([4, 9]), VOCAB + 1)


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def folder(request, tmp_path_factory):
    return save_mistral(tmp_path_factory.mktemp("lora"), tie_word_embeddings=request.param)


def test_an_adapter_changes_nothing_at_first(base):
    model = load_model(str(base), torch.float32)
    text = torch.arange(3, 40)[None]
    before = model(text)
    matched = lora.inject(model, rows=[5, 6])
    assert len(matched) == 7 * 2 and "model.layers.1.mlp.down_proj" in matched
    torch.testing.assert_close(model(text), before)


def test_an_adapter_begins_as_wide_as_pefts(base):
    ours = load_model(str(base), torch.float32)
    lora.inject(ours, rank=8)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base)
    theirs = peft.get_peft_model(
        theirs, peft.LoraConfig(r=8, target_modules=list(lora.TARGETS), task_type="CAUSAL_LM")
    )
    drawn = {name.replace(".default", ""): p for name, p in theirs.named_parameters()}
    for name, parameter in lora.adapter_parameters(ours).items():
        one, other = parameter.abs().max().item(), drawn[lora.peft_name(name)].abs().max().item()
        assert one == pytest.approx(other, rel=0.05), (
            name
        )  # uniform: the largest of 512 lie at its end


def test_gradients_are_those_of_the_formula():
    """Autograd's own of (W + alpha / rank * B A) x; with alpha other than rank, so that a lost factor shows."""
    torch.manual_seed(0)
    layer = Linear(6, 5, bias=False).requires_grad_(False)
    layer.__class__ = lora.LoRALinear
    layer.attach(2, alpha=6, dropout=0.0)
    x, back = torch.randn(2, 3, 6, requires_grad=True), torch.randn(2, 3, 5)
    leaves = [x, layer.lora_A, layer.lora_B]
    with torch.no_grad():
        for parameter in leaves[1:]:
            parameter.normal_()
    plain = x @ (layer.weight + 6 / 2 * layer.lora_B @ layer.lora_A).T
    torch.testing.assert_close(layer(x), plain)
    for ours, theirs in zip(
        torch.autograd.grad(layer(x), leaves, back),
        torch.autograd.grad(plain, leaves, back),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_only_the_adapter_gets_gradients_and_dropout_acts_in_training_alone(folder):
    model = grown(folder, dropout=0.5)
    model(tokens(), labels=tokens())[0].backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == set(lora.adapter_parameters(model)) and all(
        ".lora_" in n or n.endswith("row_values") for n in with_gradient
    )
    assert not torch.equal(model(tokens()), model(tokens()))
    model.eval()
    assert torch.equal(model(tokens()), model(tokens()))


def test_gradients_of_new_rows_equal_those_of_the_whole_embedding(folder):
    """Training two rows apart is training the whole matrix and looking at two rows."""
    model = grown(folder)
    plain = lora.merge(grown(folder)).requires_grad_(True)
    for m in (model, plain):
        m(tokens(), labels=tokens())[0].backward()
    embed = model.model.embed_tokens.row_values.grad
    torch.testing.assert_close(
        embed, plain.model.embed_tokens.weight.grad[ROWS], atol=1e-4, rtol=1e-3
    )
    if not model.config.tie_word_embeddings:
        torch.testing.assert_close(
            model.lm_head.row_values.grad, plain.lm_head.weight.grad[ROWS], atol=1e-4, rtol=1e-3
        )


def test_merged_equals_unmerged(folder):
    model = grown(folder)
    with torch.no_grad():
        before = model(tokens())
        merged = lora.merge(model)
        torch.testing.assert_close(merged(tokens()), before, atol=1e-4, rtol=1e-4)
    assert set(merged.state_dict()) == set(Transformer(merged.config).state_dict())


def test_what_we_save_loads_in_peft_with_equal_logits(folder, tmp_path):
    ours = grown(folder, rank=4, alpha=12)
    lora.save(ours, tmp_path, folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs.resize_token_embeddings(VOCAB + 2)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens()), theirs(tokens()).logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            ours(tokens()), load_model(str(tmp_path))(tokens()), atol=1e-5, rtol=1e-5
        )


def test_what_peft_saves_loads_here_with_equal_logits(folder, tmp_path):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs.resize_token_embeddings(VOCAB + 2)
    rows = {"embed_tokens": ROWS} | ({} if theirs.config.tie_word_embeddings else {"lm_head": ROWS})
    settings = peft.LoraConfig(
        r=4,
        lora_alpha=12,
        target_modules=list(lora.TARGETS),
        init_lora_weights=False,
        trainable_token_indices=rows,
        task_type="CAUSAL_LM",
    )
    theirs = peft.get_peft_model(theirs, settings).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter += torch.randn_like(parameter) * 0.1
    theirs.save_pretrained(tmp_path)
    ours = load_model(str(tmp_path), base=str(folder))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens()), theirs(tokens()).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("weights", [None, "plain"])
def test_numbers_that_are_none_in_an_adapter_are_not_said_to_be_the_bases(base, tmp_path, weights):
    model = grown(base)
    with torch.no_grad():
        next(iter(lora.adapter_parameters(model).values())).fill_(torch.nan)
    lora.save(model, tmp_path, base)
    with pytest.raises(UserError, match="adapter_model.safetensors: tensor .* holds NaN"):
        load_model(str(tmp_path), base=str(base), weights=weights)


def test_a_disk_that_is_full_leaves_the_adapter_before(base, tmp_path, monkeypatch):
    lora.save(grown(base), tmp_path, base)
    before = (tmp_path / "adapter_model.safetensors").read_bytes()

    def half(tensors, path, **_):
        Path(path).write_bytes(before[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lora, "save_file", half)
    with pytest.raises(UserError, match="the disk is full"):
        lora.save(grown(base), tmp_path, base)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before


@pytest.mark.parametrize("targets", [["q_proj", "wq"], []])
def test_an_unknown_target_is_an_error_and_changes_nothing(base, targets):
    model = load_model(str(base))
    with pytest.raises(UserError, match="q_proj"):
        lora.inject(model, targets=targets)
    assert (
        not hasattr(model, "lora")
        and type(model.model.layers[0].self_attn.q_proj).__name__ == "Linear"
    )


def test_merge_command_writes_a_folder_that_transformers_loads(base, tokenizer, tmp_path):
    model = grown(base)
    ckpt, clone = tmp_path / "ckpt", tmp_path / "clone"
    ckpt.mkdir()
    lora.save(model, ckpt, base)
    tokenizer.save(ckpt)
    (ckpt / "persona.json").write_text('{"me": "Ann"}')
    before = (base / "model.safetensors").read_bytes()
    done = command("lora.py", "merge", ckpt, clone, "--as", 'Bob "the ME"')
    assert done.returncode == 0, done.stderr
    assert (base / "model.safetensors").read_bytes() == before  # whose pages the merge wrote into
    assert 'set me = "Ann"' in (clone / "tokenizer_config.json").read_text().replace("\\", "")
    recipe = (clone / "Modelfile").read_text()
    assert recipe.count('"""') == 2 and 'eq .Role "user" }}{{ "Bob \\"the ME\\"" }}{{' in recipe
    assert '<|im_start|>{{ "Ann" }}\n>>>"""\nPARAMETER stop <|im_end|>\n' in recipe
    theirs = transformers.AutoModelForCausalLM.from_pretrained(clone, dtype=torch.float32)
    assert theirs.config.eos_token_id == tokenizer.im_end and (clone / "persona.json").exists()
    with torch.no_grad():
        ours = model.eval()(tokens())
        error = (ours - theirs(tokens()).logits).std() / ours.std()
    assert error < 0.015  # the clone's weights are rounded to bf16
    refused(command("lora.py", "merge", ckpt, clone), "already holds something")
    refused(command("lora.py", "merge", base, tmp_path / "other"), "no adapter")
    assert not (tmp_path / "other").exists()


def test_a_merge_that_changes_the_answers_is_refused(folder, monkeypatch):
    real = lora.merge

    def wrong(model):
        model.model.layers[1].mlp.up_proj.scale *= 1.5
        return real(model)

    ids = tokens()[0].tolist()
    merge_and_check(grown(folder), ids)
    monkeypatch.setattr(lora, "merge", wrong)
    with pytest.raises(UserError, match="logits differ by .*%.*\nNothing was written"):
        merge_and_check(grown(folder), ids)


def test_an_adapter_of_another_base_is_refused_by_name(base, tmp_path):
    lora.save(grown(base), tmp_path, base)
    other = save_mistral(tmp_path / "other", hidden_size=32)
    with pytest.raises(
        UserError, match=r"is \[2, 64\], the base makes it \[2, 32\]\n.*another base"
    ):
        load_model(str(tmp_path), base=str(other))
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**said, "use_dora": True}))
    with pytest.raises(UserError, match="use_dora"):
        load_model(str(tmp_path))


# --- over a base in 4 bits


def packed(folder, dtype=torch.float32):
    """A QLoRA model as train.py builds it, with values in its adapter that aren't at their start."""
    shape = hf.with_vocab_size(hf.read_config(folder), VOCAB + 2)
    model = step.build_model(shape, ALONE, folder, {"rank": 8, "rows": ROWS}, dtype, nf4=True)
    return stir(model)


def stir(model):
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in lora.adapter_parameters(model).values():
            parameter += torch.randn_like(parameter) * 0.1
    return model


def test_qlora_keeps_the_blocks_linear_layers_in_4_bits_and_all_else_as_it_was(folder):
    model, file = packed(folder), load_file(folder / "model.safetensors")
    stored = dict(model.named_parameters())
    linears = {
        name
        for name in file
        if name.startswith("model.layers.") and not name.endswith("norm.weight")
    }
    assert len(linears) == 7 * 2 and not linears & set(stored)
    for name in linears:
        for part, expected in zip(("codes", "scales", "ranges"), quantize.quantize(file[name])):
            parameter = stored.pop(name.replace("weight", part))
            assert torch.equal(parameter, expected) and not parameter.requires_grad
    whole = {name: p for name, p in stored.items() if name.endswith(".weight")}
    assert set(whole) == set(file) - linears
    assert all(torch.equal(p[: len(file[name])], file[name]) for name, p in whole.items())
    assert all(".lora_" in name or name.endswith("row_values") for name in set(stored) - set(whole))


def test_qlora_trains_as_lora_does_over_the_weights_that_its_4_bits_stand_for(folder):
    model = packed(folder)
    plain = grown(folder, rank=8).train()
    with torch.no_grad():
        for module in plain.modules():
            if isinstance(module, lora.LoRALinear):
                module.weight.copy_(
                    quantize.dequantize(*quantize.quantize(module.weight), torch.float32)
                )
        for one, other in zip(
            lora.adapter_parameters(plain).values(),
            lora.adapter_parameters(model).values(),
            strict=True,
        ):
            one.copy_(other)
    losses = [m(tokens(), labels=tokens())[0] for m in (model, plain, grown(folder, rank=8))]
    assert (
        losses[0].item()
        == pytest.approx(losses[1].item(), rel=1e-6)
        != pytest.approx(losses[2].item(), rel=1e-4)
    )
    losses[0].backward()
    losses[1].backward()
    expected = lora.adapter_parameters(plain)
    for name, parameter in lora.adapter_parameters(model).items():
        torch.testing.assert_close(parameter.grad, expected[name].grad, atol=1e-5, rtol=1e-5)


def test_what_qlora_saves_is_an_adapter_of_the_unquantised_base(folder, tmp_path):
    model = packed(folder)
    lora.save(model, tmp_path, folder)
    loaded = load_model(str(tmp_path), torch.bfloat16)
    assert {type(m).__name__ for m in loaded.model.layers.modules()} >= {"LoRALinear"}
    assert loaded.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    for name, parameter in lora.adapter_parameters(model).items():
        assert torch.equal(dict(loaded.named_parameters())[name], parameter)
    assert loaded(tokens()).isfinite().all()


def test_a_base_is_quantised_as_it_is_read_never_whole_in_memory(tmp_path):
    base = save_mistral(
        tmp_path, vocab_size=100, hidden_size=128, intermediate_size=512, num_hidden_layers=8
    ).resolve()
    sizes = [t.nbytes for t in load_file(base / "model.safetensors").values()]  # float32
    with memory.MemoryTracker() as live:
        model = step.build_meta_model(
            hf.read_config(base), ALONE, {"rank": 4}, torch.float32, "none", True, False
        )
        shards.materialize(model, "cpu")
        held = live.peak = live.now
        load_weights(model, base)
    assert held == live.now == sum(p.nbytes for p in model.parameters())
    assert max(sizes) < live.peak - held < 5 * max(sizes) < sum(sizes) / 4
