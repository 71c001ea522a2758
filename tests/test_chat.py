"""The terminal: flags, streaming, what is shown; and decoding and prompts behind it."""

import dataclasses
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, VOCAB, command, refused

import chat
import data
from data import Turn
from inference import generate
from model import Transformer
from weights import hf
from weights.load import load_model, load_weights
from weights.save import save_model
from weights.tokenizer import load_tokenizer, unknown_name_warning


@pytest.fixture(scope="module")
def clone(base, tokenizer, tmp_path_factory):
    """A random model folder with ChatML tokens and a persona."""
    folder = tmp_path_factory.mktemp("clone")
    config = hf.with_vocab_size(hf.read_config(base), VOCAB + 2)
    model = Transformer(config)
    load_weights(model, base)
    save_model(model, folder, tokenizer, torch.float32)
    tokenizer.save(folder)
    (folder / "persona.json").write_text(
        json.dumps(
            {
                "me": "Ann",
                "contacts": [{"name": "Bob", "messages": 9}, {"name": "Eve", "messages": 2}],
            }
        )
    )
    return folder


@pytest.fixture(scope="module")
def decoder(clone):
    return generate.Decoder(load_model(str(clone)), load_tokenizer(clone), 128)


def test_seed_makes_a_reply_repeatable_and_it_has_no_special_token(clone, tokenizer):
    ask = lambda seed: command(
        "chat.py",
        clone,
        "-p",
        "hello <|im_end|>",
        "--seed",
        seed,
        "--max-tokens",
        40,
        "--temperature",
        1.5,
    )
    first, again, other = ask(1), ask(1), ask(2)
    assert first.returncode == 0, first.stderr
    assert first.stdout == again.stdout != other.stdout and first.stdout.strip()
    assert not any(s in first.stdout + other.stdout for s in tokenizer.specials)


def test_piped_lines_are_answered_with_the_name(clone):
    done = command(
        "chat.py", clone, "--seed", 3, "--max-tokens", 8, stdin="привет\n\nhow are you?\n"
    )
    assert done.returncode == 0, done.stderr
    assert (
        sum(line.startswith("Ann: ") for line in done.stdout.splitlines()) >= 2
        and "Traceback" not in done.stderr
    )


def test_terminal_shows_names_and_exits_on_ctrl_d(clone):
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "chat.py", clone, "--as", "Eve", "--seed", "1", "--max-tokens", "5"],
        cwd=ROOT,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    seen, deadline = "", time.time() + 240
    steps = [("Eve: ", b"hi\n"), ("Ann: ", b""), ("Eve: ", b"\x04")]
    for wait_for, send in steps:
        while wait_for not in seen and time.time() < deadline:
            seen += os.read(ours, 1024).decode(errors="replace")
        assert wait_for in seen, seen
        seen = (
            seen.split(wait_for, 1)[1]
            if wait_for == "Ann: "
            else ("" if wait_for == "Eve: " else seen)
        )
        os.write(ours, send)
    assert process.wait(240) == 0


def test_unknown_commands_and_names_are_reported(chats, capsys):
    conversation = chat.TerminalChat("Ann", "Bob", None)
    for name, argument, expected in (
        ("bogus", "", "(/bogus is not understood)"),
        ("temp", "99", "(/temp 99 is not"),
        ("temp", "hot", "(/temp hot is not"),
        ("undo", "", "no messages yet"),
    ):
        conversation.run_command(name, argument)
        assert expected in capsys.readouterr().out
    conversation.run_command("help")
    assert (
        capsys.readouterr().out == chat.HELP + "\n" and max(map(len, chat.HELP.splitlines())) < 80
    )
    assert unknown_name_warning(chats, "Zed") == "(Zed is none of those it talked to: Bob)"
    assert unknown_name_warning(chats, "Bob") == unknown_name_warning(chats, None) == ""


def test_cached_decoding_equals_decoding_without_a_cache(decoder):
    prompts = [
        data.prompt(
            [
                Turn("Bob", False, "", ["hi"]),
                *[Turn("Ann", True, "", ["yes", "no"])] * n,
                Turn("Bob", False, "", ["x" * n]),
            ],
            "Ann",
        )
        for n in (0, 1, 2, 0)
    ]
    for text in prompts:
        ids, _ = decoder.tokenizer.encode(text)
        cached = list(decoder.generate(ids, 12, temperature=0))
        fresh = []
        for _ in range(12):
            with torch.no_grad():
                logits = decoder.model(torch.tensor([ids + fresh]))[0, -1]
            logits[decoder.banned_ids] = -torch.inf
            fresh.append(int(logits.argmax()))
            if fresh[-1] in decoder.stop_ids:
                fresh.pop()
                break
        assert cached == fresh


