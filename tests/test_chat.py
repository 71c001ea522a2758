import json
import os
import pty
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
    """A random model folder with ChatML tokens and a persona; what it says is nonsense, how it says it is not."""
    folder = tmp_path_factory.mktemp("clone")
    shape = hf.with_vocab_size(hf.read_config(base), VOCAB + 2)
    model = Transformer(shape)
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


def test_an_answer_is_repeatable_by_its_seed_and_has_no_special_token(clone, tokenizer):
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


def test_pipes_are_answered_line_by_line_with_the_name(clone):
    done = command(
        "chat.py", clone, "--seed", 3, "--max-tokens", 8, stdin="привет\n\nhow are you?\n"
    )
    assert done.returncode == 0, done.stderr
    assert (
        sum(line.startswith("Ann: ") for line in done.stdout.splitlines()) >= 2
        and "Traceback" not in done.stderr
    )


def test_a_terminal_shows_who_speaks_and_ends_on_ctrl_d(clone):
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


def test_what_is_not_understood_is_said_and_so_is_a_name_that_nobody_has(chats, capsys):
    talk = chat.Conversation("Ann", "Bob", None)
    for name, said, expected in (
        ("bogus", "", "(/bogus is not understood)"),
        ("temp", "99", "(/temp 99 is not"),
        ("undo", "", "nothing was said"),
    ):
        talk.obey(name, said)
        assert expected in capsys.readouterr().out
    talk.obey("help")
    assert (
        capsys.readouterr().out == chat.HELP + "\n" and max(map(len, chat.HELP.splitlines())) < 80
    )
    assert unknown_name_warning(chats, "Zed") == "(Zed is none of those it talked to: Bob)"
    assert unknown_name_warning(chats, "Bob") == unknown_name_warning(chats, None) == ""


def test_cached_answers_equal_answers_without_a_cache(decoder):
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
            logits[decoder.never] = -torch.inf
            fresh.append(int(logits.argmax()))
            if fresh[-1] in decoder.ends:
                fresh.pop()
                break
        assert cached == fresh


def test_it_stops_where_the_turn_ends_and_at_the_end_of_the_context(decoder, monkeypatch):
    ids = list(range(3, 20))
    script = iter([10, 11, decoder.tokenizer.im_end, 12])
    monkeypatch.setattr(generate, "sample", lambda *a: next(script))
    assert list(decoder.generate(ids)) == [10, 11]
    monkeypatch.setattr(generate, "sample", lambda *a: 10)
    assert len(list(decoder.generate(ids, max_new=500))) == decoder.cache.size - len(ids)


def test_picking_follows_temperature_and_top_p():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    draw = lambda **how: [
        generate.sample(logits.clone(), generator=torch.Generator().manual_seed(n), **how)
        for n in range(2000)
    ]
    assert set(draw(temperature=0, top_p=1.0)) == {0}
    assert set(draw(temperature=1, top_p=0.7)) == {0, 1}
    share = draw(temperature=1, top_p=1.0).count(1) / 2000
    assert abs(share - 0.3) < 0.04


def test_messages_come_as_they_are_written_and_half_a_letter_waits(tokenizer):
    text = ">>> hi 🫠🦆\n>>> how >> are\nyou"
    ids = tokenizer.encode("<|im_start|>Ann\n" + text)[0]
    prompt = tokenizer.encode("<|im_start|>Ann\n>>>")[0]
    assert ids[: len(prompt)] == prompt
    seen = list(generate.messages(iter(ids[len(prompt) :]), tokenizer))
    assert seen[-1] == ["hi 🫠🦆", "how >> are\nyou"] and seen[0] in (["h"], ["hi"])
    assert not any("\ufffd" in m or ">>>" in m for shown in seen for m in shown)
    for before, after in zip(seen, seen[1:]):  # what was shown is never taken back
        assert all(b.startswith(a) for a, b in zip(before, after)) and len(before) <= len(after)


def test_a_long_conversation_loses_its_oldest_turns(tokenizer):
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


def test_folders_that_are_no_checkpoint_are_refused(tmp_path, clone, chats):
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
        ("--port", 1 << 16),
    ):
        refused(command("chat.py", clone, "--web", flag, value), f"{flag} {value}")
    refused(command("chat.py", clone, "--device", "abacus"), "abacus")


def test_a_plain_base_without_chat_tokens_can_be_talked_to(base):
    done = command("chat.py", base, "-p", "hi", "--max-tokens", 3, "--seed", 1)
    assert done.returncode == 0, done.stderr
