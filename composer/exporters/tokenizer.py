"""A tokenizer that puts virtual tokens in front of every text: new special tokens, post-processor and chat template.

tokenizer.json           added_tokens: k special ones; post_processor: they come before what it put there already
tokenizer_config.json    the class that takes tokenizer.json as it is, since others rebuild the post-processor
chat template            begins with the k tokens: what it makes is tokenised without the post-processor
added_tokens.json        where the folder has one

Nothing is loaded or run: these are edits of JSON files of the format that the tokenizers library documents.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from composer.errors import CorruptFileError, UnsupportedAdapterError
from composer.files import FileSet, read_json

__all__ = ["Tokenizer", "read_tokenizer"]

TOKENIZER, CONFIG = "tokenizer.json", "tokenizer_config.json"
TEMPLATE, ADDED = "chat_template.jinja", "added_tokens.json"
OTHERS = ("tokenizer.model", "spiece.model", "vocab.txt", "vocab.json", "tekken.json", "tiktoken.model")
NAME = "<|virtual-{}|>"
NAMED = re.compile(r"<\|virtual-(\d+)\|>")
GROUP = "<|virtual|>"  # of the post-processor's piece, which stands for all k tokens

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """A tokenizer's files, and the first id that it does not use."""

    files: FileSet
    content: Json
    size: int

    def with_virtual_tokens(self, count: int, *, token_types: bool) -> tuple[list[str], dict[str, bytes]]:
        """`count` more tokens with the ids from `size` on, in front of every text.

        token_types: whether the model reads token_type_ids. Returns the tokens and the changed files.
        Raises UnsupportedAdapterError for a post-processor that is not known.
        """
        taken = [
            int(found[1]) for token in self.content["added_tokens"] if (found := NAMED.fullmatch(token["content"]))
        ]
        first = max(taken, default=-1) + 1
        names = [NAME.format(first + index) for index in range(count)]
        ids = range(self.size, self.size + count)
        piece = {"id": GROUP, "ids": list(ids), "tokens": names}
        content = {
            **self.content,
            "added_tokens": [*self.content["added_tokens"], *map(_added_token, ids, names)],
            "post_processor": _prefixed(self.content.get("post_processor"), _unused(piece, self.content)),
        }
        files = {TOKENIZER: _encode(content)}
        config = read_json(self.files[CONFIG]) if CONFIG in self.files else {}
        files[CONFIG] = _encode(_tokenizer_config(config, "".join(names), ids, names, token_types=token_types))
        if TEMPLATE in self.files:
            files[TEMPLATE] = "".join(names).encode() + self.files[TEMPLATE].read_bytes()
        if ADDED in self.files:
            files[ADDED] = _encode({**read_json(self.files[ADDED]), **dict(zip(names, ids, strict=True))})
        return names, files


def read_tokenizer(files: FileSet) -> Tokenizer | None:
    """The tokenizer of a checkpoint; None where it has none.

    Raises UnsupportedAdapterError for one without tokenizer.json, CorruptFileError for a damaged one.
    """
    if TOKENIZER not in files:
        if other := next((name for name in OTHERS if name in files), None):
            raise UnsupportedAdapterError(
                f"the base's tokenizer has no {TOKENIZER}, so virtual tokens cannot be put in front of its texts",
                expected=TOKENIZER,
                found=other,
                remedy="load it with AutoTokenizer, save_pretrained beside the weights, and register the base anew",
            )
        return None
    content = read_json(files[TOKENIZER])
    try:
        vocabulary = content["model"]["vocab"]
        ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else range(len(vocabulary))
        content.setdefault("added_tokens", [])
        size = 1 + max([*ids, *(token["id"] for token in content["added_tokens"])], default=-1)
    except (AttributeError, KeyError, TypeError) as error:
        raise CorruptFileError(
            f"{TOKENIZER} has no vocabulary",
            expected="model.vocab and added_tokens",
            found=f"{type(error).__name__}: {error}",
            remedy="fetch it again",
        ) from None
    return Tokenizer(files, content, size)


def _added_token(number: int, name: str) -> Json:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": name, **flags, "special": True}


