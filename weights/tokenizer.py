"""ChatML over the base's own vocabulary: text in, ids and character offsets out.

One engine, the `tokenizers` package, for every base, so that what trains, what chats and what other
tools read from `ckpt/` can't differ. A base's `tokenizer.json` is taken as it is. A sentencepiece
`tokenizer.model` and Mistral's `tekken.json` are converted: each stretch between special tokens is
encoded as one string (`<|im_start|>` then `▁John`), exactly as sentencepiece and tiktoken do.
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

from cli import StrPath, UserError, describe_file, read_json, write_json, write_text

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
# Embeddings are padded to a multiple of this at most; with more rows it is another's tokenizer
PADDING_MULTIPLE = 512
PROBE_TEXT = (
    "The Quick brown fox,\n>>> don't  jump over 12345 lazy dogs.\n"
    "\tПривет, как дела? ½ 漢字 \U0001f986"
)
# The first ids where a tekken.json doesn't list them: mistral-common's, up to its version 7
TEKKEN_SPECIALS = (
    "<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] "
    "[/TOOL_RESULTS] [TOOL_CALLS] [IMG] <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX] "
    "[SYSTEM_PROMPT] [/SYSTEM_PROMPT] [TOOL_CONTENT]"
).split()
# Keys of the base's tokenizer_config.json that our tokenizer.json replaces
REPLACED_KEYS = (
    "add_bos_token",
    "add_eos_token",
    "add_prefix_space",
    "legacy",
    "sp_model_kwargs",
    "auto_map",
    "chat_template",
)
ADDED_TOKEN_KEYS = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")


def special_token(spelling: str) -> AddedToken:
    return AddedToken(spelling, special=True, normalized=False)


class Tokenizer:
    """A base's tokenizer with the ChatML tokens.

    `added`: ids of the ChatML tokens that the base lacked; its embeddings need rows for them.
    `bos`: the id that opens a document, None without one. `specials`: the spellings that the engine
    finds in any text; `<tool_call>` and the like aren't special everywhere, but found all the same.
    """

    def __init__(self, engine: Engine, folder: StrPath, bos: str | None):
        engine.no_truncation()
        engine.no_padding()
        self.engine, self.folder = engine, Path(folder)
        self.bos = engine.token_to_id(bos) if bos else None
        missing = [token for token in (IM_END, IM_START) if engine.token_to_id(token) is None]
        # some bases have them, but as ordinary words
        engine.add_special_tokens([special_token(IM_END), special_token(IM_START)])
        tokens = engine.get_added_tokens_decoder()
        ids = {token.content: i for i, token in tokens.items()}
        self.added = [ids[token] for token in missing]
        self.im_start, self.im_end = ids[IM_START], ids[IM_END]
        # sentencepiece's tokens for characters that have none of their own
        byte_of = {}
        for byte in range(256):
            i = engine.token_to_id(f"<0x{byte:02X}>")
            if i is not None:
                byte_of[i] = byte
        self.byte_of = byte_of if len(byte_of) == 256 else {}
        self.special_ids = sorted(i for i, token in tokens.items() if token.special)
        specials = set()
        for token in tokens.values():
            if token.special or re.fullmatch(r"<.+>|\[.+\]", token.content):
                specials.add(token.content)
        self.specials = tuple(sorted(specials))

    def __len__(self) -> int:
        return self.engine.get_vocab_size(with_added_tokens=True)

    @property
    def rows_needed(self) -> int:
        """The rows that embeddings must have for the added tokens; 0 when none was added."""
        return max(self.added, default=-1) + 1

    def check(self, raw_config: dict, folder: StrPath, vocab_size: int) -> None:
        """UserError unless this is the tokenizer of the model in `folder`."""
        if reason := self.mismatch(raw_config, vocab_size):
            raise UserError(
                f"The tokenizer in {self.folder} is not that of {folder}: {reason}",
                "Copy the model's own tokenizer files there.",
            )

    def mismatch(self, raw_config: dict, vocab_size: int) -> str:
        """Return why this can't be the tokenizer of a model with this config.json, or ""."""
        vocab = self.engine.get_vocab(with_added_tokens=True)
        tokens = {i: token for token, i in vocab.items()}
        # ids without a row, such as a pad token's, do no harm where text never gets them
        harmless = {*self.special_ids} - {self.bos, self.im_start, self.im_end} | {*self.added}
        beyond = [i for i in tokens if i >= vocab_size and i not in harmless]
        if beyond:
            i = max(beyond)
            return f"it gives {tokens[i]!r} the id {i}, the model has {vocab_size} tokens"
        size = max(tokens) + 1
        if vocab_size - size >= PADDING_MULTIPLE:
            return f"it has {size} tokens, the model {vocab_size}"
        bos = raw_config.get("bos_token_id")
        if self.bos is not None and bos not in (None, self.bos):
            return f"a text begins with its id {self.bos}, by config.json with {bos!r:.60}"
        ends = raw_config.get("eos_token_id")
        for end in ends if isinstance(ends, list) else [ends]:
            if type(end) is not int or end not in tokens:
                continue
            if end == self.im_start or end not in self.engine.get_added_tokens_decoder():
                return f"by config.json id {end} ends a text, which is its {tokens[end]!r}"
        return ""

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Encode a whole document, after BOS where the base's own tokenizer adds one.

        Returns (ids, offsets); offsets are (begin, end) in characters.
        """
        encoding = self.engine.encode(text, add_special_tokens=False)
        if self.bos is None:
            return encoding.ids, encoding.offsets
        return [self.bos, *encoding.ids], [(0, 0), *encoding.offsets]

    def decode(self, ids: list[int]) -> str:
        """Decode ids to text without special tokens.

        An unfinished character at the end is U+FFFD; bytes that make none are left out. More ids
        never change the text of those before them: tokenizers' own decoder drops whole letters
        beside a byte that makes none.
        """
        text = self.engine.decode(ids, skip_special_tokens=True)
        if "\ufffd" not in text or not self.byte_of:
            return text
        id_of = {byte: i for i, byte in self.byte_of.items()}
        valid: list[int] = []
        unfinished = b""
        for are_bytes, run in itertools.groupby(ids, self.byte_of.__contains__):
            if not are_bytes:
                valid += run
                unfinished = b""
                continue
            decoder = codecs.getincrementaldecoder("utf-8")("ignore")
            characters = decoder.decode(bytes(self.byte_of[i] for i in run))
            valid += [id_of[byte] for byte in characters.encode()]
            unfinished, _ = decoder.getstate()
        text = self.engine.decode(valid, skip_special_tokens=True)
        return text + "\ufffd" if unfinished else text

    def save(self, folder: StrPath) -> None:
        """Write the files with which transformers and vLLM get these very ids.

        The chat template has the names of `persona.json`, if the folder has one.
        """
        folder = Path(folder)
        write_text(folder / "tokenizer.json", self.engine.to_str(pretty=True))
        base_config = read_json(self.folder / "tokenizer_config.json", {})
        config = {key: value for key, value in base_config.items() if key not in REPLACED_KEYS}
        tokens = {}
        for i, token in sorted(self.engine.get_added_tokens_decoder().items()):
            tokens[str(i)] = {key: getattr(token, key) for key in ADDED_TOKEN_KEYS}
        me, you = read_names(folder)
        config |= {
            "added_tokens_decoder": tokens,
            # with "LlamaTokenizer" transformers 5 would convert it again, to other ids
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": IM_END,
            "add_bos_token": self.bos is not None,
            "add_eos_token": False,
            "chat_template": chat_template(me, you, self.bos is not None),
        }
        if self.bos is not None:
            config["bos_token"] = self.engine.id_to_token(self.bos)
        write_json(folder / "tokenizer_config.json", config)


# --- names, and the chat template


def read_names(folder: StrPath) -> tuple[str, str]:
    """Return (me, the contact I talk to most) of a folder's `persona.json`, or plain names."""
    path = Path(folder) / "persona.json"
    persona = read_json(path, {})
    try:
        me, you = persona.get("me", "Me"), "Friend"
        if contacts := persona.get("contacts"):
            you = contacts[0]["name"]
        assert isinstance(me, str) and isinstance(you, str)
    except (AssertionError, LookupError, TypeError):
        hint = 'It is {"me": NAME, "contacts": [{"name": NAME}, …]}.'
        raise UserError(f"{path} holds no names", hint) from None
    return me, you


