"""What the tokens of a vocabulary say, for the settings that are told in text and act on ids."""

from __future__ import annotations

from functools import cached_property

from ..text.tokenizer import Tokenizer

BREAKERS = frozenset('.,!?<>[](){}\n\t"')
"""Characters that end a sequence for DRY by default (ExLlamaV2's)."""


class Words:
    """Texts of all tokens, decoded when first asked for (about a second for 128,000)."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    @cached_property
    def texts(self) -> list[str]:
        """What each token adds to a text that has begun: "" for those that are no text, U+FFFD for half a character."""
        decode, ids = self._tokenizer.decode, range(self._tokenizer.vocab_size)
        before = next((id for id in ids if decode([id]).isalnum()), 0)
        start = len(decode([before]))
        return [decode([before, id])[start:] for id in ids]

    @cached_property
    def breakers(self) -> frozenset[int]:
        """What no run of DRY goes over by default: punctuation, brackets, line ends, and tokens that are no text."""
        return frozenset(id for id, text in enumerate(self.texts) if not text or BREAKERS.intersection(text))

    @cached_property
    def line_ends(self) -> frozenset[int]:
        """What XTC leaves alone by default: tokens with a line end, and those that are no text, as end tokens are."""
        return frozenset(id for id, text in enumerate(self.texts) if not text or "\n" in text)

    def healing(self, prompt: tuple[int, ...]) -> frozenset[int]:
        """The tokens whose text begins with that of the prompt's last one; none if it cannot be healed."""
        last = self.texts[prompt[-1]] if prompt[-1] < len(self.texts) else ""
        if len(prompt) < 2 or not last or "\N{REPLACEMENT CHARACTER}" in last:
            return frozenset()
        return frozenset(id for id, text in enumerate(self.texts) if text.startswith(last))
