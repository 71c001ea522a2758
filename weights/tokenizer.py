"""ChatML over the base's own vocabulary: text in, ids and character offsets out.

One engine, the `tokenizers` package, for every base, so that what trains, what chats and what other tools read from `ckpt/` cannot
differ. A base's `tokenizer.json` is taken as it is. A sentencepiece `tokenizer.model` and Mistral's `tekken.json` are converted here: each
stretch between special tokens is encoded as one string (`<|im_start|>` then `▁John`), exactly as sentencepiece and tiktoken do.
"""

import base64
import codecs
import itertools
import json
import re
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Engine

from cli import UserError, describe_file, read_json, write_json, write_text

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
PADDING = 512  # embeddings are padded to a multiple of so many rows at most; v1's 32000 tokens are no vocabulary for v3's 32768 rows
PROBE_TEXT = "The Quick brown fox,\n>>> don't  jump over 12345 lazy dogs.\n\tПривет, как дела? ½ 漢字 \U0001f986"
TEKKEN_PATTERN = (  # what the first ids stand for where a tekken.json doesn't say: mistral-common's list up to its version 7
    "<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS] [TOOL_CALLS] [IMG] <pad> "
    "[IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX] [SYSTEM_PROMPT] [/SYSTEM_PROMPT] [TOOL_CONTENT]"
).split()
IN_ENGINE = (
    "add_bos_token",
    "add_eos_token",
    "add_prefix_space",
    "legacy",
    "sp_model_kwargs",
    "auto_map",
    "chat_template",
)


def special_token(spelling):
    return AddedToken(spelling, special=True, normalized=False)