def unknown_name_warning(folder: StrPath, name: str | None) -> str:
    """Return a warning where `name` isn't in a folder's `persona.json`, else ""."""
    contacts = read_json(Path(folder) / "persona.json", {}).get("contacts", [])
    known = [contact.get("name") for contact in contacts]
    if not known or name in (None, *known):
        return ""
    more = " …" if len(known) > 5 else ""
    return f"({name} is none of those it talked to: {', '.join(known[:5])}{more})"


def chat_template(me: str, you: str, adds_bos: bool) -> str:
    """Return the Jinja template that joins turns, one dict each, as `data.render` does.

    `content` holds the `>>> ` lines, `name` the author.
    """
    names = ""
    for variable, name in (("me", me), ("you", you)):
        names += f"{{%- set {variable} = {json.dumps(name, ensure_ascii=False)} -%}}"
    bos = "{{- bos_token -}}" if adds_bos else ""
    author = '(m.name or (you if m.role == "user" else me if m.role == "assistant" else m.role))'
    newline = '("\\n" if add_generation_prompt or not loop.last else "")'
    turn = f'{{{{- "{IM_START}" + {author} + "\\n" + m.content + "{IM_END}" + {newline} -}}}}'
    prompt = f'{{{{- "{IM_START}" + me + "\\n>>>" -}}}}'
    return (
        f"{names}{bos}{{%- for m in messages -%}}{turn}{{%- endfor -%}}"
        f"{{%- if add_generation_prompt -%}}{prompt}{{%- endif -%}}"
    )


