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


def with_adapter(folder, **adapter):
    """Our model of `folder` with two ChatML tokens, its adapter moved from its initial values."""
    config = hf.with_vocab_size(hf.read_config(folder), VOCAB + 2)
    model = Transformer(config)
    load_weights(model, folder)
    lora.inject(model, rows=ROWS, **adapter)
    return perturb(model)


def perturb(model):
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in lora.adapter_parameters(model).values():
            parameter += torch.randn_like(parameter) * 0.1
    return model


def tokens():
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, VOCAB + 2, (2, 21), generator=generator)
    return ids.index_fill(1, torch.tensor([4, 9]), VOCAB + 1)


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def folder(request, tmp_path_factory):
    return save_mistral(tmp_path_factory.mktemp("lora"), tie_word_embeddings=request.param)


def test_injected_adapter_changes_nothing_at_first(base):
    model = load_model(str(base), torch.float32)
    text = torch.arange(3, 40)[None]
    before = model(text)
    matched = lora.inject(model, rows=[5, 6])
    assert len(matched) == 7 * 2 and "model.layers.1.mlp.down_proj" in matched
    torch.testing.assert_close(model(text), before)


def test_initial_values_are_distributed_as_pefts(base):
    ours = load_model(str(base), torch.float32)
    lora.inject(ours, rank=8)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base)
    theirs = peft.get_peft_model(
        theirs, peft.LoraConfig(r=8, target_modules=list(lora.TARGETS), task_type="CAUSAL_LM")
    )
    expected = {name.replace(".default", ""): p for name, p in theirs.named_parameters()}
    for name, parameter in lora.adapter_parameters(ours).items():
        # The largest of 512 uniform numbers lies at the end of their range.
        largest = expected[lora.peft_name(name)].abs().max().item()
        assert parameter.abs().max().item() == pytest.approx(largest, rel=0.05), name


def test_layers_of_one_kind_share_a_class(base):
    """torch.compile compiles once per class."""
    model = load_model(str(base), torch.float32)
    quantize.pack_linears(model)
    lora.inject(model)
    classes = {type(m) for m in model.modules() if isinstance(m, lora.LoRALinear)}
    assert classes == {lora.adapted_class(quantize.NF4Linear)}
    assert issubclass(*classes, quantize.NF4Linear)


def test_gradients_equal_autograds_of_the_formula():
    """(W + alpha / rank * B A) x, with alpha other than rank, so that a lost factor shows."""
    torch.manual_seed(0)
    layer = Linear(6, 5, bias=False).requires_grad_(False)
    layer.__class__ = lora.LoRALinear
    layer.attach(2, alpha=6, dropout=0.0)
    x, grad = torch.randn(2, 3, 6, requires_grad=True), torch.randn(2, 3, 5)
    leaves = [x, layer.lora_A, layer.lora_B]
    with torch.no_grad():
        for parameter in leaves[1:]:
            parameter.normal_()
    plain = x @ (layer.weight + 6 / 2 * layer.lora_B @ layer.lora_A).T
    torch.testing.assert_close(layer(x), plain)
    ours, theirs = (torch.autograd.grad(y, leaves, grad) for y in (layer(x), plain))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_only_the_adapter_gets_gradients_and_dropout_acts_only_in_training(folder):
    model = with_adapter(folder, dropout=0.5)
    model(tokens(), labels=tokens())[0].backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == set(lora.adapter_parameters(model))
    assert all(".lora_" in name or name.endswith("row_values") for name in with_gradient)
    assert not torch.equal(model(tokens()), model(tokens()))
    model.eval()
    assert torch.equal(model(tokens()), model(tokens()))


def test_row_gradients_equal_those_of_the_whole_embedding(folder):
    model = with_adapter(folder)
    plain = lora.merge(with_adapter(folder)).requires_grad_(True)
    for m in (model, plain):
        m(tokens(), labels=tokens())[0].backward()
    pairs = [(model.model.embed_tokens, plain.model.embed_tokens)]
    if not model.config.tie_word_embeddings:
        pairs.append((model.lm_head, plain.lm_head))
    for ours, whole in pairs:
        expected = whole.weight.grad[ROWS]
        torch.testing.assert_close(ours.row_values.grad, expected, atol=1e-4, rtol=1e-3)


