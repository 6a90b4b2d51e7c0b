"""The error tree. Each error is one sentence for a person, with a wire code and an exit status.

LorayardError                exit 1
├── Refused                  a job at fault, with its code on the wire (`REFUSALS`)
├── UsageError               exit 2: an option or argument
├── RedisUnavailable         exit 3
├── FileError                exit 4: a model, adapter or data file
│   ├── ModelError
│   └── AdapterError
├── NotSupported             exit 4: known, but not done by this version; never approximated
├── GeneratorBusy            the generator has queued or running jobs
└── SlotBusy                 a slot's present combination has not drained
"""

from __future__ import annotations

REFUSALS = {
    "bad_id": "the id is malformed, reserved, or known with a different request",
    "bad_field": "a field is unknown, malformed, out of range or not supported",
    "bad_payload": "the payload is not a msgpack map of known fields",
    "bad_adapter": "the adapter expression is malformed",
    "no_prompt": "not exactly one of prompt, messages and tokens",
    "no_adapter": "an adapter is unknown, or its bytes are not the ones asked for",
    "too_large": "the prompt or max_tokens does not fit the cache",
    "expired": "the deadline passed",
    "busy": "too many jobs of this class are waiting",
    "crashed": "the job killed its worker twice, alone",
    "internal": "a fault of the yard; the worker's log has the traceback",
}
"""Every code of an `error` event, with its meaning."""


MAX_MESSAGE = 1000


class LorayardError(Exception):
    """Base of all our errors; `str(error)` is a sentence for a person, one line whatever a hostile file put into it."""

    exit_status = 1

    def __init__(self, message: str) -> None:
        line = message.replace("\n", " ")
        super().__init__(line if len(line) <= MAX_MESSAGE else line[: MAX_MESSAGE - 3] + "...")


class Refused(LorayardError):
    """A job that will not run, or not go on; `code` is one of `REFUSALS`."""

    def __init__(self, code: str, message: str) -> None:
        assert code in REFUSALS, code
        super().__init__(message)
        self.code = code


class UsageError(LorayardError):
    """A wrong option or argument."""

    exit_status = 2


class RedisUnavailable(LorayardError):
    """No Redis answers, or it is too old."""

    exit_status = 3


class FileError(LorayardError):
    """A file or folder that is missing, malformed or does not fit."""

    exit_status = 4


class ModelError(FileError):
    """A model folder that cannot be loaded."""


class AdapterError(FileError):
    """An adapter folder that cannot be loaded, or is for another base."""


class NotSupported(LorayardError):
    """A feature that this version knows by name and does not do."""

    exit_status = 4


class GeneratorBusy(LorayardError):
    """The default LoRA set cannot change while jobs are queued or running."""


class SlotBusy(LorayardError):
    """A slot takes another combination only when the jobs of its present one have drained."""