# --- folder → tokenizer


def load_tokenizer(folder: StrPath) -> Tokenizer:
    """Load `tokenizer.json`, else `tokenizer.model`, else `tekken.json` of a model folder.

    UserError when there is none, or it can't be used.
    """
    folder = Path(folder)
    paths = [
        *folder.glob("tokenizer.json"),
        *sorted(folder.glob("tokenizer.model*")),
        *folder.glob("tekken.json"),
    ]
    if not paths:
        raise UserError(
            f"{folder} has no tokenizer.json, no tokenizer.model and no tekken.json",
            "Copy the base model's tokenizer files there.",
        )
    path = paths[0]
    config = read_json(folder / "tokenizer_config.json", {})
    added = read_json(folder / "added_tokens.json", {})
    hint = "Copy the tokenizer files again from the base model."
    try:
        tokenizer = read_tokenizer(path, config, added)
        check_added_tokens(path, tokenizer, config)
        ids, _ = tokenizer.encode(f"{IM_START}{PROBE_TEXT}{IM_END}")
        tokenizer.decode(ids)
        first = ids[0] if tokenizer.bos is None else ids[1]
    except UserError:
        raise
    # tokenizers raises bare Exception, sentencepiece several kinds, and JSON may hold anything
    except Exception as error:
        reason = describe_file(path, error)
        raise UserError(
            f"{path} can't be read, with the .json files beside it: {reason}", hint
        ) from None
    if (first, ids[-1]) != (tokenizer.im_start, tokenizer.im_end):
        raise UserError(f"{path} cuts {IM_START} or {IM_END} into several tokens", hint)
    return tokenizer


def read_tokenizer(path: Path, config: dict, added: dict) -> Tokenizer:
    """Read a tokenizer file, with `tokenizer_config.json` and `added_tokens.json`."""
    bos = config.get("bos_token")
    bos = bos["content"] if isinstance(bos, dict) else bos
    if path.name == "tokenizer.json":
        engine = Engine.from_file(str(path))
    else:
        bos = bos or "<s>"
        is_tekken = path.suffix == ".json"
        engine = from_tekken(read_json(path)) if is_tekken else from_sentencepiece(path, added)
    adds_bos: bool | None = False
    if bos and engine.token_to_id(bos) is not None:
        adds_bos = config.get("add_bos_token")
        if adds_bos is None:  # then the post-processor decides
            adds_bos = engine.encode("x").ids[:1] == [engine.token_to_id(bos)]
    return Tokenizer(engine, path.parent, bos if adds_bos else None)


def check_added_tokens(path: Path, tokenizer: Tokenizer, config: dict) -> None:
    """UserError where tokenizer_config.json gives an id another spelling."""
    for key, token in config.get("added_tokens_decoder", {}).items():
        spelling, wanted = tokenizer.engine.id_to_token(int(key)), token["content"]
        is_ours = int(key) in tokenizer.added and wanted not in (IM_START, IM_END)
        if spelling not in (None, wanted) and not is_ours:
            raise UserError(
                f"{path}: id {key} is {spelling!r}, tokenizer_config.json makes it {wanted!r:.60}",
                "Copy all tokenizer files from one base model.",
            )


def find_merges(pieces: list[str]) -> list[tuple[str, str]]:
    """Return BPE's merges: all pairs of pieces that make a piece, in the order of the latter."""
    known = {*pieces}
    merges = []
    for piece in pieces:
        for cut in range(len(piece) - 1, 0, -1):
            if piece[:cut] in known and piece[cut:] in known:
                merges.append((piece[:cut], piece[cut:]))
    return merges


def set_bos(engine: Engine, bos: str) -> None:
    """Let the engine open every text with BOS when it adds special tokens."""
    ids = [(bos, engine.token_to_id(bos))]
    engine.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=ids)