def test_merged_equals_unmerged(folder):
    model = with_adapter(folder)
    with torch.no_grad():
        before = model(tokens())
        merged = lora.merge(model)
        torch.testing.assert_close(merged(tokens()), before, atol=1e-4, rtol=1e-4)
    assert set(merged.state_dict()) == set(Transformer(merged.config).state_dict())


def test_saved_adapter_loads_in_peft_with_equal_logits(folder, tmp_path):
    ours = with_adapter(folder, rank=4, alpha=12)
    lora.save(ours, tmp_path, folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs.resize_token_embeddings(VOCAB + 2)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens()), theirs(tokens()).logits, atol=1e-4, rtol=1e-4)
        again = load_model(str(tmp_path))(tokens())
        torch.testing.assert_close(ours(tokens()), again, atol=1e-5, rtol=1e-5)


def test_adapter_saved_by_peft_loads_here_with_equal_logits(folder, tmp_path):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs.resize_token_embeddings(VOCAB + 2)
    rows = {"embed_tokens": ROWS}
    if not theirs.config.tie_word_embeddings:
        rows["lm_head"] = ROWS
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
def test_nan_in_an_adapter_is_an_error_that_names_the_adapter(base, tmp_path, weights):
    model = with_adapter(base)
    with torch.no_grad():
        next(iter(lora.adapter_parameters(model).values())).fill_(torch.nan)
    lora.save(model, tmp_path, base)
    with pytest.raises(UserError, match="adapter_model.safetensors: tensor .* holds NaN"):
        load_model(str(tmp_path), base=str(base), weights=weights)