def test_generate_stops_at_the_end_of_the_turn_and_of_the_context(decoder, monkeypatch):
    ids = list(range(3, 20))
    script = iter([10, 11, decoder.tokenizer.im_end, 12])
    monkeypatch.setattr(generate, "sample", lambda *a: next(script))
    assert list(decoder.generate(ids)) == [10, 11]
    monkeypatch.setattr(generate, "sample", lambda *a: 10)
    assert len(list(decoder.generate(ids, max_new=500))) == decoder.cache.size - len(ids)


def test_sampling_follows_temperature_and_top_p():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    draw = lambda **options: [
        generate.sample(logits.clone(), generator=torch.Generator().manual_seed(n), **options)
        for n in range(2000)
    ]
    assert set(draw(temperature=0, top_p=1.0)) == {0}
    assert set(draw(temperature=1, top_p=0.7)) == {0, 1}
    share = draw(temperature=1, top_p=1.0).count(1) / 2000
    assert abs(share - 0.3) < 0.04


def test_messages_stream_and_half_a_character_waits(tokenizer):
    text = ">>> hi 🫠🦆\n>>> how >> are\nyou"
    ids = tokenizer.encode("<|im_start|>Ann\n" + text)[0]
    prompt = tokenizer.encode("<|im_start|>Ann\n>>>")[0]
    assert ids[: len(prompt)] == prompt
    reply = ids[len(prompt) :]
    seen = [generate.split_reply(reply[:n], tokenizer, False) for n in range(1, len(reply) + 1)]
    seen = [*filter(None, seen), generate.split_reply(reply, tokenizer, True)]
    assert seen[-1] == ["hi 🫠🦆", "how >> are\nyou"] and seen[0] in (["h"], ["hi"])
    assert not any("\ufffd" in m or ">>>" in m for shown in seen for m in shown)
    for before, after in zip(seen, seen[1:]):  # what was shown is never taken back
        assert all(b.startswith(a) for a, b in zip(before, after)) and len(before) <= len(after)


def test_truncate_prompt_drops_the_oldest_turns(tokenizer):
    turns = [Turn(("Bob", "Ann")[n % 2], bool(n % 2), "", [f"message {n}"]) for n in range(50)] + [
        Turn("Bob", False, "", ["last"])
    ]
    ids = generate.truncate_prompt(turns, "Ann", tokenizer, 100)
    text = tokenizer.engine.decode(ids, skip_special_tokens=False)
    assert (
        len(ids) <= 100
        and "last" in text
        and "message 0" not in text
        and text.replace(" ", "").startswith("<s><|im_start|>")
    )
    assert (
        generate.truncate_prompt(turns[-1:], "Ann", tokenizer, 100)
        == tokenizer.encode(data.prompt(turns[-1:], "Ann"))[0]
    )
    assert (
        len(
            generate.truncate_prompt(
                [Turn("Bob", False, "", ["word " * 500])], "Ann", tokenizer, 60
            )
        )
        == 60
    )


def test_wrong_folders_and_flags_are_refused(tmp_path, clone, chats):
    refused(command("chat.py", tmp_path / "none"), "no such folder")
    refused(command("chat.py", tmp_path), "holds no model")
    broken = shutil.copytree(clone, tmp_path / "broken")
    (broken / "tokenizer.json").unlink()
    refused(command("chat.py", broken, "-p", "hi"), "tokenizer")
    refused(command("chat.py", clone, "-p", " "), "-p")
    refused(
        command("chat.py", clone, "-p", "hi", "--history", tmp_path / "talk.jsonl"), "--history"
    )
    refused(
        command("chat.py", clone, "--history", tmp_path / "none" / "talk.jsonl"),
        "--history",
        "no such folder",
    )
    refused(command("chat.py", clone, "--memory", chats, "--web", "--host", "0.0.0.0"), "--memory")
    for flag, value in (
        ("--temperature", -1),
        ("--temperature", "nan"),
        ("--top-p", 1.5),
        ("--context", 0),
        ("--max-tokens", 0),
        ("--seed", -1),
        ("--seed", 1 << 64),
        ("--port", 1 << 16),
    ):
        refused(command("chat.py", clone, "--web", flag, value), flag, f"got {value}")
    refused(command("chat.py", clone, "--device", "abacus"), "abacus")
    for flag in ("-p", "--as", "--me"):
        refused(command("chat.py", clone, flag, "caf\udce9"), f"{flag} is not UTF-8")


def test_a_plain_base_without_chat_tokens_replies(base):
    done = command("chat.py", base, "-p", "hi", "--max-tokens", 3, "--seed", 1)
    assert done.returncode == 0, done.stderr


def test_each_flag_is_in_the_docs_of_chat():
    pages = [(ROOT / "docs" / f"{name}.md").read_text() for name in ("CHAT", "SERVE", "TELEGRAM")]
    named = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", " ".join(pages)))
    fields = dataclasses.fields(chat.Options)
    flags = {"--" + field.name.strip("_").replace("_", "-") for field in fields}
    assert not flags - named - {"--ckpt", "--prompt"} and "-p" in named
