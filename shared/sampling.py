"""How the next token is drawn: every setting, checked and frozen."""

from __future__ import annotations

from dataclasses import dataclass, fields
from operator import attrgetter, is_
from typing import Any

from .errors import Refused, UsageError


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is drawn. The defaults alter nothing: plain sampling at temperature 1.

    What each setting does, its formula and its source stand with its step in `worker/generate/`: `penalties.py`,
    `mask.py` and `filters.py`; their order in `sampler.py`. In short:

    temperature: logits are divided by it; 0 is greedy (the lowest id wins a tie). temperature_last: after the filters
    instead of before. min_temp, max_temp, temp_exponent: dynamic temperature, if max_temp > min_temp.
    smoothing_factor, smoothing_curve: quadratic sampling. top_k, top_p, top_a, min_p, tfs, typical: filters; 0 (for
    top_p, tfs and typical 1) keeps all. mirostat (version 2), mirostat_tau, mirostat_eta. xtc_probability,
    xtc_threshold, xtc_ignore: ids that XTC leaves alone, None for the default. skew: above 0 towards unlikely tokens.
    repetition_penalty: of tokens in prompt and text. frequency_penalty, presence_penalty: of tokens in the text.
    repetition_range, repetition_decay: how many tokens back penalties reach in full (-1: all), and over how many more
    they fade. dry_multiplier (0: off), dry_base, dry_allowed_length, dry_range (0: all), dry_max_ngram, dry_breakers:
    ids that end a sequence, None for the default.
    logit_bias: (id, what is added to its logit). allowed_tokens: the only ids that may come. banned_tokens: those
    that may not. seed: 64 bits; None draws one when the job is accepted.

    Raises Refused("bad_field") naming the field.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    temperature_last: bool = False
    min_temp: float = 0.0
    max_temp: float = 0.0
    temp_exponent: float = 1.0
    smoothing_factor: float = 0.0
    smoothing_curve: float = 1.0
    top_a: float = 0.0
    tfs: float = 1.0
    typical: float = 1.0
    mirostat: bool = False
    mirostat_tau: float = 1.5
    mirostat_eta: float = 0.1
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    xtc_ignore: tuple[int, ...] | None = None
    skew: float = 0.0
    repetition_range: int = -1
    repetition_decay: int = 0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_range: int = 0
    dry_max_ngram: int = 20
    dry_breakers: tuple[int, ...] | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_tokens: tuple[int, ...] | None = None
    banned_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for (name, (low, high)), value, default in zip(
            SAMPLING_RANGES.items(), _numbers(self), _NUMBER_DEFAULTS, strict=True
        ):
            if value is default:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                raise Refused("bad_field", f"{name} must be between {low:g} and {high:g}, not {value!r}")
            if isinstance(low, int) and not isinstance(value, int):
                raise Refused("bad_field", f"{name} must be a whole number, not {value!r}")
        if self.seed is not None and (type(self.seed) is not int or not 0 <= self.seed < 1 << 64):
            raise Refused("bad_field", f"seed must be a whole number between 0 and 2^64-1, not {self.seed!r}")
        if not all(map(is_, _later(self), _LATER_DEFAULTS)):
            self._check_flags()
            self._check_tokens()

    def _check_flags(self) -> None:
        for name in ("temperature_last", "mirostat"):
            if type(getattr(self, name)) is not bool:
                raise Refused("bad_field", f"{name} must be true or false, not {getattr(self, name)!r}")

    def _check_tokens(self) -> None:
        for name, ids in self.token_fields().items():
            wrong = next((id for id in ids if type(id) is not int or id < 0), None)
            if wrong is not None:
                raise Refused("bad_field", f"{name} must name tokens by their ids, not {wrong!r}")
        for id, bias in self.logit_bias:
            if isinstance(bias, bool) or not isinstance(bias, int | float) or not abs(bias) <= MAX_BIAS:
                raise Refused("bad_field", f"logit_bias of {id} must be at most {MAX_BIAS} either way, not {bias!r}")
        if self.allowed_tokens is not None and not set(self.allowed_tokens) - set(self.banned_tokens):
            raise Refused("bad_field", "allowed_tokens must leave a token that is not among banned_tokens")

    def token_fields(self) -> dict[str, tuple[int, ...]]:
        """The token ids in every field that has some."""
        return {
            "logit_bias": tuple(id for id, _ in self.logit_bias), "allowed_tokens": self.allowed_tokens or (),
            "banned_tokens": self.banned_tokens, "xtc_ignore": self.xtc_ignore or (),
            "dry_breakers": self.dry_breakers or (),
        }  # fmt: skip

    @classmethod
    def preset(cls, name: str, **changes: Any) -> SamplingParams:
        """The defaults of another engine (`PRESETS`), with changes. Raises UsageError for an unknown name."""
        if name not in PRESETS:
            raise UsageError(f"there is no preset {name!r}; there are: {', '.join(PRESETS)}")
        return cls(**PRESETS[name] | changes)


