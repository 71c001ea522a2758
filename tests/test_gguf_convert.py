"""GGUF in, against what transformers and sentencepiece make of the same file and model."""

import json
import math
import os
import random
import struct
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, VOCAB, vocabulary
from tokenizers import Tokenizer as Engine
from tokenizers import models, pre_tokenizers, trainers

import chat
from cli import UserError
from model import ModelConfig, rope_inv_freq
from weights import gguf_convert, hub
from weights.load import load_model
from weights.tokenizer import PROBE_TEXT, load_tokenizer

gguf = pytest.importorskip("gguf", reason="pip install -r requirements-extra.txt")
MUTANTS = int(os.environ.get("MUTANTS", 150))
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
)
SIZES |= dict(num_key_value_heads=2, head_dim=64, max_position_embeddings=512)
SIZES["initializer_range"] = 0.1
TEXTS = (
    "Hello there, how's it going? I'LL go; they've gone.\n\n  two  spaces\tand a tab \n",
    "Привет, как дела? Всё хорошо… и\u0306 ½ ² 漢字",
    "def f(x):\n    return x**2  # 12345 in 2024\r\n",
    "\U0001f986\U0001f986 duck \U0001f469\u200d\U0001f469\u200d\U0001f467 naïve Ａ //n",
    "<|im_start|>Bob\n>>> hi there<|im_end|>\n<|im_start|>Ann\n>>>",
)


def hf_model(family, **changes):
    import transformers

    name = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
    torch.manual_seed(0)
    settings = getattr(transformers, f"{name}Config")(**SIZES | {"sliding_window": None} | changes)
    model = getattr(transformers, f"{name}ForCausalLM")(settings).eval()
    for tensor_name, parameter in model.named_parameters():
        if parameter.dim() == 1:  # biases are zeros and norms are ones otherwise
            torch.nn.init.normal_(parameter, float("norm" in tensor_name), 0.2)
    return model