def test_full_disk_keeps_the_previous_adapter(base, tmp_path, monkeypatch):
    lora.save(with_adapter(base), tmp_path, base)
    before = (tmp_path / "adapter_model.safetensors").read_bytes()

    def save_half(tensors, path, **_):
        Path(path).write_bytes(before[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lora, "save_file", save_half)
    with pytest.raises(UserError, match="the disk is full"):
        lora.save(with_adapter(base), tmp_path, base)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before


@pytest.mark.parametrize("targets", [["q_proj", "wq"], []])
def test_unknown_target_is_an_error_and_changes_nothing(base, targets):
    model = load_model(str(base))
    with pytest.raises(UserError, match="q_proj"):
        lora.inject(model, targets=targets)
    assert not hasattr(model, "lora")
    assert type(model.model.layers[0].self_attn.q_proj) is Linear


def test_merge_command_writes_a_folder_that_transformers_loads(base, tokenizer, tmp_path):
    model = with_adapter(base)
    ckpt, clone = tmp_path / "ckpt", tmp_path / "clone"
    ckpt.mkdir()
    lora.save(model, ckpt, base)
    tokenizer.save(ckpt)
    (ckpt / "persona.json").write_text('{"me": "Ann"}')
    before = (base / "model.safetensors").read_bytes()
    done = command("lora.py", "merge", ckpt, clone, "--as", 'Bob "the ME"')
    assert done.returncode == 0, done.stderr
    # The merge wrote into mapped pages of the base, which must stay as it was.
    assert (base / "model.safetensors").read_bytes() == before
    assert 'set me = "Ann"' in (clone / "tokenizer_config.json").read_text().replace("\\", "")
    modelfile = (clone / "Modelfile").read_text()
    assert modelfile.count('"""') == 2
    assert 'eq .Role "user" }}{{ "Bob \\"the ME\\"" }}{{' in modelfile
    assert '<|im_start|>{{ "Ann" }}\n>>>"""\nPARAMETER stop <|im_end|>\n' in modelfile
    theirs = transformers.AutoModelForCausalLM.from_pretrained(clone, dtype=torch.float32)
    assert theirs.config.eos_token_id == tokenizer.im_end and (clone / "persona.json").exists()
    with torch.no_grad():
        ours = model.eval()(tokens())
        error = (ours - theirs(tokens()).logits).std() / ours.std()
    assert error < 0.015  # the clone's weights are rounded to bf16
    refused(command("lora.py", "merge", ckpt, clone), "already holds something")
    refused(command("lora.py", "merge", base, tmp_path / "other"), "no adapter")
    assert not (tmp_path / "other").exists()


def test_merge_that_changes_the_logits_is_refused(folder, monkeypatch):
    merge = lora.merge

    def wrong_merge(model):
        model.model.layers[1].mlp.up_proj.scale *= 1.5
        return merge(model)

    ids = tokens()[0].tolist()
    merge_and_check(with_adapter(folder), ids)
    monkeypatch.setattr(lora, "merge", wrong_merge)
    with pytest.raises(UserError, match="merging changes the logits by .*%.*\nNothing was written"):
        merge_and_check(with_adapter(folder), ids)


def test_adapter_of_another_base_or_kind_is_refused(base, tmp_path):
    lora.save(with_adapter(base), tmp_path, base)
    other = save_mistral(tmp_path / "other", hidden_size=32)
    message = r"is \[2, 64\], the base makes it \[2, 32\]\n.*another base"
    with pytest.raises(UserError, match=message):
        load_model(str(tmp_path), base=str(other))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    with pytest.raises(UserError, match="use_dora"):
        load_model(str(tmp_path))


# --- over a base in 4 bits


def qlora_model(folder, dtype=torch.float32):
    """A QLoRA model as train.py builds it, its adapter moved from its initial values."""
    shape = hf.with_vocab_size(hf.read_config(folder), VOCAB + 2)
    spec = step.ModelSpec({"rank": 8, "rows": ROWS}, dtype, nf4=True)
    model = step.build_model(shape, ALONE, spec, folder)
    return perturb(model)


def test_qlora_quantizes_the_linear_layers_of_blocks_and_nothing_else(folder):
    model, file = qlora_model(folder), load_file(folder / "model.safetensors")
    stored = dict(model.named_parameters())
    linears = {name for name in file if name.startswith("model.layers.")}
    linears = {name for name in linears if not name.endswith("norm.weight")}
    assert len(linears) == 7 * 2 and not linears & set(stored)
    for name in linears:
        for part, expected in zip(("codes", "scales", "ranges"), quantize.quantize(file[name])):
            parameter = stored.pop(name.replace("weight", part))
            assert torch.equal(parameter, expected) and not parameter.requires_grad
    whole = {name: p for name, p in stored.items() if name.endswith(".weight")}
    assert set(whole) == set(file) - linears
    assert all(torch.equal(p[: len(file[name])], file[name]) for name, p in whole.items())
    assert all(".lora_" in name or name.endswith("row_values") for name in set(stored) - set(whole))


def test_qlora_trains_like_lora_over_the_dequantized_weights(folder):
    model = qlora_model(folder)
    plain = with_adapter(folder, rank=8).train()
    with torch.no_grad():
        for module in plain.modules():
            if isinstance(module, lora.LoRALinear):
                codes = quantize.quantize(module.weight)
                module.weight.copy_(quantize.dequantize(*codes, torch.float32))
        parameters = lora.adapter_parameters(model)
        for name, parameter in lora.adapter_parameters(plain).items():
            parameter.copy_(parameters[name])
    exact = with_adapter(folder, rank=8)
    losses = [m(tokens(), labels=tokens())[0] for m in (model, plain, exact)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    assert losses[0].item() != pytest.approx(losses[2].item(), rel=1e-4)
    losses[0].backward()
    losses[1].backward()
    expected = lora.adapter_parameters(plain)
    for name, parameter in lora.adapter_parameters(model).items():
        torch.testing.assert_close(parameter.grad, expected[name].grad, atol=1e-5, rtol=1e-5)


def test_saved_qlora_is_an_adapter_of_the_unquantized_base(folder, tmp_path):
    model = qlora_model(folder)
    lora.save(model, tmp_path, folder)
    loaded = load_model(str(tmp_path), torch.bfloat16)
    assert {type(m).__name__ for m in loaded.model.layers.modules()} >= {"LoRALinear"}
    assert loaded.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    for name, parameter in lora.adapter_parameters(model).items():
        assert torch.equal(dict(loaded.named_parameters())[name], parameter)
    assert loaded(tokens()).isfinite().all()


def test_base_is_quantized_as_it_is_read_never_whole_in_memory(tmp_path):
    base = save_mistral(
        tmp_path, vocab_size=100, hidden_size=128, intermediate_size=512, num_hidden_layers=8
    ).resolve()
    sizes = [t.nbytes for t in load_file(base / "model.safetensors").values()]  # float32
    with memory.MemoryTracker() as live:
        spec = step.ModelSpec({"rank": 4}, torch.float32, nf4=True)
        model = step.build_meta_model(hf.read_config(base), ALONE, spec)
        shards.materialize(model, "cpu")
        held = live.peak = live.now
        load_weights(model, base)
    assert held == live.now == sum(p.nbytes for p in model.parameters())
    assert max(sizes) < live.peak - held < 5 * max(sizes) < sum(sizes) / 4