MAX_BIAS = 1000
WHOLE = 1 << 31

SAMPLING_RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0.0, 100.0),
    "top_k": (0, WHOLE),
    "top_p": (1e-6, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
    "frequency_penalty": (-100.0, 100.0),
    "presence_penalty": (-100.0, 100.0),
    "min_temp": (0.0, 100.0),
    "max_temp": (0.0, 100.0),
    "temp_exponent": (0.01, 100.0),
    "smoothing_factor": (0.0, 100.0),
    "smoothing_curve": (1.0, 3.0),
    "top_a": (0.0, 1.0),
    "tfs": (1e-6, 1.0),
    "typical": (1e-6, 1.0),
    "mirostat_tau": (0.0, 100.0),
    "mirostat_eta": (0.0, 10.0),
    "xtc_probability": (0.0, 1.0),
    "xtc_threshold": (0.0, 1.0),
    "skew": (-10.0, 10.0),
    "repetition_range": (-1, WHOLE),
    "repetition_decay": (0, WHOLE),
    "dry_multiplier": (0.0, 100.0),
    "dry_base": (1.0, 4.0),
    "dry_allowed_length": (1, 50),
    "dry_range": (0, WHOLE),
    "dry_max_ngram": (1, 50),
}
"""Inclusive range of every number in `SamplingParams` but the seed; a range of ints is one of whole numbers."""

PRESETS: dict[str, dict[str, Any]] = {
    "neutral": {},
    "exllamav2": {"temperature": 0.8, "top_k": 50, "top_p": 0.8, "repetition_penalty": 1.025},
    "vllm": {},
}
"""What other engines do with a request that asks for nothing: ExLlamaV2Sampler.Settings() and vLLM's SamplingParams().

ExLlamaV2's top_p leaves out the token that crosses p; ours keeps it, as Holtzman 2019 has it.
"""

_DEFAULTS = {field.name: field.default for field in fields(SamplingParams)}
FIRST_FIELDS = list(_DEFAULTS)[:8]
"""The fields that a packed request always has; later ones are there only if they are set."""

# Most requests set little of this, so what is the default is passed over, and read many at a time.
_LATER_FIELDS = list(_DEFAULTS)[8:]
_LATER_DEFAULTS = [_DEFAULTS[name] for name in _LATER_FIELDS]
_NUMBER_DEFAULTS = [_DEFAULTS[name] for name in SAMPLING_RANGES]
_first, _later, _numbers = attrgetter(*FIRST_FIELDS), attrgetter(*_LATER_FIELDS), attrgetter(*SAMPLING_RANGES)


def packed(params: SamplingParams) -> dict[str, Any]:
    """The parameters as a request stores them."""
    values = dict(zip(FIRST_FIELDS, _first(params), strict=True))
    later = zip(_LATER_FIELDS, _later(params), _LATER_DEFAULTS, strict=True)
    return values | {name: value for name, value, default in later if value is not default and value != default}