def blocks(shape, kind):
    """Random blocks of a kind that gguf can't quantize, with scales that give sane numbers."""
    rng = np.random.default_rng(0)
    _, size = gguf.GGML_QUANT_SIZES[kind]
    data = rng.integers(0, 256, (math.prod(shape) // 256, size), dtype=np.uint8)
    scale = np.array([2e-4 if kind.name == "Q4_K" else 2e-5] * 2, np.float16).view(np.uint8)
    if kind.name == "Q4_K":
        data[:, :4] = scale
    else:
        data[:, -2:] = scale[:2]
    return data.reshape(shape[0], -1)


def sentencepiece_tokens(writer):
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_proto=vocabulary())
    types = [1] * VOCAB
    for i in range(VOCAB):
        for kind, test in ((2, model.is_unknown), (3, model.is_control), (6, model.is_byte)):
            types[i] = kind if test(i) else types[i]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([model.id_to_piece(i) for i in range(VOCAB)])
    writer.add_token_scores([model.get_score(i) for i in range(VOCAB)])
    writer.add_token_types(types)
    for name, i in (("bos", 1), ("eos", 2), ("unk", 0)):
        getattr(writer, f"add_{name}_token_id")(i)


def byte_level_tokens(pre, extra=()):
    """Merges that cross words and digits, so that what cuts before them decides."""
    engine = Engine(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    text = [*(ROOT / "examples" / "pellhaven.txt").read_text().splitlines()[:300], *TEXTS[:4] * 3]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    count = VOCAB - len(extra)
    options = dict(initial_alphabet=alphabet, special_tokens=special, show_progress=False)
    trainer = trainers.BpeTrainer(vocab_size=count, **options)
    engine.train_from_iterator(text, trainer)
    bpe = json.loads(engine.to_str())["model"]
    tokens = [*sorted(bpe["vocab"], key=bpe["vocab"].get), *extra]
    assert len(tokens) == VOCAB
    types = [3] * 3 + [1] * (count - 3) + [4] * len(extra)
    return bpe_tokens(pre, tokens, types, [" ".join(pair) for pair in bpe["merges"]])


def bpe_tokens(pre, tokens, types, merges):
    """A vocabulary in which <|im_start|> and <|im_end|> are the ids 1 and 2."""

    def write(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_token_merges(merges)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_add_bos_token(False)

    return write


def write_gguf(path, model, kind="F32", tokens=sentencepiece_tokens, add_extra=lambda writer: None):
    """As llama.cpp's converter does: its names, q and k in its rotary order, vectors in F32."""
    config, family = model.config, model.config.model_type.replace("mistral", "llama")
    writer = gguf.GGUFWriter(path, family)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if family == "qwen3":
        writer.add_key_length(config.head_dim)
    if family == "llama":
        writer.add_rope_dimension_count(config.head_dim)
    tokens(writer)
    add_extra(writer)
    arch = next(arch for arch, spelling in gguf.MODEL_ARCH_NAMES.items() if spelling == family)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    kind = gguf.GGMLQuantizationType[kind]
    for hf, tensor in model.state_dict().items():
        if hf == "lm_head.weight" and config.tie_word_embeddings:
            continue
        value, (stem, _, ending) = tensor.numpy(), hf.rpartition(".")
        if family == "llama" and ("q_proj" in hf or "k_proj" in hf):
            heads = config.num_attention_heads if "q_proj" in hf else config.num_key_value_heads
            halves = value.reshape(heads, 2, -1, *value.shape[1:])
            value = halves.swapaxes(1, 2).reshape(value.shape)
        theirs = f"{names.get_name(stem)}.{ending}"
        if value.ndim == 1:
            writer.add_tensor(theirs, np.ascontiguousarray(value))
        elif kind.name in ("Q4_K", "Q6_K"):
            writer.add_tensor(theirs, blocks(value.shape, kind), raw_dtype=kind)
        else:
            data = gguf.quantize(np.ascontiguousarray(value), kind)
            writer.add_tensor(theirs, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def theirs(path):
    import transformers

    make = transformers.AutoModelForCausalLM.from_pretrained
    return make(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


def their_tokenizer(path):
    import transformers

    return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def converted(path, dtype=torch.float32):
    folder = path.parent / "folder"
    gguf_convert.convert(path, folder, dtype)
    return folder


@torch.no_grad()
def assert_same(folder, *models, seed=1):
    ids = torch.randint(3, VOCAB, (2, 300), generator=torch.Generator().manual_seed(seed))
    logits = load_model(folder)(ids)
    assert logits.std() > 0.1
    for model in models:
        torch.testing.assert_close(logits, model(ids).logits, atol=2e-4, rtol=1e-4)


FAMILIES = [("llama", True), ("mistral", False), ("qwen2", True), ("qwen3", False)]


@pytest.mark.parametrize("family, tied", FAMILIES)
def test_logits_equal_transformers_and_the_original(family, tied, tmp_path):
    wide = {"head_dim": 128} if family == "qwen3" else {}  # transformers takes this for all Qwen3s
    model = hf_model(family, tie_word_embeddings=tied, rms_norm_eps=1e-5, **wide)
    path = write_gguf(tmp_path / "tiny.gguf", model)
    assert_same(converted(path), model, theirs(path))


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K"])
def test_weights_of_each_type_equal_transformers(kind, tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", hf_model("llama"), kind)
    folder, reference = converted(path), theirs(path)
    ours = load_model(folder).state_dict()
    for name, value in reference.state_dict().items():
        assert torch.equal(ours[name], value), name
    assert_same(folder, reference)


def test_head_dim_is_free(tmp_path):
    model = hf_model("qwen3", head_dim=32)
    assert_same(converted(write_gguf(tmp_path / "tiny.gguf", model)), model)


def test_llama_biases_are_read(tmp_path):
    model = hf_model("llama", attention_bias=True, mlp_bias=True)
    assert_same(converted(write_gguf(tmp_path / "tiny.gguf", model)), model)


def test_default_dtype_rounds_once_to_bf16(tmp_path):
    model = hf_model("llama")
    folder = converted(write_gguf(tmp_path / "tiny.gguf", model), torch.bfloat16)
    ours = load_model(folder).state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(ours[name], value.bfloat16()), name


def llama3(writer):

    config = ModelConfig(VOCAB, 256, 512, 2, 4, 2, 64, rope_theta=5e5)
    plain, _ = rope_inv_freq(config, "cpu")
    turns = 8192 * plain / (2 * math.pi)
    smooth = ((turns - 1) / 3).clamp(0, 1)  # as in llama.cpp's converter: 1 to 4 turns in 8192
    writer.add_tensor("rope_freqs.weight", (1 / ((1 - smooth) / 32 + smooth)).numpy())


def yarn(writer):
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_orig_ctx_len(128)


def linear(writer):
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(2.0)


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
LLAMA3 |= {"original_max_position_embeddings": 8192}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}


@pytest.mark.parametrize("add_extra, rope", [(llama3, LLAMA3), (yarn, YARN), (linear, LINEAR)])
def test_rope_scaling_equals_the_original(add_extra, rope, tmp_path):
    family = "qwen2" if rope is YARN else "llama"
    model = hf_model(family, rope_parameters=rope, max_position_embeddings=131072)
    assert_same(converted(write_gguf(tmp_path / "tiny.gguf", model, add_extra=add_extra)), model)


def test_unsupported_rope_is_refused(tmp_path):
    def other(writer):
        writer.add_tensor("rope_freqs.weight", np.linspace(1, 8, 32, dtype=np.float32))

    def scaled(writer):
        yarn(writer)
        writer.add_rope_scaling_attn_factors(0.5)

    cases = (other, "rope_freqs.weight is not that of Llama 3"), (scaled, "YaRN with attn_factor")
    for add_extra, message in cases:
        path = write_gguf(tmp_path / "tiny.gguf", hf_model("llama"), add_extra=add_extra)
        with pytest.raises(UserError, match=message):
            converted(path)


# --- tokenizers


def test_sentencepiece_ids_equal_the_original_with_bos(tmp_path, tokenizer):
    import transformers

    path = write_gguf(tmp_path / "tiny.gguf", hf_model("llama"))
    folder = converted(path)
    ours, reference, reloaded = (
        load_tokenizer(folder),
        their_tokenizer(path),
        transformers.AutoTokenizer.from_pretrained(folder),
    )
    assert ours.bos == 1
    for text in (*TEXTS[:4], PROBE_TEXT):
        assert ours.encode(text) == tokenizer.encode(text)
        assert reloaded(text).input_ids == ours.encode(text)[0]
        if "  " not in text:  # transformers cuts before a space that isn't alone
            assert ours.encode(text)[0] == reference(text).input_ids
        assert ours.decode(ours.encode(text)[0]) == text


@pytest.mark.parametrize("pre", gguf_convert.PRE_TOKENIZERS)
def test_byte_level_ids_equal_transformers(pre, tmp_path):
    import transformers

    tokens = byte_level_tokens(pre, ("<think>",))
    path = write_gguf(tmp_path / "tiny.gguf", hf_model("llama"), tokens=tokens)
    folder = converted(path)
    ours = load_tokenizer(folder)
    reference = their_tokenizer(path)
    if pre == "smollm":  # transformers cuts as GPT-2; the base's own tokenizer.json says this
        cut = [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
        reference.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cut)
    reloaded = transformers.AutoTokenizer.from_pretrained(folder)
    for text in (*TEXTS, "<think>well</think>"):
        ids = reference(text, add_special_tokens=False).input_ids
        if pre in ("qwen2", "deepseek-r1-qwen"):  # the base composes letters and accents first
            import unicodedata

            ids = reference(unicodedata.normalize("NFC", text), add_special_tokens=False).input_ids
        assert ours.encode(text)[0] == ids, (
            text,
            [ours.engine.id_to_token(i) for i in ours.encode(text)[0]],
        )
        assert reloaded(text).input_ids == ids
    assert (ours.im_start, ours.im_end, ours.bos, ours.added) == (1, 2, None, [])
    assert not ours.engine.get_added_tokens_decoder()[VOCAB - 1].special


def test_pre_tokenizers_give_different_ids(tmp_path):
    """Else the test above could not fail."""
    seen = set()
    for pre in ("smollm", "qwen2", "llama-bpe", "tekken"):
        (tmp_path / pre).mkdir()
        tokens = byte_level_tokens(pre)
        path = write_gguf(tmp_path / pre / "tiny.gguf", hf_model("llama"), tokens=tokens)
        seen.add(str([load_tokenizer(converted(path)).encode(text)[0] for text in TEXTS]))
    assert len(seen) == 4


def test_bos_default_is_llama_cpps(tmp_path):
    for pre, bos in (("smollm", None), ("tekken", 1)):
        tokens = byte_level_tokens(pre)

        def silent(writer, tokens=tokens):
            tokens(writer)
            del writer.kv_data[0]["tokenizer.ggml.add_bos_token"]

        (tmp_path / pre).mkdir()
        path = write_gguf(tmp_path / pre / "tiny.gguf", hf_model("llama"), tokens=silent)
        assert load_tokenizer(converted(path)).bos == bos


def test_unknown_pre_tokenizer_is_named(tmp_path):
    tokens = byte_level_tokens("poro-chat")
    path = write_gguf(tmp_path / "tiny.gguf", hf_model("llama"), tokens=tokens)
    with pytest.raises(UserError, match="pre-tokenizer 'poro-chat' is not supported"):
        converted(path)
    assert [*tmp_path.iterdir()] == [path]


# --- what can't be read


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    model = hf_model(
        "llama",
        hidden_size=64,
        intermediate_size=64,
        num_attention_heads=1,
        num_key_value_heads=1,
        num_hidden_layers=1,
    )
    return write_gguf(tmp_path_factory.mktemp("small") / "small.gguf", model, "Q8_0").read_bytes()


def test_unknown_architecture_and_missing_parts_are_refused(tmp_path, small):
    for old, new, message in (
        (
            b"\x05\0\0\0\0\0\0\0llama",
            b"\x05\0\0\0\0\0\0\0gemma",
            "architecture 'gemma' is not supported",
        ),
        (b"llama.block_count", b"llama.block_thing", "llama.block_count is missing"),
        (
            b"blk.0.attn_v.weight",
            b"blk.0.attn_w.weight",
            "tensor model.layers.0.self_attn.v_proj.weight is missing",
        ),
    ):
        path = tmp_path / "model.gguf"
        path.write_bytes(small.replace(old, new, 1))
        with pytest.raises(UserError, match=message) as refused:
            gguf_convert.convert(path, tmp_path / "folder")
        assert str(path) in str(refused.value).splitlines()[0] and ".new" not in str(refused.value)
        assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("at", [8, 16, 24])  # tensors, keys, the first key's length
@pytest.mark.parametrize("count", [1 << 32, 1 << 62, (1 << 64) - 1])
def test_huge_counts_take_no_memory(at, count, tmp_path, small):
    import tracemalloc

    path = tmp_path / "model.gguf"
    path.write_bytes(small[:at] + count.to_bytes(8, "little") + small[at + 8 :])
    tracemalloc.start()
    with pytest.raises(UserError, match="can't be read"):
        gguf_convert.convert(path, tmp_path / "folder")
    assert tracemalloc.get_traced_memory()[1] < 20 << 20
    tracemalloc.stop()


def test_truncated_or_other_files_are_named(tmp_path, small):
    path = tmp_path / "model.gguf"
    for content, message in (
        (b"", "it is empty"),
        (b"<!DOCTYPE html><title>404</title>", "it is a web page"),
        (b"PK\3\4" + bytes(99), "it is a pickle"),
        (small[:20], "can't be read"),
        (small[:5000], "it ends within its header"),
        (small[:-1000], "it is cut off: tensor"),
        (
            small[:8] + struct.pack("<QQQcIIQ", 0, 1, 1, b"x", 9, 0, 5 << 20) + bytes(6 << 20),
            "counts",
        ),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            gguf_convert.convert(path, tmp_path / "folder")
        assert [*tmp_path.iterdir()] == [path]


def test_damaged_files_are_refused_or_load(tmp_path, small):
    rng, loaded = random.Random(0), 0
    end = small.rfind(b"output_norm.weight") + 100  # of the header
    path, folder = tmp_path / "model.gguf", tmp_path / "folder"
    for _ in range(MUTANTS):
        content = bytearray(small)
        for _ in range(rng.choice((1, 1, 3))):
            at = rng.randrange(4, end if rng.random() < 0.9 else len(content))
            if rng.random() < 0.1:  # where the long lists are not
                at = rng.randrange(4, 800)
            width = rng.choice((1, 4, 8))
            noise = rng.randbytes(width)
            content[at : at + width] = rng.choice((noise, b"\xff" * width, bytes(width)))
        if rng.random() < 0.2:
            del content[rng.randrange(len(content)) :]
        path.write_bytes(content)
        try:
            gguf_convert.convert(path, folder)
            load_model(folder)
            load_tokenizer(folder)
            loaded += 1
        except UserError as error:
            assert len(str(error).splitlines()) == 2, error
        assert not (tmp_path / "folder.new").exists()
        assert set(tmp_path.iterdir()) <= {path, folder}
        for file in folder.iterdir() if folder.exists() else ():
            file.unlink()
    print(f"{MUTANTS} damaged files, {loaded} of them load")
    assert loaded < MUTANTS


def test_model_as_gguf_names_the_command(tmp_path, small, monkeypatch, capsys):
    path, folder = tmp_path / "model.gguf", tmp_path / "folder"
    path.write_bytes(small)
    with pytest.raises(
        UserError, match=rf"python -m weights.gguf_convert {path} {tmp_path / 'model'}"
    ):
        hub.resolve(str(path))
    with pytest.raises(UserError, match="is a GGUF file, a folder is needed"):
        chat.validate(chat.Options(ckpt=str(path)))
    monkeypatch.setattr(sys, "argv", ["gguf_convert.py", str(path), str(folder)])
    gguf_convert.main()
    assert capsys.readouterr().out == f"{folder} is ready: --model {folder}\n"
    with pytest.raises(UserError, match="already holds something"):
        gguf_convert.main()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="gguf is not installed"):
        gguf_convert.convert(path, tmp_path / "other")


def test_full_disk_is_found_before_writing(tmp_path, small, monkeypatch):
    import shutil

    path = tmp_path / "model.gguf"
    path.write_bytes(small)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(gguf_convert.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="GB are free"):
        gguf_convert.convert(path, tmp_path / "folder")
    assert [*tmp_path.iterdir()] == [path]
