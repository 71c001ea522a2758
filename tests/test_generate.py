"""Decoding: what is cached, compiled or kept in fewer bits says what the plain model says."""

import json
import shutil

import pytest
import torch
from conftest import ROOT, VOCAB, command, refused, save_mistral

import chat
import data
import lora
from cli import UserError
from data import Turn
from inference import generate
from model import Linear, ModelConfig, Transformer
from weights import hf, quantize, shards
from weights.load import load_model, load_weights
from weights.tokenizer import load_tokenizer

needs_a_compiler = pytest.mark.skipif(
    not generate.can_compile(torch.device("cpu")), reason="no C++ compiler here"
)


@pytest.fixture(scope="module")
def adapted(base, tokenizer, tmp_path_factory):
    """An adapter with weight in every part, its new rows too."""
    folder = tmp_path_factory.mktemp("adapted")
    model = Transformer(hf.with_vocab_size(hf.read_config(base), VOCAB + 2))
    load_weights(model, base)
    lora.inject(model, rank=4, rows=tokenizer.added)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in lora.adapter_parameters(model).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    lora.save(model, folder, str(base))
    (folder / "persona.json").write_text(
        json.dumps({"me": "Ann", "contacts": [{"name": "Bob", "messages": 9}]})
    )
    tokenizer.save(folder)
    return folder


def logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids]))[0]


# --- fewer bits


@pytest.mark.parametrize("width", [256, 384, 5632])
def test_int8_and_int4_stay_within_half_a_step_of_the_weight(width):
    weight = torch.randn(40, width, generator=torch.Generator().manual_seed(width))
    codes, scales = quantize.Int8Linear.quantise(weight)
    assert (
        (quantize.Int8Linear.unpack(codes, scales, torch.float32) - weight).abs()
        <= scales[:, None] * 0.5001
    ).all()
    n, stored = quantize.group(width), quantize.Int4Linear.quantise(weight)
    grouped = weight.view(40, n, -1)
    low, high = grouped.aminmax(dim=1)
    error = (quantize.Int4Linear.unpack(*stored, torch.float32) - weight).view_as(grouped)
    plain = (grouped - low[:, None]) / (high - low)[:, None] * 15
    rounded = (plain.round() - plain) * (high - low)[:, None] / 15
    assert (
        error.square().mean() < rounded.square().mean() * 1.02
    )  # no worse than rounding between the ends, in bf16 scales
    assert (
        error.abs() <= (high - low)[:, None] * (0.5 / 15 + 0.1)
    ).all()  # what is cut off a range is a tenth of it at most


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("value", [0.0, 0.5])
def test_equal_weights_stay_what_they_are(kind, value):
    weight = torch.full((4, 256), value)
    packed = quantize.PACKED_TYPES[kind]
    assert torch.allclose(packed.unpack(*packed.quantise(weight), torch.float32), weight)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_one_token_s_product_is_a_product_with_the_unpacked_weight(kind):
    weight, x = torch.randn(48, 96), torch.randn(96)
    packed = quantize.PACKED_TYPES[kind]
    stored = packed.quantise(weight)
    assert torch.allclose(
        packed.product(x, *stored), packed.unpack(*stored, torch.float32) @ x, atol=1e-4
    )


def test_groups_are_sixteen_or_a_multiple_and_what_has_none_is_kept_in_eight_bits():
    assert [quantize.group(n) for n in (4096, 14336, 2048, 5632, 384, 40)] == [
        64,
        64,
        64,
        44,
        24,
        0,
    ]
    model = Transformer(ModelConfig(100, 64, 40, 1, 4, 2, 16))
    quantize.pack_linears(model, "int4")
    block = model.model.layers[0]
    assert (
        type(block.mlp.up_proj) is quantize.Int4Linear
        and type(block.mlp.down_proj) is type(model.lm_head) is quantize.Int8Linear
    )


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_head_that_is_the_embeddings_is_kept_as_they_are(tmp_path, weights):
    folder = save_mistral(tmp_path, tie_word_embeddings=True)
    model = load_model(str(folder), torch.float32, weights=weights)
    plain = load_model(str(folder), torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight and torch.equal(
        model.lm_head.weight, plain.lm_head.weight
    )
    ids = list(range(3, 30))
    assert (logits(model, ids) - logits(plain, ids)).std() < 0.3 * logits(plain, ids).std()


def test_a_weight_that_is_no_number_is_refused_while_it_is_packed(base, tmp_path):
    broken = shutil.copytree(base, tmp_path / "broken")
    from safetensors.torch import load_file, save_file

    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="layers.1.mlp.up_proj.weight holds NaN"):
        load_model(str(broken), weights="int4")


