"""Every family that we say we support, beside transformers' own classes: small random folders, in float32."""

import json
import shutil

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import V1, command, refused
from safetensors.torch import load_file, save_file

import lora
from cli import UserError
from model import ApplyRotary, KVCache, Transformer, rope
from weights import hf
from weights.load import fingerprint, index_tensors, load_model, load_weights
from weights.save import save_model

SIZES = dict(
    vocab_size=320,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    initializer_range=0.2,
    pad_token_id=None,
)  # fmt: skip  (a pad token's row has no gradient there)
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 16.0,
    "original_max_position_embeddings": 8,
}
SCALED = {"llama_4_scaling_beta": 0.3, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
LLAMA3 |= {"original_max_position_embeddings": 16}
FAMILIES = {
    "mistral": ("Mistral", dict(sliding_window=7, head_dim=32)),
    "mistral, yarn": ("Mistral", dict(sliding_window=None, rope_parameters=YARN)),
    "ministral3": ("Ministral3", dict(head_dim=32, rope_parameters=YARN | SCALED)),
    "ministral3, tied": (
        "Ministral3",
        dict(head_dim=16, rope_parameters=YARN | SCALED, tie_word_embeddings=True),
    ),
    "ministral3, as it comes": ("Ministral3", dict(head_dim=16)),
    "yarn, its options": (
        "Llama",
        dict(rope_parameters=YARN | {"mscale": 2.0, "mscale_all_dim": 0.5, "truncate": False}),
    ),
    "yarn, one factor": (
        "Llama",
        dict(rope_parameters=YARN | {"attention_factor": 1.3, "beta_slow": 2.0}),
    ),
    "llama 2": ("Llama", dict(num_key_value_heads=4)),
    "llama 3.2": ("Llama", dict(rope_parameters=LLAMA3, tie_word_embeddings=True)),
    "llama, linear, biases": (
        "Llama",
        dict(
            rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
            attention_bias=True,
            mlp_bias=True,
        ),
    ),
    "qwen2": ("Qwen2", {}),
    "qwen2, window, tied": (
        "Qwen2",
        dict(
            use_sliding_window=True, sliding_window=7, max_window_layers=0, tie_word_embeddings=True
        ),
    ),
    "qwen3": ("Qwen3", dict(head_dim=32)),
    "qwen3, biases": ("Qwen3", dict(head_dim=16, attention_bias=True, rope_parameters=YARN)),
}


def random(kind, changes):
    """transformers' model of a family, none of its parameters at its first value."""
    torch.manual_seed(0)
    settings = getattr(transformers, f"{kind}Config")(**SIZES | changes)
    theirs = getattr(transformers, f"{kind}ForCausalLM")(settings).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.dim() == 1:
                parameter += torch.randn_like(parameter) * 0.2
    return theirs


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    """(folder, transformers' model, ours) of one family."""
    folder, theirs = tmp_path_factory.mktemp("family"), random(*FAMILIES[request.param])
    theirs.save_pretrained(folder)
    return folder, theirs, load_model(str(folder), torch.float32)


def tokens(*shape):
    return torch.randint(0, 320, shape, generator=torch.Generator().manual_seed(1))


def close(one, other):
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_logits_equal_transformers_whole_packed_and_cached(pair):
    _, theirs, ours = pair
    ids = tokens(2, 40)
    with torch.no_grad():
        full = theirs(ids).logits
        close(ours(ids), full)
        lengths = [9, 4, 27]
        packed = ours(ids, torch.cat([torch.arange(n) for n in lengths]).expand(2, -1))
        for got, alone in zip(packed.split(lengths, 1), ids.split(lengths, 1)):
            close(got, theirs(alone).logits)
        cache = KVCache(ours.config, 40, batch=2)
        close(
            torch.cat([ours(part, cache=cache) for part in ids.split([11, 1, 1, 6, 21], 1)], 1),
            full,
        )


def test_gradients_equal_transformers(pair):
    folder, theirs, _ = pair
    ours = load_model(str(folder), torch.float32).requires_grad_(True)
    ids = tokens(2, 20)
    labels = ids.roll(-1, 1).index_fill(1, torch.tensor([0, 5, 19]), -100)
    loss, count = ours(ids, labels=labels)
    (loss / count).backward()
    theirs.zero_grad()
    F.cross_entropy(theirs(ids).logits.flatten(0, 1), labels.flatten()).backward()
    expected = dict(theirs.named_parameters())
    assert {*expected} == {name for name, _ in ours.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, atol=1e-5, rtol=1e-3)
    assert ours.config.num_parameters == theirs.num_parameters()


def test_a_saved_folder_loads_in_both(pair, tmp_path, tokenizer):
    _, theirs, ours = pair
    save_model(ours, tmp_path, tokenizer, torch.float32)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(again) is type(theirs)
    with torch.no_grad():
        close(again(tokens(1, 30)).logits, theirs(tokens(1, 30)).logits)
        close(load_model(str(tmp_path))(tokens(1, 30)), theirs(tokens(1, 30)).logits)
    assert hf.read_config(tmp_path) == ours.config


def test_new_rows_are_the_mean_of_the_old_tied_or_not(pair):
    folder, theirs, _ = pair
    shape = hf.with_vocab_size(hf.read_config(folder), 323)
    grown = Transformer(shape)
    load_weights(grown, folder)
    for mine, old in (
        (grown.model.embed_tokens, theirs.get_input_embeddings()),
        (grown.lm_head, theirs.lm_head),
    ):
        assert mine.weight.shape == (323, 64) and torch.equal(mine.weight[:320], old.weight)
        torch.testing.assert_close(mine.weight[320:], old.weight.mean(0).expand(3, -1))
    assert (grown.lm_head.weight is grown.model.embed_tokens.weight) == shape.tie_word_embeddings


def test_adapters_go_to_peft_and_come_from_it(pair, tmp_path):
    folder, _, ours = pair
    ours = load_model(str(folder), torch.float32)
    lora.inject(ours, 4, 12)
    with torch.no_grad():
        for parameter in lora.adapter_parameters(ours).values():
            parameter += torch.randn_like(parameter) * 0.1
    lora.save(ours, tmp_path, folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path)
    with torch.no_grad():
        expected = theirs(tokens(2, 21)).logits
        close(ours(tokens(2, 21)), expected)
        theirs.save_pretrained(tmp_path / "peft")
        close(
            load_model(str(tmp_path / "peft"), torch.float32, base=str(folder))(tokens(2, 21)),
            expected,
        )
        close(lora.merge(ours)(tokens(2, 21)), expected)


# --- other folders


@pytest.mark.parametrize("kind", ["ministral3, tied", "ministral3", "mistral"])
def test_the_language_model_of_one_that_sees_is_loaded_alone(kind, tmp_path):
    """Ministral 3 and Small: `text_config` holds it, and the tensors have a prefix, in transformers 5's manner or the older."""
    name, changes = FAMILIES[kind]
    text = getattr(transformers, f"{name}Config")(**SIZES | changes)
    sight = transformers.PixtralVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
    )
    whole = transformers.Mistral3Config(
        text_config=text, vision_config=sight, tie_word_embeddings=text.tie_word_embeddings
    )
    torch.manual_seed(0)
    theirs = transformers.Mistral3ForConditionalGeneration(whole).eval()
    theirs.save_pretrained(tmp_path)
    ids = tokens(1, 30)
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
        close(load_model(str(tmp_path), torch.float32)(ids), expected)
        stored = load_file(tmp_path / "model.safetensors")
        assert any("vision_tower" in key for key in stored)
        old = any(key.startswith("language_model.") for key in stored)
        pairs = [
            ("language_model.model.", "model.language_model."),
            ("language_model.lm_head.", "lm_head."),
        ]
        for one, other in pairs if old else [(b, a) for a, b in pairs]:
            stored = {
                other + key.removeprefix(one) if key.startswith(one) else key: value
                for key, value in stored.items()
            }
        save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
        close(load_model(str(tmp_path), torch.float32)(ids), expected)