class Tokenizer:
    """`added`: the ids of the ChatML tokens that the base lacked; its embeddings need rows for them. `bos`: its id, None without one."""

    def __init__(self, engine, folder, bos):
        engine.no_truncation()
        engine.no_padding()
        self.engine, self.folder = engine, Path(folder)
        self.bos = engine.token_to_id(bos) if bos else None
        missing = [t for t in (IM_END, IM_START) if engine.token_to_id(t) is None]
        engine.add_special_tokens(
            [special_token(IM_END), special_token(IM_START)]
        )  # some bases have them, but as ordinary words
        self.added = [engine.token_to_id(t) for t in missing]
        self.im_start, self.im_end = engine.token_to_id(IM_START), engine.token_to_id(IM_END)
        bytes_ = {engine.token_to_id(f"<0x{byte:02X}>"): byte for byte in range(256)}
        self.byte_of = (
            bytes_ if None not in bytes_ else {}
        )  # sentencepiece's tokens for letters that have none of their own
        tokens = engine.get_added_tokens_decoder()
        self.special_ids = sorted(i for i, t in tokens.items() if t.special)
        # the spellings that the engine finds in any text; `<tool_call>` and its like are not special everywhere, but found all the same
        self.specials = tuple(
            sorted(
                t.content
                for t in tokens.values()
                if t.special or re.fullmatch(r"<.+>|\[.+\]", t.content)
            )
        )

    def __len__(self):
        return self.engine.get_vocab_size(with_added_tokens=True)

    @property
    def rows_needed(self):
        """Rows that the base's embeddings must have for the tokens it lacked; 0 when it lacked none."""
        return max([*self.added, -1]) + 1

    def check(self, said, folder, rows):
        """UserError unless this is the tokenizer of the model in `folder`, whose config.json holds `said`, and which has `rows` tokens."""
        ids, extra = (
            self.engine.get_vocab(with_added_tokens=True),
            self.engine.get_added_tokens_decoder(),
        )
        ends = said.get("eos_token_id")
        ends = [
            end
            for end in (ends if isinstance(ends, list) else [ends])
            if type(end) is int and end in ids.values()
        ]
        wrong = [end for end in ends if end == self.im_start or end not in extra]
        idle = {*self.special_ids} - {self.bos, self.im_start, self.im_end} | {
            *self.added
        }  # a pad token without a row: it is never typed
        beyond = [(i, t) for t, i in ids.items() if i >= rows and i not in idle]
        if beyond:
            why = (
                f"it gives {max(beyond)[1]!r} the id {max(beyond)[0]}, the model has {rows} tokens"
            )
        elif rows - max(ids.values()) > PADDING:
            why = f"it has {max(ids.values()) + 1} tokens, the model {rows}"
        elif self.bos is not None and said.get("bos_token_id") not in (None, self.bos):
            why = f"a text begins with its id {self.bos}, by config.json with {said['bos_token_id']!r:.60}"
        elif wrong:
            why = f"by config.json id {wrong[0]} ends a text, which is its {self.engine.id_to_token(wrong[0])!r}"
        else:
            return
        raise UserError(
            f"The tokenizer in {self.folder} is not that of {folder}: {why}",
            "Copy the model's own tokenizer files there.",
        )

    def encode(self, text):
        """Whole document → (ids, offsets); BOS first where the base's tokenizer adds one; offsets are (begin, end) in characters."""
        encoding = self.engine.encode(text, add_special_tokens=False)
        ids, offsets = encoding.ids, encoding.offsets
        if self.bos is not None:
            ids, offsets = [self.bos, *ids], [(0, 0), *offsets]
        return ids, offsets

    def decode(self, ids):
        """Ids → text without special tokens. An unfinished character at the end shows as U+FFFD, bytes that make none are left out.

        More ids never change what those before them said: tokenizers' own decoder gives up all letters beside a byte that makes none.
        """
        text, unfinished = self.engine.decode(ids, skip_special_tokens=True), b""
        if "\ufffd" not in text or not self.byte_of:
            return text
        id_of, whole = {byte: id for id, byte in self.byte_of.items()}, []
        for bytes_, run in itertools.groupby(ids, self.byte_of.__contains__):
            unfinished = b""
            if bytes_:
                decoder = codecs.getincrementaldecoder("utf-8")("ignore")
                run = [
                    id_of[byte]
                    for byte in decoder.decode(bytes(self.byte_of[id] for id in run)).encode()
                ]
                unfinished, _ = decoder.getstate()
            whole += run
        return self.engine.decode(whole, skip_special_tokens=True) + (
            "\ufffd" if unfinished else ""
        )

    def save(self, folder):
        """Write `tokenizer.json` and a `tokenizer_config.json` with which transformers and vLLM load these very ids.

        The names in its chat template are those of `persona.json`, if that lies there.
        """
        folder = Path(folder)
        write_text(folder / "tokenizer.json", self.engine.to_str(pretty=True))
        config = {
            k: v
            for k, v in read_json(self.folder / "tokenizer_config.json", {}).items()
            if k not in IN_ENGINE
        }
        facts, tokens = (
            ("content", "lstrip", "normalized", "rstrip", "single_word", "special"),
            self.engine.get_added_tokens_decoder(),
        )
        config["added_tokens_decoder"] = {
            str(i): {fact: getattr(t, fact) for fact in facts} for i, t in sorted(tokens.items())
        }
        config["tokenizer_class"] = (
            "PreTrainedTokenizerFast"  # "LlamaTokenizer" makes transformers 5 convert anew, with other ids
        )
        config |= {
            "eos_token": IM_END,
            "add_bos_token": self.bos is not None,
            "add_eos_token": False,
        }
        if self.bos is not None:
            config["bos_token"] = self.engine.id_to_token(self.bos)
        me, you = read_names(folder)
        config["chat_template"] = chat_template(me, you, self.bos is not None)
        write_json(folder / "tokenizer_config.json", config)


def read_names(folder):
    """(me, whom I talk to most) of a folder's `persona.json`, or plain names."""
    persona = read_json(Path(folder) / "persona.json", {})
    try:
        found = (
            persona.get("me", "Me"),
            next((contact["name"] for contact in persona.get("contacts", [])), "Friend"),
        )
        assert all(isinstance(name, str) for name in found)
    except (AssertionError, KeyError, TypeError):
        raise UserError(
            f"{Path(folder) / 'persona.json'} holds no names",
            'It is {"me": NAME, "contacts": [{"name": NAME}, …]}.',
        ) from None
    return found


def unknown_name_warning(folder, name):
    """What to say where `name` is nobody of a folder's `persona.json`; "" where it is somebody, or nothing is known."""
    known = [
        contact.get("name")
        for contact in read_json(Path(folder) / "persona.json", {}).get("contacts", [])
    ]
    if not known or name in (None, *known):
        return ""
    return f"({name} is none of those it talked to: {', '.join(known[:5])}{' …' if len(known) > 5 else ''})"