@pytest.mark.parametrize("weights", ["plain", "int8", "int4"])
def test_an_adapter_is_merged_tensor_by_tensor_as_merge_does_it(adapted, tokenizer, weights):
    ids = list(range(3, 40)) + tokenizer.added
    model = lora.merge(load_model(str(adapted), torch.float32, tokenizer=tokenizer))
    if weights != "plain":
        by_name = {f"{name}.weight": m for name, m in model.named_modules() if type(m) is Linear}
        values = {name: m.weight.clone() for name, m in by_name.items()}
        quantize.pack_linears(model, weights)
        for name, module in by_name.items():
            shards.copy_shard(module, values[name])
    streamed = load_model(str(adapted), torch.float32, tokenizer=tokenizer, weights=weights)
    assert torch.allclose(logits(streamed, ids), logits(model, ids), atol=1e-4)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_folder_in_fewer_bits_says_what_was_packed_at_load_and_carries_all(
    adapted, tmp_path, weights
):
    done = command("lora.py", "merge", adapted, tmp_path / "clone", "--weights", weights)
    assert done.returncode == 0, done.stderr
    tokenizer = load_tokenizer(tmp_path / "clone")
    small = load_model(str(tmp_path / "clone"), tokenizer=tokenizer)
    packed = load_model(str(adapted), torch.bfloat16, tokenizer=tokenizer, weights=weights)
    ids = list(range(3, 30))
    assert torch.equal(logits(small, ids), logits(packed, ids))
    size = sum(path.stat().st_size for path in (tmp_path / "clone").glob("*.safetensors"))
    assert size < 1.05 * sum(p.numel() * p.element_size() for p in small.parameters()) + 1e5
    talk = command("chat.py", tmp_path / "clone", "-p", "hi", "--max-tokens", 5, "--seed", 1)
    assert talk.returncode == 0, talk.stderr
    other = "int4" if weights == "int8" else "int8"
    refused(
        command("chat.py", tmp_path / "clone", "-p", "hi", "--weights", other), weights, "--weights"
    )
    refused(
        command("train.py", "--model", tmp_path / "clone", "--data", ROOT, "--out", tmp_path / "x")
    )


def test_a_compiler_that_fails_leaves_the_plain_way(base, tokenizer, monkeypatch):
    model = load_model(str(base), torch.bfloat16, tokenizer=tokenizer, weights="int8")

    def fails(*_):
        raise torch._dynamo.exc.BackendCompilerFailed(fails, RuntimeError("no headers"), None)

    plain = list(
        generate.Decoder(model, tokenizer, 64).generate(list(range(3, 9)), 4, temperature=0)
    )
    monkeypatch.setattr(generate, "CompiledDecoder", fails)
    monkeypatch.setattr(generate, "can_compile", lambda device: True)
    decoder = generate.Decoder(model, tokenizer, 64, compiled=True)
    assert (
        decoder.step is None
        and list(decoder.generate(list(range(3, 9)), 4, temperature=0)) == plain
    )


# --- a step of one token


@needs_a_compiler
@pytest.mark.parametrize("weights", ["plain", "int8", "int4"])
@pytest.mark.parametrize("changes", [{}, {"sliding_window": 8}], ids=["all", "window"])
def test_the_compiled_step_says_what_the_model_says(tmp_path, weights, changes):
    folder = save_mistral(tmp_path, **changes)
    tokenizer = load_tokenizer(folder)
    model = load_model(str(folder), torch.float32, tokenizer=tokenizer, weights=weights)
    decoder = generate.Decoder(model, tokenizer, 64, compiled=True)
    ids = list(range(3, 15))
    for new in (40, 41, 42, 50, 60):
        ids.append(new)
        assert torch.allclose(decoder.forward(ids), logits(model, ids)[-1], atol=2e-4, rtol=1e-3)
    shorter = [*ids[:9], 77]  # an earlier turn said otherwise
    assert torch.allclose(
        decoder.forward(shorter), logits(model, shorter)[-1], atol=2e-4, rtol=1e-3
    )


# --- several answers at once