def _unused(piece: Json, content: Json) -> Json:
    """The piece under a name that no earlier one has: a composed model may be the base of another."""
    text = json.dumps(content.get("post_processor"))
    number = text.count(f'"id": "{GROUP[:-2]}')
    return piece if not number else {**piece, "id": f"{GROUP[:-2]}-{number}|>"}


def _prefixed(processor: Json | None, piece: Json) -> Json:
    """A post-processor that puts `piece` before what `processor` gives."""
    kind = processor["type"] if processor else None
    if processor is None:
        return _template(piece, [_sequence("A", 0)], [_sequence("A", 0), _sequence("B", 1)], {})
    if kind == "TemplateProcessing":
        return _template(piece, processor["single"], processor["pair"], processor["special_tokens"])
    if kind == "BertProcessing":
        begin, end, tokens = _ends(processor)
        single = [begin, _sequence("A", 0), end]
        second = [_sequence("B", 1), {"SpecialToken": {**end["SpecialToken"], "type_id": 1}}]
        return _template(piece, single, [*single, *second], tokens)
    if kind == "RobertaProcessing":
        begin, end, tokens = _ends(processor)
        single = [begin, _sequence("A", 0), end]
        template = _template(piece, single, [*single, end, _sequence("B", 0), end], tokens)
        offsets = {name: processor[name] for name in ("add_prefix_space", "trim_offsets")}
        return _chain([{"type": "ByteLevel", **offsets, "use_regex": True}, template])
    if kind == "Sequence":
        parts = list(processor["processors"])
        places = [index for index, part in enumerate(parts) if part["type"] != "ByteLevel"]
        if not places:
            return _chain([*parts, _prefixed(None, piece)])
        if len(places) == 1:
            parts[places[0]] = _prefixed(parts[places[0]], piece)
            return _chain(parts)
    if kind == "ByteLevel":
        return _chain([processor, _prefixed(None, piece)])
    raise UnsupportedAdapterError(
        f"{TOKENIZER}: virtual tokens cannot be put before what a post-processor of type {kind} gives",
        expected="TemplateProcessing, BertProcessing, RobertaProcessing, ByteLevel, or none",
        found=kind,
        remedy="export bundle or onnx, which leave the tokenizer alone",
    )


def _ends(processor: Json) -> tuple[Json, Json, Json]:
    """What BERT's and RoBERTa's processors put before and after a text, and the tokens as a template has them."""
    pieces, tokens = [], {}
    for token, number in (processor["cls"], processor["sep"]):
        pieces.append({"SpecialToken": {"id": token, "type_id": 0}})
        tokens[token] = {"id": token, "ids": [number], "tokens": [token]}
    return pieces[0], pieces[1], tokens


def _sequence(name: str, kind: int) -> Json:
    return {"Sequence": {"id": name, "type_id": kind}}


def _template(piece: Json, single: list[Json], pair: list[Json], tokens: Mapping[str, Json]) -> Json:
    before = {"SpecialToken": {"id": piece["id"], "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [before, *single],
        "pair": [before, *pair],
        "special_tokens": dict(sorted({**tokens, piece["id"]: piece}.items())),
    }


def _chain(parts: list[Json]) -> Json:
    return {"type": "Sequence", "processors": parts}


def _tokenizer_config(config: Json, text: str, ids: range, names: list[str], *, token_types: bool) -> Json:
    """tokenizer_config.json with the class that reads tokenizer.json alone, and the chat template begun by `text`."""
    changed = {key: value for key, value in config.items() if key not in ("add_bos_token", "add_eos_token", "backend")}
    changed["tokenizer_class"] = "PreTrainedTokenizerFast"
    inputs = ["input_ids", *(["token_type_ids"] if token_types else []), "attention_mask"]
    changed.setdefault("model_input_names", inputs)
    if isinstance(changed.get("added_tokens_decoder"), dict):
        tokens = {str(number): {**_added_token(number, name)} for number, name in zip(ids, names, strict=True)}
        changed["added_tokens_decoder"] = {
            **changed["added_tokens_decoder"],
            **{key: {name: value for name, value in token.items() if name != "id"} for key, token in tokens.items()},
        }
    template = changed.get("chat_template")
    if isinstance(template, str):
        changed["chat_template"] = text + template
    elif isinstance(template, list):
        changed["chat_template"] = [{**each, "template": text + each["template"]} for each in template]
    return changed


def _encode(value: Json) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
