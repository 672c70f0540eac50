"""A foreign folder's tokenizer as `transformers` makes it, as the content of one tokenizer.json.

AutoTokenizer does not just open tokenizer.json: the class that the folder's configs name may build its own normalizer,
pre-tokenizer and decoder around the file's vocabulary, make all of it out of a tokenizer.model, vocab.json or a file of
tiktoken ranks, and then adds the tokens of tokenizer_config.json (or added_tokens.json and special_tokens_map.json) and
a begin and end mark. Which ids a prompt gets depends on all of it. `settle` does the same steps, without that library.

Source: transformers 5.23 (tokenization_utils_tokenizers.py, models/auto/tokenization_auto.py, CLASSES).
"""

import base64
import binascii
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from llm.errors import UserError
from llm.tokenizers.base import META_SPACE
from llm.tokenizers.sentencepiece_model import CONTROL, UNIGRAM, USER_DEFINED, SentencePieceModel, read_sentencepiece
from llm.tokenizers.tokenizer_json import Component, added, document_of, merges_of, ranks_document, template

Settings = Mapping[str, Any]

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
CLASS_OF_MODEL = {
    "gemma": "GemmaTokenizer",
    "gemma2": "GemmaTokenizer",
    "gpt2": "GPT2Tokenizer",
    "gpt_neox": "GPTNeoXTokenizer",
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
    "qwen3_moe": "Qwen2Tokenizer",
    "mistral": "TokenizersBackend",
    "mixtral": "TokenizersBackend",
    "olmo2": "TokenizersBackend",
}
"""The class that belongs to a model_type; for llama and llama4 none does."""
CLASS_NOT_TRUSTED = ("qwen2",)
"""model_types whose own class is used whatever tokenizer_config.json names."""
TAKEN_AS_THEY_STAND = ("TokenizersBackend", "PreTrainedTokenizer", "PythonBackend", "BloomTokenizer")
"""Classes that change nothing in a tokenizer.json."""
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")


@dataclass(frozen=True)
class TokenizerClass:
    """How a class of transformers builds a tokenizer around a vocabulary.

    build: the tokenizer of an empty vocabulary. marks: names of special tokens where no file says. vocab_files: of a
    folder without tokenizer.json. marks_are_added: its special tokens become added tokens in any case. begins: it is
    documented to put a begin mark first.
    """

    build: Callable[[Settings], tokenizers.Tokenizer]
    marks: dict[str, str]
    vocab_files: tuple[str, ...] = ("tokenizer.model",)
    marks_are_added: bool = False
    sets_marks: bool = False
    begins: bool = False