@pytest.mark.parametrize("temperature", [0, 1.0], ids=["greedy", "sampled"])
@pytest.mark.parametrize("changes", [{}, {"sliding_window": 8}], ids=["all", "window"])
def test_answers_written_in_a_batch_equal_those_written_alone(tmp_path, changes, temperature):
    model = load_model(str(save_mistral(tmp_path, **changes)), torch.float32)
    tokenizer_of = load_tokenizer(tmp_path)
    decoder = generate.Decoder(model, tokenizer_of, 96)
    decoder.ends = set(range(3, VOCAB, 12))  # or a random model never ends
    draw = torch.Generator().manual_seed(1)
    lengths = (3, 40, 11, 1, 24, 80, 7, 96)  # one stops at the context's end, one has no room
    prompts = [torch.randint(300, VOCAB, (n,), generator=draw).tolist() for n in lengths]
    prompts.append(prompts[1] + prompts[2])  # begins as another did
    alone = []
    for seed, ids in enumerate(prompts):
        generator = torch.Generator().manual_seed(seed)
        plain = generate.Decoder(model, tokenizer_of, 96)
        plain.ends = decoder.ends
        alone.append(list(plain.generate(ids, 20, temperature, 0.95, generator)))
    assert len({len(ids) for ids in alone}) > 4  # they end at different times
    for rows in (1, 3, 9):
        seeds = range(len(prompts))
        done = dict(generate.generate_batch(decoder, prompts, 20, temperature, 0.95, seeds, rows))
        assert [done[number] for number in seeds] == alone


@pytest.mark.parametrize("top_p", [0.5, 0.95, 1.0])
@pytest.mark.parametrize("spread", [0.1, 3.0], ids=["flat", "peaked"])
def test_a_draw_that_sorts_what_is_likely_is_that_of_the_whole_distribution(top_p, spread):
    one, other = (torch.Generator().manual_seed(1) for _ in range(2))
    for seed in range(20):
        logits = torch.randn(20000, generator=torch.Generator().manual_seed(seed)) * spread
        likely = generate.sample(logits, 0.7, top_p, one, generate.TOP_K)
        assert likely == generate.sample(logits, 0.7, top_p, other)


def test_a_row_is_done_when_it_ends_and_leaves_its_place_to_the_next(base, tokenizer):
    decoder = generate.Decoder(
        load_model(str(base), torch.float32, tokenizer=tokenizer), tokenizer, 64
    )
    batch = generate.DecodeBatch(decoder, 2)
    short, long = batch.add([5, 6, 7], 1, 0), batch.add([8, 9], 4, 0)
    assert batch.full and batch.step() == [short] and not batch.full and not short.ended
    assert batch.add([300] * 64, 4, 0).ids == [] and not batch.full  # no room: done at once
    third = batch.add([10], 2, 0)
    assert [batch.step(), batch.step(), batch.step()] == [[], [third], [long]]
    assert [len(row.ids) for row in (short, long, third)] == [1, 4, 2] and batch.rows == []


# --- what was said stays read


def test_the_next_turn_reads_only_what_is_new(adapted, tokenizer):
    decoder = generate.Decoder(
        load_model(str(adapted), tokenizer=tokenizer, weights="plain"), tokenizer, 256
    )
    turns = [Turn("Bob", False, "", ["one two three"])]
    for number in range(3):
        answer = generate.Answer(decoder, turns, "Ann", 12, temperature=1.0, seed=number)
        list(answer)
        turns += [Turn("Ann", True, "", answer.messages), Turn("Bob", False, "", [f"and {number}"])]
        begin = generate.truncate_prompt(turns, "Ann", tokenizer, 240, decoder.wrote)
        assert begin[: len(answer.prompt) + len(answer.ids)] == answer.prompt + answer.ids
        lengths = []
        handle = decoder.model.register_forward_pre_hook(
            lambda model, given, lengths=lengths: lengths.append(given[0].shape[1])
        )
        decoder.forward(begin)
        handle.remove()
        new = len(begin) - len(answer.prompt) - len(answer.ids) + 1
        assert sum(lengths) <= new + -new % generate.SAMPLE_ROUND


def test_a_prompt_with_known_ids_is_the_same_text(tokenizer):
    turns = [
        Turn("Bob", False, "", ["hello there"]),
        Turn("Ann", True, "", ["general", "kenobi"]),
        Turn("Bob", False, "", ["hm"]),
    ]
    plain, _ = tokenizer.encode(data.prompt(turns, "Ann", tokenizer.specials))
    header = tokenizer.encode("<|im_start|>Ann\n>>>")[0][1:]
    pieces = [
        i
        for letter in " general\n>>> kenobi"
        for i in tokenizer.encode(f"<|im_start|>{letter}")[0][2:]
    ]
    known = generate.truncate_prompt(
        turns, "Ann", tokenizer, 500, {("Ann", "general", "kenobi"): header + pieces}
    )
    at = plain.index(tokenizer.im_start, plain.index(tokenizer.im_end))
    assert known[:at] == plain[:at] and known[at : at + len(header + pieces)] == header + pieces
    after = plain[plain.index(tokenizer.im_end, at) :]
    assert (
        known[-len(after) :] == after
        and generate.truncate_prompt(turns, "Ann", tokenizer, 500) == plain
    )


