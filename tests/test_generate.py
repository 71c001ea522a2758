"""Decoding: cached, compiled, batched and quantized, the model says what the plain model says."""

import functools
import itertools
import json
import shutil

import hypothesis
import hypothesis.strategies as st
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


# --- quantized weights


@pytest.mark.parametrize("width", [256, 384, 5632])
def test_int8_and_int4_are_within_half_a_step_of_the_weight(width):
    weight = torch.randn(40, width, generator=torch.Generator().manual_seed(width))
    codes, scales = quantize.Int8Linear.quantize(weight)
    assert (
        (quantize.Int8Linear.unpack(codes, scales, torch.float32) - weight).abs()
        <= scales[:, None] * 0.5001
    ).all()
    n, stored = quantize.group_size(width), quantize.Int4Linear.quantize(weight)
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
def test_quantization_keeps_constant_weights(kind, value):
    weight = torch.full((4, 256), value)
    packed = quantize.PACKED_TYPES[kind]
    assert torch.allclose(packed.unpack(*packed.quantize(weight), torch.float32), weight)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_product_equals_matmul_with_the_unpacked_weight(kind):
    weight, x = torch.randn(48, 96), torch.randn(96)
    packed = quantize.PACKED_TYPES[kind]
    stored = packed.quantize(weight)
    assert torch.allclose(
        packed.product(x, *stored), packed.unpack(*stored, torch.float32) @ x, atol=1e-4
    )