def chat_template(me, you, begins):
    """The Jinja template that joins turns, one dict each, as `data.render` does: `content` holds the `>>> ` lines, `name` the author."""
    sets = "".join(
        f"{{%- set {key} = {json.dumps(name, ensure_ascii=False)} -%}}"
        for key, name in (("me", me), ("you", you))
    )
    author = '(m.name or (you if m.role == "user" else me if m.role == "assistant" else m.role))'
    close = '("\\n" if add_generation_prompt or not loop.last else "")'
    turn = f'{{{{- "{IM_START}" + {author} + "\\n" + m.content + "{IM_END}" + {close} -}}}}'
    ask = (
        f'{{%- if add_generation_prompt -%}}{{{{- "{IM_START}" + me + "\\n>>>" -}}}}{{%- endif -%}}'
    )
    return f"{sets}{'{{- bos_token -}}' * begins}{{%- for m in messages -%}}{turn}{{%- endfor -%}}{ask}"


def load_tokenizer(folder):
    """The tokenizer of a model folder: `tokenizer.json` where there is one, else `tokenizer.model`, else `tekken.json`.

    UserError when there is none, or it can't be used.
    """
    folder = Path(folder)
    found = [
        *folder.glob("tokenizer.json"),
        *sorted(folder.glob("tokenizer.model*")),
        *folder.glob("tekken.json"),
    ]
    if not found:
        raise UserError(
            f"{folder} has no tokenizer.json, no tokenizer.model and no tekken.json",
            "Copy the base model's tokenizer files there.",
        )
    path, config, added = (
        found[0],
        read_json(folder / "tokenizer_config.json", {}),
        read_json(folder / "added_tokens.json", {}),
    )
    try:
        bos = config.get("bos_token")
        bos = bos["content"] if isinstance(bos, dict) else bos
        if path.name == "tokenizer.json":
            engine = Engine.from_file(str(path))
        else:
            engine, bos = (
                from_tekken(read_json(path))
                if path.suffix == ".json"
                else from_sentencepiece(path, added),
                bos or "<s>",
            )
        tokenizer = Tokenizer(engine, folder, bos if adds_bos(engine, config, bos) else None)
        for i, token in config.get("added_tokens_decoder", {}).items():
            have, said = engine.id_to_token(int(i)), token["content"]
            if have not in (None, said) and (
                int(i) not in tokenizer.added or said in (IM_START, IM_END)
            ):
                raise UserError(
                    f"{path}: id {i} is {have!r}, tokenizer_config.json makes it {said!r:.60}",
                    "Copy all tokenizer files from one base model.",
                )
        ids = tokenizer.encode(f"{IM_START}{PROBE_TEXT}{IM_END}")[0]
        tokenizer.decode(ids)
        single = (
            ids[tokenizer.bos is not None] == tokenizer.im_start and ids[-1] == tokenizer.im_end
        )
    except UserError:
        raise
    except Exception as error:  # tokenizers raises bare Exception, sentencepiece several kinds, and JSON may hold what it shouldn't
        raise UserError(
            f"{path} can't be read, with the .json files beside it: {describe_file(path, error)}",
            "Copy the tokenizer files again from the base model.",
        ) from None
    if not single:
        raise UserError(
            f"{path} cuts {IM_START} or {IM_END} into several tokens",
            "Copy the tokenizer files again from the base model.",
        )
    return tokenizer


def adds_bos(engine, config, bos):
    """Whether the base's own tokenizer opens a document with BOS: what `tokenizer_config.json` says, else what its post-processor does."""
    if not bos or engine.token_to_id(bos) is None:
        return False
    said = config.get("add_bos_token")
    return engine.encode("x").ids[:1] == [engine.token_to_id(bos)] if said is None else said


def joins_words(pieces):
    """Every pair of pieces that makes a piece, in the order of those they make: BPE's merges."""
    known = {*pieces}
    splits = (
        (piece[:cut], piece[cut:]) for piece in pieces for cut in range(len(piece) - 1, 0, -1)
    )
    return [pair for pair in splits if pair[0] in known and pair[1] in known]