def in_mistrals_words(folder, theirs, out):
    """A folder of transformers → one in Mistral's own format, as Mistral published it."""
    said = theirs.config
    params = {"dim": said.hidden_size, "n_layers": said.num_hidden_layers, "head_dim": said.head_dim, "hidden_dim": said.intermediate_size,
              "n_heads": said.num_attention_heads, "n_kv_heads": said.num_key_value_heads, "norm_eps": said.rms_norm_eps,
              "vocab_size": said.vocab_size, "rope_theta": said.rope_parameters["rope_theta"], "max_position_embeddings": 512,
              "tied_embeddings": said.tie_word_embeddings}  # fmt: skip
    if said.sliding_window:
        params["sliding_window"] = said.sliding_window
    if said.rope_parameters["rope_type"] == "yarn":
        known = {
            "original_max_position_embeddings": said.rope_parameters[
                "original_max_position_embeddings"
            ]
        }
        params["yarn"] = {
            **known,
            "factor": said.rope_parameters["factor"],
            "alpha": 1,
            "beta": said.rope_parameters["beta_fast"],
        }
        params["llama_4_scaling"] = {**known, "beta": said.rope_parameters["llama_4_scaling_beta"]}
    names = {"self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
             "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
             "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
             "model.embed_tokens": "tok_embeddings", "lm_head": "output", "model.": ""}  # fmt: skip
    tensors = {
        "vision_encoder.ln_pre.weight": torch.ones(3),
        "patch_merger.merging_layer.weight": torch.ones(3),
    }
    for name, value in load_file(folder / "model.safetensors").items():
        if (
            ".q_proj" in name or ".k_proj" in name
        ):  # HF's first half of a head are the even rows of Mistral's
            heads = value.unflatten(0, (-1, 2, said.head_dim // 2))
            value = torch.stack([heads[:, 0], heads[:, 1]], 2).flatten(0, 2)
        for theirs_, own in names.items():
            name = name.replace(theirs_, own)
        tensors[name] = value.contiguous()
    out.mkdir()
    (out / "params.json").write_text(json.dumps(params))
    save_file(tensors, out / "consolidated.safetensors")
    shutil.copyfile(V1, out / "tokenizer.model.v1")


def rotated_in_pairs(x, theta):
    """Mistral's own rotation: numbers 2i and 2i + 1 of a head are a complex number. x (T, H, D)"""
    angle = torch.arange(len(x))[:, None] * theta ** (
        -torch.arange(0, x.shape[-1], 2) / x.shape[-1]
    )
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)[:, None]).flatten(
        -2
    )


