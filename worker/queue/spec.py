"""What a supervisor tells a worker process: one JSON object. Needs no torch."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field

MAX_BATCH = 64
SLOTS = 8
CACHE_TOKENS = 32768
GRACE_S = 30.0
HANG_S = 120.0
SUPERSEDED = 75
"""Exit status of a worker whose GPU has been given to another (EX_TEMPFAIL of sysexits.h)."""
HUNG = 70
"""Exit status of a worker whose engine hangs (EX_SOFTWARE)."""


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """One worker. gpu: name of its queue; worker: name of this incarnation. devices: see `Model.load`."""

    gpu: str
    worker: str
    model: str
    adapters: tuple[str, ...]
    devices: str | tuple[str, ...]
    prefix: str = "yard:"
    slots: int = SLOTS
    max_batch: int = MAX_BATCH
    cache_tokens: int = CACHE_TOKENS
    grace_s: float = GRACE_S
    """What running jobs get to finish after SIGTERM."""
    hang_s: float = HANG_S
    """How long a step may take before the engine counts as hung, and the worker ends with status HUNG."""
    holder: str = ""
    """Under which name the supervisor publishes the adapters that this worker can read."""
    cache_dtype: str | None = None
    """See Cache; None is fp32 on the CPU and fp16 on a GPU."""
    overrides: dict[str, float] = field(default_factory=dict)
    """See ModelConfig.from_directory."""

    def dump(self) -> str:
        """As one argument of a command."""
        return json.dumps(asdict(self))

    @classmethod
    def load(cls, text: str) -> WorkerSpec:
        """Inverse of `dump`."""
        fields = json.loads(text)
        devices = fields["devices"]
        fields["adapters"] = tuple(fields["adapters"])
        fields["devices"] = devices if isinstance(devices, str) else tuple(devices)
        return cls(**fields)


def gpu_name(kind: str, host: str, index: int) -> str:
    """`cpu-HOST-N` or `gpu-HOST-INDEX`, with what Redis tools may stumble over replaced in the host's name."""
    return f"{kind}-{re.sub(r'[^A-Za-z0-9_-]', '-', host)}-{index}"
