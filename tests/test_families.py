"""Every supported family against transformers' own classes: small random folders, in float32."""

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
from model import KVCache, Transformer, rope
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
    pad_token_id=None,  # in transformers a pad token's row has no gradient
)
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
    "original_max_position_embeddings": 16,
}
FAMILIES = {
    "mistral": ("Mistral", dict(sliding_window=7, head_dim=32)),
    "mistral, yarn": ("Mistral", dict(sliding_window=None, rope_parameters=YARN)),
    "ministral3": ("Ministral3", dict(head_dim=32, rope_parameters=YARN | SCALED)),
    "ministral3, tied": (
        "Ministral3",
        dict(head_dim=16, rope_parameters=YARN | SCALED, tie_word_embeddings=True),
    ),
    "ministral3, default rope": ("Ministral3", dict(head_dim=16)),
    "yarn, mscale": (
        "Llama",
        dict(rope_parameters=YARN | {"mscale": 2.0, "mscale_all_dim": 0.5, "truncate": False}),
    ),
    "yarn, attention_factor": (
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


def random_model(family):
    """transformers' model of one of FAMILIES, all its parameters random."""
    torch.manual_seed(0)
    name, changes = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**SIZES | changes)
    theirs = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.dim() == 1:
                parameter += torch.randn_like(parameter) * 0.2
    return theirs


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    """(folder, transformers' model, ours) of one family."""
    folder, theirs = tmp_path_factory.mktemp("family"), random_model(request.param)
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
        for document, alone in zip(packed.split(lengths, 1), ids.split(lengths, 1)):
            close(document, theirs(alone).logits)
        cache = KVCache(ours.config, 40, batch=2)
        cached = [ours(part, cache=cache) for part in ids.split([11, 1, 1, 6, 21], 1)]
        close(torch.cat(cached, 1), full)


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


def test_saved_folder_loads_here_and_in_transformers(pair, tmp_path, tokenizer):
    _, theirs, ours = pair
    save_model(ours, tmp_path, tokenizer, torch.float32)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(again) is type(theirs)
    with torch.no_grad():
        close(again(tokens(1, 30)).logits, theirs(tokens(1, 30)).logits)
        close(load_model(str(tmp_path))(tokens(1, 30)), theirs(tokens(1, 30)).logits)
    assert hf.read_config(tmp_path) == ours.config


def test_new_vocabulary_rows_are_the_mean_of_the_old(pair):
    folder, theirs, _ = pair
    config = hf.with_vocab_size(hf.read_config(folder), 323)
    ours = Transformer(config)
    load_weights(ours, folder)
    embedding, head = ours.model.embed_tokens.weight, ours.lm_head.weight
    old_weights = theirs.get_input_embeddings().weight, theirs.lm_head.weight
    for weight, old in zip((embedding, head), old_weights, strict=True):
        assert weight.shape == (323, 64) and torch.equal(weight[:320], old)
        torch.testing.assert_close(weight[320:], old.mean(0).expand(3, -1))
    assert (head is embedding) == config.tie_word_embeddings


def test_adapters_go_to_peft_and_come_from_it(pair, tmp_path):
    folder, _, _ = pair
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
        again = load_model(str(tmp_path / "peft"), torch.float32, base=str(folder))
        close(again(tokens(2, 21)), expected)
        close(lora.merge(ours)(tokens(2, 21)), expected)


# --- other folders


@pytest.mark.parametrize("kind", ["ministral3, tied", "ministral3", "mistral"])
def test_language_model_of_a_vision_model_is_loaded_alone(kind, tmp_path):
    """Ministral 3 and Small: with transformers 5's prefix before its tensors, or the older one."""
    name, changes = FAMILIES[kind]
    text = getattr(transformers, f"{name}Config")(**SIZES | changes)
    vision = transformers.PixtralVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
    )
    config = transformers.Mistral3Config(
        text_config=text, vision_config=vision, tie_word_embeddings=text.tie_word_embeddings
    )
    torch.manual_seed(0)
    theirs = transformers.Mistral3ForConditionalGeneration(config).eval()
    theirs.save_pretrained(tmp_path)
    ids = tokens(1, 30)
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
        close(load_model(str(tmp_path), torch.float32)(ids), expected)
        stored = load_file(tmp_path / "model.safetensors")
        assert any("vision_tower" in key for key in stored)
        old = any(key.startswith("language_model.") for key in stored)
        prefixes = [
            ("language_model.model.", "model.language_model."),
            ("language_model.lm_head.", "lm_head."),
        ]
        renamed = dict(stored)
        for one, other in prefixes:
            source, target = (one, other) if old else (other, one)
            for key in stored:
                if key.startswith(source):
                    renamed[target + key.removeprefix(source)] = renamed.pop(key)
        assert renamed.keys() != stored.keys()
        save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
        close(load_model(str(tmp_path), torch.float32)(ids), expected)