@pytest.mark.parametrize("kind", ["mistral", "ministral3, tied", "ministral3"])
def test_mistrals_own_format_loads_with_equal_logits_and_the_same_fingerprint(kind, tmp_path):
    theirs = random(*FAMILIES[kind])
    theirs.save_pretrained(tmp_path)
    in_mistrals_words(tmp_path, theirs, tmp_path / "own")
    ours = load_model(str(tmp_path / "own"), torch.float32)
    with torch.no_grad():
        close(ours(tokens(2, 40)), theirs(tokens(2, 40)).logits)
    prints = {fingerprint(index_tensors(ours, folder)) for folder in (tmp_path, tmp_path / "own")}
    assert len(prints) == 1
    if kind == "mistral":  # scores of q and k as mistral-inference turns them
        own, x = load_file(tmp_path / "own" / "consolidated.safetensors"), torch.randn(9, 64)
        q, k = (
            (x @ own[f"layers.0.attention.{w}.weight"].T).unflatten(-1, (-1, 32))
            for w in ("wq", "wk")
        )
        q, k = rotated_in_pairs(q, 1e4), rotated_in_pairs(k, 1e4).repeat_interleave(2, 1)
        block = ours.model.layers[0].self_attn
        turn = rope(torch.arange(9)[None], ours.config)
        mine = [
            ApplyRotary.apply(p(x[None]).unflatten(-1, (-1, 32)), *turn)[0]
            for p in (block.q_proj, block.k_proj)
        ]
        close(
            torch.einsum("thd,shd->hts", mine[0], mine[1].repeat_interleave(2, 1)),
            torch.einsum("thd,shd->hts", q, k),
        )


def test_params_json_that_we_do_not_compute_is_refused(tmp_path):
    sizes = {
        "dim": 64,
        "n_layers": 2,
        "head_dim": 16,
        "hidden_dim": 128,
        "n_heads": 4,
        "n_kv_heads": 2,
        "norm_eps": 1e-5,
        "vocab_size": 320,
    }
    for extra, expected in (({"moe": {"num_experts": 8}}, "mixtral"), ({"quantization": {"qformat_weight": "fp8_e4m3"}}, "quantised"),
                            ({"sliding_window": [4, 8]}, "sliding_window")):  # fmt: skip
        (tmp_path / "params.json").write_text(json.dumps(sizes | extra))
        with pytest.raises(UserError, match=expected) as caught:
            hf.read_config(tmp_path)
        assert len(str(caught.value).splitlines()) == 2
    (tmp_path / "params.json").write_text(
        json.dumps(sizes | {"sliding_window": 4096})
    )  # as of v0.1
    assert hf.read_config(tmp_path).rope_theta == 1e4