def from_tekken(tekken: dict) -> Engine:
    """Convert Mistral's `tekken.json`, which is tiktoken's.

    Bytes merge in the order of the pieces, and a word that is a piece stays whole. Special tokens
    have the first ids.
    """
    count = tekken["config"]["default_num_special_tokens"]
    size = tekken["config"]["default_vocab_size"]
    listed = sorted(tekken.get("special_tokens") or [], key=lambda token: token["rank"])
    specials = [token["token_str"] for token in listed] or TEKKEN_SPECIALS
    specials = [*specials, *(f"<SPECIAL_{i}>" for i in range(len(specials), count))]
    # byte-level BPE writes printable bytes as themselves, the others as characters from 256 on
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = [ord(letter) for letter in alphabet if ord(letter) < 256]
    letters = dict(zip([*printable, *sorted({*range(256)} - {*printable})], alphabet))
    pieces = []
    for token in tekken["vocab"][: size - count]:
        pieces.append("".join(letters[byte] for byte in base64.b64decode(token["token_bytes"])))
    vocab = {token: i for i, token in enumerate([*specials, *pieces])}
    engine = byte_level_bpe(vocab, find_merges(pieces), tekken["config"]["pattern"], True)
    engine.add_special_tokens([special_token(spelling) for spelling in specials])
    set_bos(engine, "<s>")
    return engine


def byte_level_bpe(
    vocab: dict[str, int], merges: list[tuple], split: str | None, ignore_merges: bool
) -> Engine:
    """Build a byte-level BPE, as of GPT-2 and tiktoken, in `tokenizers`.

    `split`: the regex that cuts text before merging; None is GPT-2's, with each digit alone.
    `ignore_merges`: a word that is a token stays whole.
    """
    engine = Engine(models.BPE(vocab, merges, ignore_merges=ignore_merges))
    first = pre_tokenizers.Split(Regex(split), "isolated") if split else pre_tokenizers.Digits(True)
    to_letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split)
    engine.pre_tokenizer = pre_tokenizers.Sequence([first, to_letters])
    engine.decoder = decoders.ByteLevel()
    return engine


def sentencepiece_bpe(
    pieces: list[str], scores: list[float], mergeable: list[int], unk: str, prefix: bool = True
) -> Engine:
    """Build sentencepiece's BPE in `tokenizers`; `prefix`: a space goes before each text.

    sentencepiece merges, over and over, the adjacent pair whose union has the best score, the
    leftmost of equals. BPE merges by rank: the result is the same if the pairs are listed by the
    score of the piece that they make. Pieces that aren't mergeable are never made.
    """
    by_score = sorted(mergeable, key=lambda i: (-scores[i], i))
    merges = find_merges([pieces[i] for i in by_score])
    vocab = {piece: i for i, piece in enumerate(pieces)}
    engine = Engine(models.BPE(vocab, merges, unk_token=unk, byte_fallback=True, fuse_unk=True))
    normalizer: list[normalizers.Normalizer] = [normalizers.Replace(" ", "▁")]
    decoder = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        normalizer.insert(0, normalizers.Prepend("▁"))
        decoder.append(decoders.Strip(" ", 1, 0))
    engine.normalizer = normalizers.Sequence(normalizer)
    engine.decoder = decoders.Sequence(decoder)
    return engine


def from_sentencepiece(path: Path, added: dict[str, int]) -> Engine:
    """Convert a sentencepiece BPE model. `added`: {spelling: id} beyond the model's own pieces."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    hint = "Use a base with a tokenizer.json."
    probe = "Ａ ½  é\u0301 ﬁ"
    if model.normalize(probe).replace("▁", " ").strip() != probe:
        raise UserError(f"{path} normalizes text (NFKC), which no Mistral-style base does", hint)
    size = model.vocab_size()
    pieces = [model.id_to_piece(i) for i in range(size)]
    specials = [i for i in range(size) if model.is_control(i) or model.is_unknown(i)]
    fixed = {*specials, *(i for i in range(size) if model.is_byte(i) or model.is_unused(i))}
    mergeable = [i for i in range(size) if i not in fixed]
    scores = [model.get_score(i) for i in range(size)]
    engine = sentencepiece_bpe(pieces, scores, mergeable, pieces[model.unk_id()])
    if engine.encode(PROBE_TEXT).ids != model.encode(PROBE_TEXT):
        raise UserError(
            f"{path} is not a BPE model, or is damaged: converted, it gives other ids", hint
        )
    engine.add_special_tokens([special_token(pieces[i]) for i in specials])
    for spelling, i in sorted(added.items(), key=lambda item: item[1]):
        engine.add_special_tokens([special_token(spelling)])
        if engine.token_to_id(spelling) != i:
            raise UserError(
                f"added_tokens.json gives {spelling} the id {i}, but {path} has {size} pieces",
                "Copy both from one base model.",
            )
    set_bos(engine, pieces[model.bos_id()])
    return engine