MISTRAL_NAMES = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "tok_embeddings",
    "lm_head": "output",
    "model.": "",
}


def save_in_mistrals_format(folder, theirs, out):
    """Write a transformers folder in Mistral's own format, as Mistral publishes it."""
    config, rope_parameters = theirs.config, theirs.config.rope_parameters
    params = {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "head_dim": config.head_dim,
        "hidden_dim": config.intermediate_size,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "norm_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
        "rope_theta": rope_parameters["rope_theta"],
        "max_position_embeddings": 512,
        "tied_embeddings": config.tie_word_embeddings,
    }
    if config.sliding_window:
        params["sliding_window"] = config.sliding_window
    if rope_parameters["rope_type"] == "yarn":
        key = "original_max_position_embeddings"
        context = {key: rope_parameters[key]}
        beta, factor = rope_parameters["beta_fast"], rope_parameters["factor"]
        params["yarn"] = {**context, "factor": factor, "alpha": 1, "beta": beta}
        beta = rope_parameters["llama_4_scaling_beta"]
        params["llama_4_scaling"] = {**context, "beta": beta}
    tensors = {
        "vision_encoder.ln_pre.weight": torch.ones(3),
        "patch_merger.merging_layer.weight": torch.ones(3),
    }
    for name, value in load_file(folder / "model.safetensors").items():
        if ".q_proj" in name or ".k_proj" in name:
            # HF's first half of a head are the even rows of Mistral's.
            heads = value.unflatten(0, (-1, 2, config.head_dim // 2))
            value = torch.stack([heads[:, 0], heads[:, 1]], 2).flatten(0, 2)
        for hf_name, mistral_name in MISTRAL_NAMES.items():
            name = name.replace(hf_name, mistral_name)
        tensors[name] = value.contiguous()
    out.mkdir()
    (out / "params.json").write_text(json.dumps(params))
    save_file(tensors, out / "consolidated.safetensors")
    shutil.copyfile(V1, out / "tokenizer.model.v1")


def rotate_pairs(x, theta):
    """Rotate x (T, H, D) as Mistral: numbers 2i and 2i + 1 of a head are a complex number."""
    D = x.shape[-1]
    angle = torch.arange(len(x))[:, None] * theta ** (-torch.arange(0, D, 2) / D)
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    rotated = pairs * torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.view_as_real(rotated).flatten(-2)


@pytest.mark.parametrize("kind", ["mistral", "ministral3, tied", "ministral3"])
def test_mistrals_own_format_loads_with_equal_logits_and_fingerprint(kind, tmp_path):
    theirs = random_model(kind)
    theirs.save_pretrained(tmp_path)
    save_in_mistrals_format(tmp_path, theirs, tmp_path / "own")
    ours = load_model(str(tmp_path / "own"), torch.float32)
    with torch.no_grad():
        close(ours(tokens(2, 40)), theirs(tokens(2, 40)).logits)
    folders = tmp_path, tmp_path / "own"
    assert len({fingerprint(index_tensors(ours, folder)) for folder in folders}) == 1
    if kind == "mistral":  # scores of q and k as mistral-inference rotates them
        own, x = load_file(tmp_path / "own" / "consolidated.safetensors"), torch.randn(9, 64)
        weights = (own[f"layers.0.attention.{name}.weight"] for name in ("wq", "wk"))
        q, k = ((x @ weight.T).unflatten(-1, (-1, 32)) for weight in weights)
        q, k = rotate_pairs(q, 1e4), rotate_pairs(k, 1e4).repeat_interleave(2, 1)
        rotation = rope(torch.arange(9)[None], ours.config)
        our_q, our_k, _ = ours.model.layers[0].self_attn.qkv(x[None], rotation)
        our_k = our_k.repeat_interleave(2, 2)
        scores = torch.einsum("bthd,bshd->hts", our_q, our_k)
        close(scores, torch.einsum("thd,shd->hts", q, k))


def test_unsupported_params_json_is_refused(tmp_path):
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
    for extra, expected in (
        ({"moe": {"num_experts": 8}}, "mixtral"),
        ({"quantization": {"qformat_weight": "fp8_e4m3"}}, "quanti[sz]ed"),
        ({"sliding_window": [4, 8]}, "sliding_window"),
    ):
        (tmp_path / "params.json").write_text(json.dumps(sizes | extra))
        with pytest.raises(UserError, match=expected) as caught:
            hf.read_config(tmp_path)
        assert len(str(caught.value).splitlines()) == 2
    # As v0.1's.
    (tmp_path / "params.json").write_text(json.dumps(sizes | {"sliding_window": 4096}))
    assert hf.read_config(tmp_path).rope_theta == 1e4


# --- config.json: defaults, and what is refused


CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
}


@pytest.mark.parametrize("family", hf.FAMILIES)
def test_missing_keys_of_config_json_mean_the_same_as_in_transformers(family, tmp_path):
    raw_config = CONFIG | {"num_attention_heads": 32, "hidden_size": 1024, "model_type": family}
    del raw_config["num_key_value_heads"]
    (tmp_path / "config.json").write_text(json.dumps(raw_config))
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
    rope_type = (ours.rope_scaling or {"rope_type": "default"})["rope_type"]
    assert rope_type == theirs.rope_parameters["rope_type"]


def test_keys_that_a_family_ignores_mean_nothing(tmp_path):
    raw_config = CONFIG | {"sliding_window": 5, "attention_bias": True, "head_dim": 16}
    for family, (window, bias) in {
        "llama": (None, True),
        "mistral": (5, False),
        "qwen2": (None, False),
        "qwen3": (None, True),
    }.items():
        (tmp_path / "config.json").write_text(json.dumps(raw_config | {"model_type": family}))
        config = hf.read_config(tmp_path)
        assert (config.sliding_window, config.attention_bias) == (window, bias), family


DYNAMIC = {"type": "dynamic", "factor": 2.0}
NO_LOW_FREQUENCY = {"rope_type": "llama3", "factor": 8.0}
SWAPPED = LLAMA3 | {"high_freq_factor": 1.0}
PARTIAL = {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}
SLIDING = {"use_sliding_window": True}
MIXED_LAYERS = {"layer_types": ["sliding_attention", "full_attention"]}
UNSUPPORTED = [
    ({"model_type": "gemma3"}, "model_type 'gemma3'.*\n.*mistral.*llama.*qwen3"),
    ({"model_type": "mixtral"}, "mixtral"),
    ({"model_type": "llama", "rope_scaling": DYNAMIC}, "RoPE of .* 'dynamic'"),
    ({"model_type": "llama", "rope_scaling": NO_LOW_FREQUENCY}, "low_freq_factor of RoPE is None"),
    ({"model_type": "llama", "rope_scaling": SWAPPED}, "low_freq_factor of RoPE must be below"),
    ({"model_type": "qwen2", "rope_scaling": YARN | {"factor": "4"}}, "factor of RoPE is '4'"),
    ({"model_type": "llama", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"model_type": "llama", "rope_parameters": PARTIAL}, "partial_rotary"),
    ({"model_type": "qwen2", "max_window_layers": 1} | SLIDING, "some layers only"),
    ({"model_type": "qwen3"} | SLIDING | MIXED_LAYERS, "some layers only"),
    ({"model_type": "llama", "hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ({"model_type": "qwen3", "quantization_config": {"quant_method": "fp8"}}, "quanti[sz]ed"),
    ({"model_type": "qwen2", "auto_map": {"AutoModel": "code.Model"}}, "auto_map.*never run"),
]


@pytest.mark.parametrize(("changes", "expected"), UNSUPPORTED)
def test_unsupported_config_is_refused_in_two_lines(changes, expected, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | changes))
    with pytest.raises(UserError, match=expected) as caught:
        hf.read_config(tmp_path)
    assert len(str(caught.value).splitlines()) == 2


def test_head_tied_only_by_config_json_is_refused(tmp_path):
    random_model("llama 2").save_pretrained(tmp_path)
    raw_config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw_config | {"tie_word_embeddings": True}))
    with pytest.raises(UserError, match="tied.*\n.*tie_word_embeddings"):
        load_model(str(tmp_path))


def test_tied_head_that_is_stored_too_loads(tmp_path):
    theirs = random_model("llama 3.2")
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with torch.no_grad():
        close(load_model(str(tmp_path), torch.float32)(tokens(1, 9)), theirs(tokens(1, 9)).logits)


def test_unknown_family_ends_a_program_in_two_lines(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"model_type": "gemma3"}))
    shutil.copyfile(V1, tmp_path / "tokenizer.model")
    refused(command("chat.py", tmp_path, "-p", "hi", "--weights", "fp32"), "gemma3", "qwen3")