# --- refused, and what a silent config.json means


SAID = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320}  # fmt: skip


@pytest.mark.parametrize("family", hf.FAMILIES)
def test_what_config_json_leaves_out_is_as_in_transformers(family, tmp_path):
    said = {key: value for key, value in SAID.items() if key != "num_key_value_heads"} | {
        "num_attention_heads": 32,
        "hidden_size": 1024,
    }
    (tmp_path / "config.json").write_text(json.dumps(said | {"model_type": family}))
    ours, theirs = hf.read_config(tmp_path), transformers.AutoConfig.from_pretrained(tmp_path)
    for key in (
        "num_key_value_heads",
        "max_position_embeddings",
        "rms_norm_eps",
        "tie_word_embeddings",
    ):
        assert getattr(ours, key) == getattr(theirs, key), key
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 32)
    assert ours.sliding_window == getattr(theirs, "sliding_window", None)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert (ours.rope_scaling or {"rope_type": "default"})["rope_type"] == theirs.rope_parameters[
        "rope_type"
    ]


def test_keys_that_a_family_does_not_heed_mean_nothing(tmp_path):
    said = SAID | {"sliding_window": 5, "attention_bias": True}
    for family, (window, bias) in {
        "llama": (None, True),
        "mistral": (5, False),
        "qwen2": (None, False),
        "qwen3": (None, True),
    }.items():
        (tmp_path / "config.json").write_text(
            json.dumps(said | {"model_type": family, "head_dim": 16})
        )
        found = hf.read_config(tmp_path)
        assert (found.sliding_window, found.attention_bias) == (window, bias), family


@pytest.mark.parametrize(("changes", "expected"), [
    ({"model_type": "gemma3"}, "model_type 'gemma3'.*\n.*mistral.*llama.*qwen3"),
    ({"model_type": "mixtral"}, "mixtral"),
    ({"model_type": "llama", "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "RoPE of kind 'dynamic'"),
    ({"model_type": "llama", "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor of RoPE is None"),
    ({"model_type": "llama", "rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "low_freq_factor of RoPE must be below"),
    ({"model_type": "qwen2", "rope_scaling": YARN | {"factor": "4"}}, "factor of RoPE is '4'"),
    ({"model_type": "llama", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"model_type": "llama", "rope_parameters": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}}, "partial_rotary"),
    ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1}, "some layers only"),
    ({"model_type": "qwen3", "use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"]}, "some layers only"),
    ({"model_type": "llama", "hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ({"model_type": "qwen3", "quantization_config": {"quant_method": "fp8"}}, "quantised"),
    ({"model_type": "qwen2", "auto_map": {"AutoModel": "code.Model"}}, "auto_map.*never run"),
])  # fmt: skip
def test_what_we_do_not_compute_is_refused_in_two_lines(changes, expected, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SAID | changes))
    with pytest.raises(UserError, match=expected) as caught:
        hf.read_config(tmp_path)
    assert len(str(caught.value).splitlines()) == 2


def test_a_head_that_is_tied_by_config_json_alone_is_refused(tmp_path):
    random("Llama", {}).save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(said | {"tie_word_embeddings": True}))
    with pytest.raises(UserError, match="tied.*\n.*tie_word_embeddings"):
        load_model(str(tmp_path))


def test_a_tied_head_that_is_stored_as_well_is_read(tmp_path):
    theirs = random(*FAMILIES["llama 3.2"])
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with torch.no_grad():
        close(load_model(str(tmp_path), torch.float32)(tokens(1, 9)), theirs(tokens(1, 9)).logits)


def test_an_unknown_family_ends_a_program_in_two_lines(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SAID | {"model_type": "gemma3"}))
    shutil.copyfile(V1, tmp_path / "tokenizer.model")
    refused(command("chat.py", tmp_path, "-p", "hi", "--weights", "fp32"), "gemma3", "qwen3")
