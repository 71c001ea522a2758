import json

import peft
import pytest
import torch
import transformers
from conftest import command, refused, save_mistral

import checkpoint
import lora
from config import UserError

ROWS = [32000, 32001]


def grown(folder, **adapter):
    """Our model of `folder` with room for two ChatML tokens, and an adapter with values that aren't at their start."""
    shape = checkpoint.with_vocabulary(checkpoint.read_config(folder), 32002)
    model = checkpoint.Transformer(shape)
    checkpoint.fill(model, folder)
    lora.inject(model, rows=ROWS, **adapter)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in lora.trained(model).values():
            parameter += torch.randn_like(parameter) * 0.1
    return model


def tokens():
    return torch.randint(0, 32002, (2, 21), generator=torch.Generator().manual_seed(3)).index_fill(1, torch.tensor([4, 9]), 32001)


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def folder(request, tmp_path_factory):
    return save_mistral(tmp_path_factory.mktemp("lora"), tie_word_embeddings=request.param)


def test_an_adapter_changes_nothing_at_first(base):
    model = checkpoint.load_model(str(base), torch.float32)
    text = torch.arange(3, 40)[None]
    before = model(text)
    matched = lora.inject(model, rows=[5, 6])
    assert len(matched) == 7 * 2 and "model.layers.1.mlp.down_proj" in matched
    torch.testing.assert_close(model(text), before)


def test_only_the_adapter_gets_gradients_and_dropout_acts_in_training_alone(folder):
    model = grown(folder, dropout=0.5)
    model(tokens(), labels=tokens())[0].backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == set(lora.trained(model)) and all(".lora_" in n or n.endswith("row_values") for n in with_gradient)
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
    torch.testing.assert_close(embed, plain.model.embed_tokens.weight.grad[ROWS], atol=1e-4, rtol=1e-3)
    if not model.config.tie_word_embeddings:
        torch.testing.assert_close(model.lm_head.row_values.grad, plain.lm_head.weight.grad[ROWS], atol=1e-4, rtol=1e-3)


def test_merged_equals_unmerged(folder):
    model = grown(folder)
    with torch.no_grad():
        before = model(tokens())
        merged = lora.merge(model)
        torch.testing.assert_close(merged(tokens()), before, atol=1e-4, rtol=1e-4)
    assert set(merged.state_dict()) == set(checkpoint.Transformer(merged.config).state_dict())


def test_what_we_save_loads_in_peft_with_equal_logits(folder, tmp_path):
    ours = grown(folder, rank=4, alpha=12)
    lora.save(ours, tmp_path, folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs.resize_token_embeddings(32002)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens()), theirs(tokens()).logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours(tokens()), checkpoint.load_model(str(tmp_path))(tokens()), atol=1e-5, rtol=1e-5)


def test_what_peft_saves_loads_here_with_equal_logits(folder, tmp_path):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs.resize_token_embeddings(32002)
    rows = {"embed_tokens": ROWS} | ({} if theirs.config.tie_word_embeddings else {"lm_head": ROWS})
    settings = peft.LoraConfig(
        r=4, lora_alpha=12, target_modules=list(lora.TARGETS), init_lora_weights=False, trainable_token_indices=rows, task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(theirs, settings).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter += torch.randn_like(parameter) * 0.1
    theirs.save_pretrained(tmp_path)
    ours = checkpoint.load_model(str(tmp_path), base=str(folder))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens()), theirs(tokens()).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("targets", [["q_proj", "wq"], []])
def test_an_unknown_target_is_an_error_and_changes_nothing(base, targets):
    model = checkpoint.load_model(str(base))
    with pytest.raises(UserError, match="q_proj"):
        lora.inject(model, targets=targets)
    assert not hasattr(model, "lora") and type(model.model.layers[0].self_attn.q_proj).__name__ == "Linear"


def test_merge_command_writes_a_folder_that_transformers_loads(base, words, tmp_path):
    model = grown(base)
    ckpt, clone = tmp_path / "ckpt", tmp_path / "clone"
    ckpt.mkdir()
    lora.save(model, ckpt, base)
    words.save(ckpt)
    (ckpt / "persona.json").write_text("{}")
    done = command("lora.py", "merge", ckpt, clone)
    assert done.returncode == 0, done.stderr
    theirs = transformers.AutoModelForCausalLM.from_pretrained(clone, dtype=torch.float32)
    assert theirs.config.eos_token_id == words.im_end and (clone / "persona.json").exists()
    with torch.no_grad():
        ours = model.eval()(tokens())
        error = (ours - theirs(tokens()).logits).std() / ours.std()
    assert error < 0.01  # the clone's weights are rounded to bf16
    refused(command("lora.py", "merge", ckpt, clone), "already holds something")
    refused(command("lora.py", "merge", base, tmp_path / "other"), "no adapter")
    assert not (tmp_path / "other").exists()


def test_an_adapter_of_another_base_is_refused_by_name(base, tmp_path):
    lora.save(grown(base), tmp_path, base)
    other = save_mistral(tmp_path / "other", hidden_size=32)
    with pytest.raises(UserError, match="wrong shape.*\n.*another base"):
        checkpoint.load_model(str(tmp_path), base=str(other))
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**said, "use_dora": True}))
    with pytest.raises(UserError, match="use_dora"):
        checkpoint.load_model(str(tmp_path))