def _llama(settings: Settings) -> tokenizers.Tokenizer:
    found = tokenizers.Tokenizer(models.BPE(fuse_unk=True, byte_fallback=True))
    prefix = settings.get("add_prefix_space")
    adds = True if prefix is None else bool(prefix)
    scheme = ("always" if settings.get("legacy", False) else "first") if adds else "never"
    found.pre_tokenizer = pre_tokenizers.Metaspace(replacement=META_SPACE, prepend_scheme=scheme, split=False)
    parts = [decoders.Replace(META_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    found.decoder = decoders.Sequence(parts + [decoders.Strip(content=" ", left=1)] * adds)
    return found


def _gemma(settings: Settings) -> tokenizers.Tokenizer:
    unknown = str(_content(settings.get("unk_token", "<unk>")))
    found = tokenizers.Tokenizer(models.BPE(fuse_unk=True, byte_fallback=True, unk_token=unknown))
    found.normalizer = normalizers.Replace(" ", META_SPACE)
    found.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    found.decoder = decoders.Sequence([decoders.Replace(META_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return found


def _gpt2(settings: Settings) -> tokenizers.Tokenizer:
    found = tokenizers.Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix=""))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(settings.get("add_prefix_space", False)))
    found.decoder = decoders.ByteLevel()
    return found


def _gpt_neox(settings: Settings) -> tokenizers.Tokenizer:
    found = _gpt2(settings)
    found.normalizer = normalizers.NFC()
    return found


def _qwen2(settings: Settings) -> tokenizers.Tokenizer:
    found = _gpt2(settings)
    found.normalizer = normalizers.NFC()
    prefix = bool(settings.get("add_prefix_space") or False)
    split = pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated", invert=False)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)
    found.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    return found


_GPT2_MARKS = {key: "<|endoftext|>" for key in ("bos_token", "eos_token", "unk_token")}
_GEMMA_MARKS = {f"{key}_token": f"<{key}>" for key in ("bos", "eos", "unk", "pad", "mask")}
CLASSES = {
    "LlamaTokenizer": TokenizerClass(
        _llama, {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}, begins=True
    ),
    "GemmaTokenizer": TokenizerClass(_gemma, _GEMMA_MARKS, begins=True),
    "GPT2Tokenizer": TokenizerClass(_gpt2, _GPT2_MARKS, ("vocab.json", "merges.txt")),
    "GPTNeoXTokenizer": TokenizerClass(
        _gpt_neox, {**_GPT2_MARKS, "pad_token": "<|padding|>"}, ("vocab.json", "merges.txt"), sets_marks=True
    ),
    "Qwen2Tokenizer": TokenizerClass(
        _qwen2,
        {key: "<|endoftext|>" for key in ("eos_token", "unk_token", "pad_token")},
        ("vocab.json", "merges.txt"),
        marks_are_added=True,
    ),
}


@dataclass(frozen=True)
class Settled:
    """A tokenizer as AutoTokenizer has it.

    document: the content of its tokenizer.json. marks: the names of its special tokens (bos_token, ...). changed: text
    becomes other ids than by the folder's own tokenizer.json; also True where there is none.
    """

    document: Component
    marks: dict[str, str]
    changed: bool
    splits_special: bool = False


def settle(path: Path) -> Settled | None:
    """The tokenizer of a folder; None where transformers finds none, or only one that Lattice reads by other rules
    (a SentencePiece model without a tokenizer_config.json, Meta's folders). UserError when a file is damaged."""
    try:
        return _settle(path)
    except UserError:
        raise
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise UserError(f"{path}: its tokenizer's files make no sense: {type(error).__name__}: {error}") from None


def _settle(path: Path) -> Settled | None:
    if not any((path / name).is_file() for name in ("config.json", "tokenizer_config.json", "tokenizer.json")):
        return None
    settings = read_json(path / "tokenizer_config.json")
    known = CLASSES.get(class_name(path, settings))
    own = path / "tokenizer.json"
    if own.is_file():
        return _from_json(own, settings, known, path)
    if (model := path / "tokenizer.model").is_file():
        if not settings and (known is None or not known.begins):
            return None
        return _from_model(model, settings, known, path)
    if known is not None and all((path / file).is_file() for file in known.vocab_files):
        return _from_vocab(path, settings, known)
    return None


def class_name(path: Path, settings: Settings) -> str:
    """Which class AutoTokenizer takes, without "Fast": one of CLASSES, or another, which takes tokenizer.json as it
    stands (TokenizersBackend, PreTrainedTokenizer) or is read so here."""
    config = read_json(path / "config.json")
    kind = str(config.get("model_type", ""))
    named = settings.get("tokenizer_class") or config.get("tokenizer_class")
    named = named.removesuffix("Fast") if isinstance(named, str) else None
    registered = CLASS_OF_MODEL.get(kind)
    trusted = kind not in CLASS_NOT_TRUSTED
    if named == "LlamaTokenizer" and trusted and _says_byte_level(path / "tokenizer.json"):
        return "TokenizersBackend"
    if named is not None and registered is not None and registered != named:
        if registered == "TokenizersBackend":
            return registered
        return named if trusted else registered
    return named or registered or "TokenizersBackend"


def _says_byte_level(file: Path) -> bool:
    try:
        return b'"ByteLevel"' in file.read_bytes()
    except OSError:
        return False


def _from_json(file: Path, settings: Settings, known: TokenizerClass | None, path: Path) -> Settled:
    document = read_json(file, strict=True)
    model = document.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict | list):
        raise UserError(f"{file}: not a tokenizer.json, or damaged (no vocabulary)")
    document.setdefault("added_tokens", [])
    own, post = document["added_tokens"], document.get("post_processor")
    known = known if isinstance(model["vocab"], dict) else None
    rebuilt = dict(document) if known is None else _around(known, settings, model["vocab"], model.get("merges", []))
    given = {key: value for key, value in settings.items() if key not in ("add_bos_token", "add_eos_token")}
    rebuilt["post_processor"] = None if known is not None and known.sets_marks else post
    found = _finish(rebuilt, given, known, path, from_file=own)
    before, after = (
        {k: v for k, v in d.items() if k in ("normalizer", "pre_tokenizer", "model")}
        for d in (document, found.document)
    )
    same_model = _meaning(before) == _meaning(after)
    changed = not same_model or _by_id(own) != _by_id(found.document["added_tokens"])
    return Settled(found.document, found.marks, changed, found.splits_special)


def _meaning(parts: Component) -> Component:
    """What decides the ids, without keys whose absence means their default."""
    model = parts["model"]
    defaults = {"unk_token": None, "byte_fallback": False, "ignore_merges": False, "fuse_unk": False, "dropout": None}
    options = {key: model.get(key) or default for key, default in defaults.items()}
    affixes = {key: model.get(key) or "" for key in ("continuing_subword_prefix", "end_of_word_suffix")}
    if not options["byte_fallback"] and options["unk_token"] is None:
        options.pop("fuse_unk")
    pre = json.dumps(parts.get("pre_tokenizer"), sort_keys=True).replace(
        '"trim_offsets": false', '"trim_offsets": true'
    )
    return {"options": options, "affixes": affixes, "normalizer": parts.get("normalizer"), "pre_tokenizer": pre}


def _by_id(added: Iterable[Component]) -> dict[int, Component]:
    return {int(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in added}


def _from_model(file: Path, settings: Settings, known: TokenizerClass | None, path: Path) -> Settled:
    content = file.read_bytes()
    ranks = _tiktoken_ranks(content)
    if ranks is not None:
        return _from_ranks(ranks, settings, known, path)
    proto = read_sentencepiece(content, str(file))
    extras = [added(text, special=kind == CONTROL) for text, _, kind in proto.pieces if kind in (CONTROL, USER_DEFINED)]
    merged = {**settings}
    if not merged.get("extra_special_tokens") and not merged.get("additional_special_tokens"):
        merged["extra_special_tokens"] = extras
    if known is None:
        document = _backend_of_sentencepiece(proto, settings)
        for role, (text, number) in proto.marks.items():
            if number >= 0:
                merged.setdefault(f"{role}_token", text)
    else:
        vocab = {text: number for number, (text, _, _) in enumerate(proto.pieces)}
        document = _around(known, settings, vocab, merges_of(vocab))
    begins = known is None or known.begins
    if "add_bos_token" not in settings and begins:  # as these classes are documented, and were before version 5
        merged["add_bos_token"] = True
    return _finish(document, merged, known, path)


def _backend_of_sentencepiece(proto: SentencePieceModel, settings: Settings) -> Component:
    """Without a class of its own a SentencePiece model is read without its space before the text."""
    if proto.model_type == UNIGRAM:
        scores = [(text, score) for text, score, _ in proto.pieces]
        model = models.Unigram(scores, unk_id=proto.marks["unk"][1], byte_fallback=proto.byte_fallback)
        document = document_of(tokenizers.Tokenizer(model))
    else:
        vocab = {text: number for number, (text, _, _) in enumerate(proto.pieces)}
        merges = merges_of(vocab)
        name_of = {number: text for text, number in vocab.items()}
        for number, token in (settings.get("added_tokens_decoder") or {}).items():
            current, new = name_of.get(int(number)), _content(token)
            if current and isinstance(new, str) and current != new and new not in vocab:
                vocab[new] = vocab.pop(current)
        made = models.BPE(fuse_unk=True, byte_fallback=proto.byte_fallback, unk_token=proto.marks["unk"][0])
        document = document_of(tokenizers.Tokenizer(made))
        document["model"] |= {"vocab": vocab, "merges": merges}
    replace = normalizers.Replace(" ", META_SPACE)
    parts = ([normalizers.Precompiled(proto.charsmap)] if proto.charsmap else []) + [replace]
    shown: list[decoders.Decoder] = [decoders.Replace(META_SPACE, " ")]
    shown += [decoders.ByteFallback(), decoders.Fuse()] if proto.byte_fallback else []
    shell = tokenizers.Tokenizer(models.BPE())
    shell.normalizer, shell.decoder = normalizers.Sequence(parts), decoders.Sequence(shown)
    made_of = document_of(shell)
    return {**document, "normalizer": made_of["normalizer"], "decoder": made_of["decoder"]}


def _from_ranks(ranks: Mapping[bytes, int], settings: Settings, known: TokenizerClass | None, path: Path) -> Settled:
    """A file of tiktoken ranks is read with Llama 3's pattern, whosesoever it is."""
    named = {
        int(number): str(_content(token)) for number, token in (settings.get("added_tokens_decoder") or {}).items()
    }
    listed = settings.get("extra_special_tokens") or []
    extras = [str(_content(token)) for token in listed]
    if named and max(named) >= len(ranks):
        names = [named.get(number, f"<|reserved_token_{number}|>") for number in range(len(ranks), max(named) + 1)]
        extras = names + [name for name in extras if name not in set(names)]
    document = ranks_document(ranks, LLAMA3_PATTERN, extras)
    return _finish(document, settings, known, path)


def _from_vocab(path: Path, settings: Settings, known: TokenizerClass) -> Settled:
    vocab = read_json(path / "vocab.json", strict=True)
    lines = (path / "merges.txt").read_text(encoding="utf-8").splitlines()
    merges = [line.split() for line in lines if line and not line.startswith("#version")]
    return _finish(_around(known, settings, vocab, merges), settings, known, path)


def _around(known: TokenizerClass, settings: Settings, vocab: Component, merges: Any) -> Component:
    document = document_of(known.build(settings))
    document["model"] |= {"vocab": vocab, "merges": merges}
    return document


def _finish(
    document: Component,
    settings: Settings,
    known: TokenizerClass | None,
    path: Path,
    from_file: Iterable[Component] = (),
) -> Settled:
    """Add the tokens that the folder's other files name, and what the post-processor puts around a text."""
    settings, listed = _with_legacy_files({**settings}, path, from_file)
    defaults = known.marks if known is not None else {}
    marks: dict[str, Any] = {**defaults}
    marks |= {key: settings[key] for key in NAMED if key in settings}
    marks |= {
        key: value
        for key, value in settings.items()
        if key.endswith("_token") and key not in NAMED and isinstance(value, str | dict)
    }
    by_content = {token["content"]: token for token in listed.values()}
    extras = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    if isinstance(extras, dict):
        marks |= extras
        extras = []
    named = {
        key: by_content.get(str(_content(value)), value)
        for key, value in marks.items()
        if isinstance(_content(value), str)
    }
    adding = [listed[number] for number in sorted(listed)]
    taken = {token["content"] for token in (*document["added_tokens"], *adding)}
    for value in (*named.values(), *extras):
        content = _content(value)
        if isinstance(content, str) and content and content not in taken:
            adding.append(_as_added(value))
            taken.add(content)
    names = {str(_content(value)) for value in named.values()}
    adding = [{**token, "special": token["special"] or token["content"] in names} for token in adding]
    if known is not None and known.marks_are_added:
        adding += [added(name) for name in names]
    document = {**document, "added_tokens": _with_added(document, adding)}
    stated = "add_bos_token" in settings or "add_eos_token" in settings
    if stated or document.get("post_processor") is None:
        document["post_processor"] = _template(document, settings, named)
    resolved = {key: str(_content(value)) for key, value in named.items()}
    return Settled(document, resolved, True, bool(settings.get("split_special_tokens", False)))


def _with_legacy_files(
    settings: Component, path: Path, from_file: Iterable[Component]
) -> tuple[Component, dict[int, Component]]:
    """The settings, and the added tokens by id: those of tokenizer_config.json, else of the files that older versions
    wrote."""
    listed: dict[int, Component] = {}
    if "added_tokens_decoder" in settings:
        for number, token in (settings["added_tokens_decoder"] or {}).items():
            listed[int(number)] = _as_added(token)
        return settings, listed
    settings |= read_json(path / "special_tokens_map.json")
    special = {str(_content(settings[key])) for key in NAMED if settings.get(key)}
    extras = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    special |= {str(_content(token)) for token in extras}
    for content, number in read_json(path / "added_tokens.json").items():
        if isinstance(number, int):
            listed[number] = added(content, special=content in special, normalized=content not in special)
    for token in from_file:
        listed[int(token["id"])] = {key: value for key, value in token.items() if key != "id"}
    return settings, listed


def _with_added(document: Component, adding: Iterable[Component]) -> list[Component]:
    """The document's added tokens and more, with the ids that the tokenizers library gives them."""
    vocab = document["model"]["vocab"]
    id_of = vocab if isinstance(vocab, dict) else {entry[0]: number for number, entry in enumerate(vocab)}
    found = {token["content"]: dict(token) for token in document["added_tokens"]}
    for token in adding:
        known = found.get(token["content"], {}).get("id", id_of.get(token["content"]))
        if known is None:
            known = max([len(id_of) - 1, *(other["id"] for other in found.values())]) + 1
        found[token["content"]] = {"id": known, **token}
    return sorted(found.values(), key=lambda token: int(token["id"]))


def _template(document: Component, settings: Settings, named: Settings) -> Component | None:
    """The post-processor that puts the begin and end marks where the settings say so."""
    ids = {token["content"]: token["id"] for token in document["added_tokens"]}
    before: list[str] = []
    after: list[str] = []
    for key, where in (("bos", before), ("eos", after)):
        name = _content(named.get(f"{key}_token"))
        if settings.get(f"add_{key}_token") and name in ids:
            where.append(name)
    return template(before, after, {name: ids[name] for name in (*before, *after)})


def _as_added(token: Any) -> Component:
    """A token as the configs write it, a name or a mapping, as an entry of added_tokens."""
    if not isinstance(token, dict):
        return added(str(token))
    special = bool(token.get("special", False))
    plain = added(str(token.get("content")), special, normalized=bool(token.get("normalized", not special)))
    return plain | {key: bool(token[key]) for key in ("single_word", "lstrip", "rstrip") if key in token}


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _tiktoken_ranks(content: bytes) -> dict[bytes, int] | None:
    """The ranks of a tiktoken file; None when it is none."""
    found: dict[bytes, int] = {}
    for line in content.splitlines():
        try:
            token, rank = line.split()
            found[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            return None
    return found or None


def read_json(file: Path, strict: bool = False) -> Component:
    """The object in a JSON file; {} where there is none. UserError when it is damaged, or missing if `strict`."""
    try:
        found = json.loads(file.read_bytes())
    except OSError as error:
        if strict:
            raise UserError(f"{file}: {error.strerror or error}") from None
        return {}
    except (ValueError, RecursionError):
        raise UserError(f"{file}: damaged: not JSON") from None
    if not isinstance(found, dict):
        raise UserError(f"{file}: damaged: not a JSON object")
    return found