def test_groups_are_a_multiple_of_16_and_layers_without_groups_get_int8():
    assert [quantize.group_size(n) for n in (4096, 14336, 2048, 5632, 384, 40)] == [
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
def test_tied_head_is_not_quantized(tmp_path, weights):
    folder = save_mistral(tmp_path, tie_word_embeddings=True)
    model = load_model(str(folder), torch.float32, weights=weights)
    plain = load_model(str(folder), torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight and torch.equal(
        model.lm_head.weight, plain.lm_head.weight
    )
    ids = list(range(3, 30))
    assert (logits(model, ids) - logits(plain, ids)).std() < 0.3 * logits(plain, ids).std()


def test_nan_weight_is_refused_while_packing(base, tmp_path):
    broken = shutil.copytree(base, tmp_path / "broken")
    from safetensors.torch import load_file, save_file

    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="layers.1.mlp.up_proj.weight holds NaN"):
        load_model(str(broken), weights="int4")


@pytest.mark.parametrize("weights", ["plain", "int8", "int4"])
def test_adapter_merged_while_loading_equals_merge(adapted, tokenizer, weights):
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
def test_folder_merged_to_few_bits_equals_packing_at_load(adapted, tmp_path, weights):
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


# --- one token at a time, compiled for a GPU


@pytest.mark.parametrize("weights", ["plain", "int8", "int4"])
@pytest.mark.parametrize("changes", [{}, {"sliding_window": 8}], ids=["all", "window"])
def test_compiled_decoder_equals_the_model(tmp_path, weights, changes, monkeypatch):
    """Without the GPU's code: aot_eager traces what Triton would compile."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    folder = save_mistral(tmp_path, **changes)
    tokenizer = load_tokenizer(folder)
    model = load_model(str(folder), torch.float32, tokenizer=tokenizer, weights=weights)
    decoder = generate.Decoder(model, tokenizer, 64)
    decoder.compiled_decoder = generate.CompiledDecoder(model, decoder.cache)
    ids = list(range(3, 15))
    for new in (40, 41, 42, 50, 60):
        ids.append(new)
        assert torch.allclose(
            decoder.next_logits(ids), logits(model, ids)[-1], atol=2e-4, rtol=1e-3
        )
    shorter = [*ids[:9], 77]  # an earlier turn was replaced
    assert torch.allclose(
        decoder.next_logits(shorter), logits(model, shorter)[-1], atol=2e-4, rtol=1e-3
    )


# --- several replies at a time


@pytest.mark.parametrize("temperature", [0, 1.0], ids=["greedy", "sampled"])
@pytest.mark.parametrize("changes", [{}, {"sliding_window": 8}], ids=["all", "window"])
def test_batched_replies_equal_single_ones(tmp_path, changes, temperature):
    model = load_model(str(save_mistral(tmp_path, **changes)), torch.float32)
    tokenizer = load_tokenizer(tmp_path)
    decoder = generate.Decoder(model, tokenizer, 96)
    decoder.stop_ids = set(range(3, VOCAB, 12))  # or a random model never ends
    draw = torch.Generator().manual_seed(1)
    lengths = (3, 40, 11, 1, 24, 80, 7, 96)  # one stops at the context's end, one has no room
    prompts = [torch.randint(300, VOCAB, (n,), generator=draw).tolist() for n in lengths]
    prompts.append(prompts[1] + prompts[2])  # begins as another did
    alone = []
    for seed, ids in enumerate(prompts):
        generator = torch.Generator().manual_seed(seed)
        plain = generate.Decoder(model, tokenizer, 96)
        plain.stop_ids = decoder.stop_ids
        alone.append(list(plain.generate(ids, 20, temperature, 0.95, generator)))
    assert len({len(ids) for ids in alone}) > 4  # they end at different times
    for rows in (1, 3, 9):
        batch = generate.DecodeBatch(decoder, rows)
        batched = []
        for seed, ids in enumerate(prompts):
            while batch.full:
                batch.step()
            generator = torch.Generator().manual_seed(seed)
            batched.append(batch.add(ids, 20, temperature, 0.95, generator))
        while batch.rows:
            batch.step()
        assert [row.ids for row in batched] == alone


@pytest.mark.parametrize("top_p", [0.5, 0.95, 1.0])
@pytest.mark.parametrize("spread", [0.1, 3.0], ids=["flat", "peaked"])
def test_sample_equals_sampling_from_the_whole_sorted_vocabulary(top_p, spread, monkeypatch):
    for seed in range(20):
        logits = torch.randn(20000, generator=torch.Generator().manual_seed(seed)) * spread
        monkeypatch.setattr(generate, "MIN_PROBABILITY", 1e-5)
        drawn = generate.sample(logits, 0.7, top_p, torch.Generator().manual_seed(seed))
        monkeypatch.setattr(generate, "MIN_PROBABILITY", -1)  # nothing is left out
        whole = generate.sample(logits, 0.7, top_p, torch.Generator().manual_seed(seed))
        assert drawn == whole


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 0.009])
def test_at_a_tiny_temperature_the_likeliest_id_is_drawn(temperature):
    logits = torch.tensor([-50.0, 20, 19.9, 0])
    assert generate.sample(logits, temperature, 0.95) == 1


@pytest.mark.parametrize("top_p", [0.6, 1.0])
def test_sample_draws_as_often_as_multinomial(top_p):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, generator=generator) * 2
    probs, ids = (logits / 0.7).softmax(0).sort(descending=True)
    probs[probs.cumsum(0) - probs > top_p] = 0
    drawn = [generate.sample(logits, 0.7, top_p, generator) for _ in range(4000)]
    expected = ids[torch.multinomial(probs, 4000, replacement=True, generator=generator)]
    counts, other = (torch.bincount(torch.as_tensor(x), minlength=50) for x in (drawn, expected))
    assert set(drawn) <= set(ids[probs > 0].tolist())
    assert ((counts - other).abs() <= 5 * (counts + other + 1).sqrt()).all()


def test_a_row_that_is_done_leaves_its_place_to_the_next(base, tokenizer):
    decoder = generate.Decoder(
        load_model(str(base), torch.float32, tokenizer=tokenizer), tokenizer, 64
    )
    batch = generate.DecodeBatch(decoder, 2)
    short, long = batch.add([5, 6, 7], 1, 0), batch.add([8, 9], 4, 0)
    assert batch.full and batch.step() == [short] and not batch.full and not short.ended
    assert batch.add([300] * 64, 4, 0).ids == [] and not batch.full  # no room: done at once
    third = batch.add([10, 11, 12], 2, 0)
    done = []
    while batch.rows:
        done += batch.step()
    assert [len(row.ids) for row in (short, long, third)] == [1, 4, 2] and done == [third, long]


def test_alone_a_row_is_decoded_by_the_compiled_decoder(base, tokenizer):
    model = load_model(str(base), torch.float32, tokenizer=tokenizer)
    plain = generate.Decoder(model, tokenizer, 64)
    prompts = [[5, 6, 7], list(range(300, 330)), [8, 9, 10]]
    expected = [list(plain.generate(prompt, 12, 0)) for prompt in prompts]
    decoder, calls = generate.Decoder(model, tokenizer, 64, slots=3), []

    def stand_in(token):
        calls.append(token)
        with torch.inference_mode():
            return model(token, cache=stand_in.cache)

    stand_in.cache, decoder.compiled_decoder = decoder.cache, stand_in
    batch = generate.DecodeBatch(decoder)
    rows = [batch.add(prompt, 12, 0) for prompt in prompts[:2]]
    while batch.rows:
        batch.step()
    together = len(calls)
    rows.append(batch.add(prompts[2], 12, 0))  # in a place that another left
    while batch.rows:
        batch.step()
    assert [row.ids for row in rows] == expected
    assert together < 6 and len(calls) - together == len(expected[2]) - 1


WORDS = st.lists(st.integers(300, VOCAB - 1), max_size=30)
JOIN = st.fixed_dictionaries({
    "begins_as": st.integers(0, 9),  # an earlier prompt and its reply
    "words": WORDS,
    "max_new": st.integers(0, 12),
    "temperature": st.sampled_from([0, 1.0]),
})  # fmt: skip
ACTIONS = st.lists(
    st.one_of(
        st.just("step"), st.just("step"), JOIN, st.tuples(st.just("leave"), st.integers(0, 9))
    ),
    max_size=40,
)


@pytest.fixture(scope="module", params=[None, 8], ids=["all", "window"])
def windowed(request, tmp_path_factory):
    """A decoder of three slots, and one that stands for decoding alone."""
    folder = save_mistral(tmp_path_factory.mktemp("windowed"), sliding_window=request.param)
    model, tokenizer = load_model(str(folder), torch.float32), load_tokenizer(folder)
    decoders = [generate.Decoder(model, tokenizer, 96, slots=slots) for slots in (3, 1)]
    for decoder in decoders:
        decoder.stop_ids = set(range(3, VOCAB, 12))
    return decoders


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(actions=ACTIONS, shared_slots=st.booleans())
def test_any_joins_and_leaves_give_the_replies_of_each_alone(windowed, actions, shared_slots):
    decoder, alone = windowed
    batch = generate.DecodeBatch(decoder, None if shared_slots else 2)
    rows, left, seeds = [], [], itertools.count()
    for action in actions:
        if action == "step":
            batch.step()
        elif isinstance(action, tuple):
            if batch.rows:
                left.append(batch.rows[action[1] % len(batch.rows)])
                batch.remove(left[-1])
        elif not batch.full:
            before = rows[action["begins_as"] % len(rows)][1] if rows else None
            begin = [*before.prompt, *before.ids] if before else []
            prompt = [*begin, *action["words"], 5][:95]
            if not shared_slots and action["words"]:
                decoder.prefill(prompt[: len(action["words"])])  # as evaluate.py does
            settings = action["max_new"], action["temperature"], 0.95
            generator = torch.Generator().manual_seed(seed := next(seeds))
            rows.append((seed, batch.add(prompt, *settings, generator), settings))
    while batch.rows:
        batch.step()
    for seed, row, settings in rows:
        generator = torch.Generator().manual_seed(seed)
        expected = list(alone.generate(row.prompt, *settings, generator))
        if row in left:
            expected = expected[: len(row.ids)]
        assert row.ids == expected


def count_reads(model):
    """Count the tokens that a model reads from now on; padding to 16 counts."""
    counts = []
    model.register_forward_pre_hook(lambda model, args: counts.append(args[0].numel()))
    return counts


def test_what_prompts_share_is_read_once_and_a_talk_finds_its_place_again(base, tokenizer):
    model = load_model(str(base), torch.float32, tokenizer=tokenizer)
    decoder = generate.Decoder(model, tokenizer, 512, slots=3)
    batch, reads = generate.DecodeBatch(decoder), count_reads(model)

    def talk(*prompts):
        """Return the rows of some prompts at once, and how many tokens were read for them."""
        reads.clear()
        rows = [batch.add(prompt, 3, 0) for prompt in prompts]
        while batch.rows:
            batch.step()
        return *rows, sum(reads)

    header = list(range(300, 500))
    first, second, count = talk([*header, 600], [*header, 601])
    assert count <= 208 + 16 + 2 * 3  # the header once
    other, count = talk(list(range(700, 900)))
    assert count >= 200
    short = 16 + 3
    for row in (other, first, second, other):  # the third place was free, so all are there
        assert talk([*row.prompt, *row.ids, 610, 611])[-1] <= short
    assert talk(list(range(1000, 1200)))[-1] >= 200  # takes the place of `first`, left long ago
    assert talk(other.prompt)[-1] <= short and talk(second.prompt)[-1] <= short
    assert talk(first.prompt)[-1] <= short  # that is all header, which `second` has


def test_a_long_prompt_is_read_in_pieces_between_steps(base, tokenizer):
    model = load_model(str(base), torch.float32, tokenizer=tokenizer)
    batch = generate.DecodeBatch(generate.Decoder(model, tokenizer, 512, slots=3))
    reads = count_reads(model)
    first = batch.add([5, 6, 7], 20, 0)
    batch.step()
    long, left = batch.add(list(range(300, 700)), 1, 0), batch.add(list(range(800, 1200)), 9, 0)
    for _ in range(3):
        before = len(first.ids)
        batch.step()
        assert len(first.ids) == before + 1
    assert max(reads) <= generate.PIECE and len(long.cached) < 400
    batch.remove(left)  # hangs up before its prompt is read
    while batch.rows:
        batch.step()
    assert len(first.ids) == 20 and len(long.ids) == 1 and left.ids == []


# --- prompts and what stays cached


def test_next_turn_reads_only_its_new_tokens(adapted, tokenizer):
    decoder = generate.Decoder(
        load_model(str(adapted), tokenizer=tokenizer, weights="plain"), tokenizer, 256
    )
    turns = [Turn("Bob", False, "", ["one two three"])]
    for number in range(3):
        answer = generate.Answer(decoder, turns, "Ann", 12, temperature=1.0, seed=number)
        list(answer)
        turns += [Turn("Ann", True, "", answer.messages), Turn("Bob", False, "", [f"and {number}"])]
        begin = generate.truncate_prompt(turns, "Ann", tokenizer, 240, decoder.reply_ids)
        assert begin[: len(answer.prompt) + len(answer.ids)] == answer.prompt + answer.ids
        lengths = []
        handle = decoder.model.register_forward_pre_hook(
            lambda model, args, lengths=lengths: lengths.append(args[0].shape[1])
        )
        decoder.next_logits(begin)
        handle.remove()
        new = len(begin) - len(answer.prompt) - len(answer.ids) + 1
        assert sum(lengths) <= new + -new % generate.PREFILL_MULTIPLE


def test_prompt_takes_the_known_ids_of_a_turn(tokenizer):
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


def test_truncation_is_rare_so_most_prompts_begin_as_the_last(tokenizer):
    turns, prompts = [], []
    for n in range(120):
        turns.append(Turn(("Bob", "Ann")[n % 2], bool(n % 2), "", [f"message number {n}"]))
        prompts.append(generate.truncate_prompt(turns, "Ann", tokenizer, 200))
    tail = len(tokenizer.encode("<|im_start|>Ann\n>>>")[0]) - 1
    kept = [b[: len(a) - tail] == a[:-tail] for a, b in zip(prompts, prompts[1:])]
    assert all(len(ids) <= 200 for ids in prompts) and 3 <= kept.count(False) <= 20


def test_header_stays_when_old_turns_are_dropped(tokenizer):
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


def test_a_name_longer_than_a_tiny_context_is_answered(base, tokenizer):
    model = load_model(str(base), tokenizer=tokenizer, weights="plain")
    decoder = generate.Decoder(model, tokenizer, 64)
    answer = generate.Answer(decoder, [Turn("Bob", False, "", ["hi"])], "Qz" * 100, 256)
    list(answer)
    assert len(answer.prompt) == 32 and not decoder.reply_ids


def test_answer_left_early_leaves_the_decoder_ready(adapted, tokenizer):
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


def test_ctrl_c_while_prefilling_leaves_a_valid_cache(adapted, tokenizer, monkeypatch):
    """What was being read has overwritten some layers' keys and values of what was read before."""
    decoder = generate.Decoder(
        load_model(str(adapted), tokenizer=tokenizer, weights="plain"), tokenizer, 64
    )
    ids = list(range(3, 20))
    decoder.next_logits(ids)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(decoder.model.model.layers[1], "compute", interrupted)
        with pytest.raises(KeyboardInterrupt):
            decoder.next_logits([*ids[:5], *range(100, 115)])
    assert torch.allclose(
        decoder.next_logits([*ids, 50]), logits(decoder.model, [*ids, 50])[-1], atol=1e-4
    )


# --- the terminal's commands


def test_undo_removes_turns_from_the_history_file(tmp_path):
    conversation = chat.TerminalChat("Ann", "Bob", None, tmp_path / "talk.jsonl")
    for text in ("hello", "what nobody should read"):
        conversation.turns += [
            Turn("Bob", False, "2024-05-01T10:00:00", [text]),
            Turn("Ann", True, "2024-05-01T10:01:00", ["so"]),
        ]
    conversation.save()
    conversation.run_command("undo")
    (left,) = data.load_sessions(conversation.history)
    assert [turn.messages for turn in left.turns] == [["hello"], ["so"]]
    conversation.run_command("undo")
    assert conversation.history.read_text() == ""


def test_commands_undo_retry_rename_and_reset(adapted, tmp_path):
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
        and "(removed;" in done.stdout
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