def from_tekken(said):
    """Mistral's `tekken.json` → the same tokenizer in `tokenizers`.

    It is tiktoken's: bytes are merged in the order of the pieces, and a word that is a piece stays whole. Special tokens come first.
    """
    count, size = (
        said["config"][key] for key in ("default_num_special_tokens", "default_vocab_size")
    )
    marks = [
        token["token_str"]
        for token in sorted(said.get("special_tokens") or [], key=lambda token: token["rank"])
    ] or TEKKEN_PATTERN
    marks = [*marks, *(f"<SPECIAL_{i}>" for i in range(len(marks), count))]
    shown = [
        *range(33, 127),
        *range(161, 173),
        *range(174, 256),
    ]  # the bytes that byte-level BPE writes as themselves
    letters = dict(
        zip(
            [*shown, *sorted({*range(256)} - {*shown})],
            map(chr, [*shown, *range(256, 512 - len(shown))]),
        )
    )
    pieces = [
        "".join(letters[byte] for byte in base64.b64decode(token["token_bytes"]))
        for token in said["vocab"][: size - count]
    ]
    vocab = {token: i for i, token in enumerate([*marks, *pieces])}
    engine = Engine(models.BPE(vocab, joins_words(pieces), ignore_merges=True))
    words = pre_tokenizers.Split(Regex(said["config"]["pattern"]), "isolated")
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    engine.decoder = decoders.ByteLevel()
    engine.add_special_tokens([special_token(mark) for mark in marks])
    engine.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocab["<s>"])]
    )
    return engine


def sentencepiece_bpe(
    pieces: list[str], scores: list[float], mergeable: list[int], unk: str, prefix: bool = True
) -> Engine:
    """Build sentencepiece's BPE in `tokenizers`; `prefix`: a space goes before each stretch of text.

    sentencepiece merges, over and over, the adjacent pair whose union has the best score, the leftmost of equals. BPE merges by rank:
    the pairs that make a piece are listed in the order of its score, so that the result is the same. Pieces are unknown to it otherwise.
    """
    merges = joins_words([pieces[i] for i in sorted(mergeable, key=lambda i: (-scores[i], i))])
    vocab = {piece: i for i, piece in enumerate(pieces)}
    engine = Engine(models.BPE(vocab, merges, unk_token=unk, byte_fallback=True, fuse_unk=True))
    spaces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    engine.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁")] * prefix + [normalizers.Replace(" ", "▁")]
    )
    engine.decoder = decoders.Sequence(spaces + [decoders.Strip(" ", 1, 0)] * prefix)
    return engine


def from_sentencepiece(path, added):
    """A sentencepiece BPE model → the same tokenizer in `tokenizers`. `added`: {spelling: id} beyond the model's own pieces."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    probe = "Ａ ½  é\u0301 ﬁ"
    if model.normalize(probe).replace("▁", " ").strip() != probe:
        raise UserError(
            f"{path} normalises text (NFKC), which no Mistral-style base does",
            "Use a base with a tokenizer.json.",
        )
    size = model.vocab_size()
    pieces = [model.id_to_piece(i) for i in range(size)]
    mergeable = [
        i
        for i in range(size)
        if not (
            model.is_control(i) or model.is_unknown(i) or model.is_byte(i) or model.is_unused(i)
        )
    ]
    engine = sentencepiece_bpe(
        pieces, [model.get_score(i) for i in range(size)], mergeable, pieces[model.unk_id()]
    )
    if engine.encode(PROBE_TEXT).ids != model.encode(PROBE_TEXT):
        raise UserError(
            f"{path} is no BPE model, or it is damaged: converted, it gives other ids",
            "Use a base with a tokenizer.json.",
        )
    engine.add_special_tokens(
        [
            special_token(model.id_to_piece(i))
            for i in range(size)
            if model.is_control(i) or model.is_unknown(i)
        ]
    )
    for spelling, i in sorted(added.items(), key=lambda item: item[1]):
        engine.add_special_tokens([special_token(spelling)])
        if engine.token_to_id(spelling) != i:
            raise UserError(
                f"added_tokens.json gives {spelling} the id {i}, but {path} has {size} pieces",
                "Copy both from one base model.",
            )
    bos = model.id_to_piece(model.bos_id())
    engine.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, model.bos_id())]
    )
    return engine