def test_a_long_talk_is_cut_seldom_so_that_most_prompts_begin_as_the_last(tokenizer):
    turns, prompts = [], []
    for n in range(120):
        turns.append(Turn(("Bob", "Ann")[n % 2], bool(n % 2), "", [f"message number {n}"]))
        prompts.append(generate.truncate_prompt(turns, "Ann", tokenizer, 200))
    tail = len(tokenizer.encode("<|im_start|>Ann\n>>>")[0]) - 1
    kept = [b[: len(a) - tail] == a[:-tail] for a, b in zip(prompts, prompts[1:])]
    assert all(len(ids) <= 200 for ids in prompts) and 3 <= kept.count(False) <= 20


def test_a_header_stays_when_a_long_talk_loses_its_beginning(tokenizer):
    header = Turn("system", False, "", ["talking to Bob"])
    turns = [header] + [
        Turn(("Bob", "Ann")[n % 2], bool(n % 2), "", [f"message number {n}"]) for n in range(60)
    ]
    text = tokenizer.engine.decode(
        generate.truncate_prompt(turns, "Ann", tokenizer, 200), skip_special_tokens=False
    )
    assert (
        "talking to Bob" in text
        and "message number 59" in text
        and "message number 1\n" not in text
    )
    assert len(generate.truncate_prompt(turns, "Ann", tokenizer, 200)) <= 200
    assert (
        tokenizer.engine.decode(generate.truncate_prompt(turns[:2], "Ann", tokenizer, 16)).count(
            "talking"
        )
        == 0
    )  # it would leave no room


def test_an_answer_left_early_leaves_the_decoder_ready(adapted, tokenizer):
    decoder = generate.Decoder(
        load_model(str(adapted), tokenizer=tokenizer, weights="plain"), tokenizer, 128
    )
    turns = [Turn("Bob", False, "", ["hi"])]
    whole = generate.Answer(decoder, turns, "Ann", 20, temperature=0)
    list(whole)
    left = iter(generate.Answer(decoder, turns, "Ann", 20, temperature=1.0, seed=1))
    next(left)
    left.close()
    again = generate.Answer(decoder, turns, "Ann", 20, temperature=0)
    list(again)
    assert again.ids == whole.ids and again.messages == whole.messages


def test_ctrl_c_while_it_reads_leaves_nothing_half_read(adapted, tokenizer, monkeypatch):
    """What was being read has overwritten some layers' keys and values of what was read before."""
    decoder = generate.Decoder(
        load_model(str(adapted), tokenizer=tokenizer, weights="plain"), tokenizer, 64
    )
    ids = list(range(3, 20))
    decoder.forward(ids)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(decoder.model.model.layers[1], "compute", interrupted)
        with pytest.raises(KeyboardInterrupt):
            decoder.forward([*ids[:5], *range(100, 115)])
    assert torch.allclose(
        decoder.forward([*ids, 50]), logits(decoder.model, [*ids, 50])[-1], atol=1e-4
    )


# --- the terminal's commands


def test_what_is_taken_back_is_taken_out_of_the_file(tmp_path):
    talk = chat.Conversation("Ann", "Bob", None, tmp_path / "talk.jsonl")
    for said in ("hello", "what nobody should read"):
        talk.turns += [
            Turn("Bob", False, "2024-05-01T10:00:00", [said]),
            Turn("Ann", True, "2024-05-01T10:01:00", ["so"]),
        ]
    talk.keep()
    talk.obey("undo")
    (left,) = data.load_sessions(talk.history)
    assert [turn.messages for turn in left.turns] == [["hello"], ["so"]]
    talk.obey("undo")
    assert talk.history.read_text() == ""


def test_commands_take_back_repeat_and_rename(adapted, tmp_path):
    history = tmp_path / "talk.jsonl"
    lines = "hello\n/as Eve\nhow are you\n/retry\n/undo\n/temp 0\n/temp hot\n/nonsense\nbye\n"
    done = command(
        "chat.py", adapted, "--seed", 1, "--max-tokens", 8, "--history", history, stdin=lines
    )
    assert done.returncode == 0, done.stderr
    (talk,) = data.load_sessions(history)
    assert [(t.author, t.messages) for t in talk.turns if not t.me] == [
        ("Bob", ["hello"]),
        ("Eve", ["bye"]),
    ]
    assert (
        all(t.author == "Ann" for t in talk.turns if t.me)
        and "/undo" in done.stdout
        and "taken back" in done.stdout
    )
    assert oct(history.stat().st_mode & 0o77) == "0o0"
    again = command(
        "chat.py",
        adapted,
        "--seed",
        1,
        "--max-tokens",
        8,
        "--history",
        history,
        stdin="once more\n/reset\n",
    )
    assert again.returncode == 0 and history.read_text() == ""
