"""Added and special tokens: tokenizer_config.json, and the older special_tokens_map.json and added_tokens.json.

Which file wins is transformers' rule: the older two are read only if tokenizer_config.json has no added_tokens_decoder,
and then special_tokens_map.json replaces what tokenizer_config.json says of the same name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Vocabulary

from lorayard.shared.errors import ModelError

from ..files import JsonFile

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""The names that every template sees, in the order in which missing ones are added to the vocabulary."""
FLAGS = ("lstrip", "rstrip", "normalized", "single_word", "special")
MAX_TOKENS = 1 << 22
"""Far more than any vocabulary has; the library spends memory on ids that have no token."""


@dataclass(slots=True)
class SpecialTokens:
    """named: by name, as `bos_token`. extra: special without a name. added: other entries of the vocabulary, by id.

    older: `added` comes from added_tokens.json, which knows less than tokenizer.json.
    """

    named: dict[str, AddedToken] = field(default_factory=dict)
    extra: list[AddedToken] = field(default_factory=list)
    added: dict[int, AddedToken] = field(default_factory=dict)
    older: bool = False

    @property
    def texts(self) -> dict[str, str]:
        """The named tokens as a template sees them."""
        return {name: self.named[name].content for name in NAMES if name in self.named}

    def add_to(self, vocabulary: Vocabulary) -> None:
        """Make them tokens that the vocabulary never splits; one that it lacks gets the next free id."""
        present = vocabulary.get_added_tokens_decoder()
        tokens = [token for id, token in sorted(self.added.items()) if not (self.older and id in present)]
        known = {token.content for token in (*present.values(), *tokens)}
        named = [*(self.named[name] for name in NAMES if name in self.named), *self.named.values()]
        for token in (*named, *self.extra):
            if token.content not in known:
                tokens.append(token)
                known.add(token.content)
        names = {token.content for token in named}
        for token in tokens:
            token.special = token.special or token.content in names
        vocabulary.add_tokens(tokens)


def read_special(folder: Path, config: Mapping[str, Any]) -> SpecialTokens:
    """What the folder says of its tokens; config: its tokenizer_config.json. Raises ModelError."""
    where = folder / "tokenizer_config.json"
    tokens = SpecialTokens()
    _take_named(tokens, config, where)
    if "added_tokens_decoder" in config:
        listed = config["added_tokens_decoder"]
        if not isinstance(listed, dict) or len(listed) > MAX_TOKENS:
            raise ModelError(f"{where}: added_tokens_decoder must map ids to tokens")
        tokens.added = {_id(id, where): _token(entry, where, False) for id, entry in listed.items()}
    else:
        _take_older(tokens, folder)
    by_text = {token.content: token for token in tokens.added.values()}
    tokens.named = {name: by_text.get(token.content, token) for name, token in tokens.named.items()}
    return tokens


def _take_named(tokens: SpecialTokens, config: Mapping[str, Any], where: Path) -> None:
    """Add `NAMES`, other names that end in `_token`, and the lists of unnamed ones."""
    others = sorted(name for name in config if name.endswith("_token") and name not in NAMES)
    for name in (*NAMES, *others):
        value = config.get(name)
        if isinstance(value, str | dict):
            tokens.named[name] = _token(value, where, True)
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    if isinstance(extra, dict):
        tokens.named |= {str(name): _token(value, where, True) for name, value in extra.items()}
    elif isinstance(extra, list):
        tokens.extra = [_token(value, where, True) for value in extra] or tokens.extra
    else:
        raise ModelError(f"{where}: the special tokens must be a list or a map")


def _take_older(tokens: SpecialTokens, folder: Path) -> None:
    """Add what special_tokens_map.json and added_tokens.json say."""
    where = folder / "special_tokens_map.json"
    _take_named(tokens, read_json(where), where)
    where, tokens.older = folder / "added_tokens.json", True
    special = {token.content for token in (*tokens.named.values(), *tokens.extra)}
    for text, id in read_json(where).items():
        tokens.added[_id(id, where)] = _token(text, where, text in special)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON map, empty if there is no such file. Raises ModelError."""
    return JsonFile(file, ModelError).data if file.is_file() else {}


def is_text(value: str) -> bool:
    """Whether UTF-8 can spell it: JSON lets halves of surrogate pairs through."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _id(value: Any, where: Path) -> int:
    text = str(value)
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise ModelError(f"{where}: {text[:40]!r} is not the id of a token")
    return int(text)


def _token(value: Any, where: Path, special: bool) -> AddedToken:
    """A token from its text, or from a map with `content` and flags."""
    content = value.get("content") if isinstance(value, dict) else value
    if not isinstance(content, str) or not is_text(content):
        raise ModelError(f"{where}: a special token must be text or a map with content, not {str(value)[:60]!r}")
    flags = {name: value[name] for name in FLAGS if name in value} if isinstance(value, dict) else {}
    if not all(isinstance(flag, bool) for flag in flags.values()):
        raise ModelError(f"{where}: the flags of token {content[:60]!r} must be true or false")
    return AddedToken(content, **{"special": special} | flags)
