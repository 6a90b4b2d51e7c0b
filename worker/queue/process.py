"""One worker process: `python -m lorayard.worker.queue.process SPEC`, with LORAYARD_REDIS_URL in the environment."""

from __future__ import annotations

import functools
import logging
import os
import signal
import sys
from pathlib import Path

from lorayard.shared.connect import connect
from lorayard.shared.errors import LorayardError
from lorayard.shared.keys import Keys
from lorayard.shared.scripts import Scripts, Superseded

from ..lora.folders import scan
from . import facts
from .adapters import AdapterLibrary
from .figures import Sensors, cuda_uuids
from .prepare import Preparer
from .spec import HUNG, SUPERSEDED, WorkerSpec
from .worker import SOCKET_TIMEOUT_S, GpuWorker

log = logging.getLogger(__name__)

PREDECESSOR_S = 60.0
"""How long to wait for a predecessor on the same GPU that still drains, or whose lease has not ended."""


def main() -> None:
    """Entry point; exits with 0 after draining, an error's own status, SUPERSEDED or HUNG."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("rq").setLevel(logging.WARNING)
    try:
        run(WorkerSpec.load(sys.argv[1]), os.environ["LORAYARD_REDIS_URL"])
    except LorayardError as error:
        print(f"lorayard: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(error.exit_status)
    except Superseded:
        sys.exit(SUPERSEDED)


def run(spec: WorkerSpec, redis_url: str) -> None:
    """Take the GPU, load the model while the heart beats, and work until SIGTERM or SIGINT."""
    keys = Keys(spec.prefix)
    scripts = Scripts(connect(redis_url, socket_timeout=SOCKET_TIMEOUT_S), keys)
    beats = Scripts(connect(redis_url, socket_timeout=SOCKET_TIMEOUT_S), keys)
    superseded, hung = (functools.partial(os._exit, status) for status in (SUPERSEDED, HUNG))
    worker = GpuWorker(
        scripts, beats, spec.gpu, spec.worker, spec.max_batch, superseded, hung, hang_s=spec.hang_s
    )  # fmt: skip
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: worker.drain(spec.grace_s))
    holder = worker.join_yard(
        PREDECESSOR_S,
        {"slots": spec.slots, "seats": spec.max_batch, "window": 2 * spec.max_batch, "pid": os.getpid(),
         "host": os.uname().nodename, "holder": spec.holder},
    )  # fmt: skip
    if holder is not None:
        raise LorayardError(f"{spec.gpu} is still held by the live worker {holder}; stop it, or choose another --host")
    try:
        _serve(spec, worker)
    except LorayardError:
        worker.leave()
        raise


def _serve(spec: WorkerSpec, worker: GpuWorker) -> None:
    from .. import Cache, Generator, Lora, Model, ModelConfig, Tokenizer
    from ..lora.space import slot_space
    from ..models.loading import Pace

    path = Path(spec.model)
    tokenizer = Tokenizer.from_directory(path)
    config = ModelConfig.from_directory(path, **spec.overrides)
    model = Model(config)
    on_cpu = spec.devices == "cpu"
    if not on_cpu:
        sensors = Sensors(cuda_uuids(spec.devices))
        sensors.start()
        worker.sensors = lambda: sensors.fields
    roots = [Path(root) for root in spec.adapters]
    cache = Cache(model, spec.cache_tokens, spec.cache_dtype or ("fp32" if on_cpu else "fp16"))
    slots = {} if on_cpu else slot_space(config, roots, itemsize=2).modules
    pace = Pace(lambda words: log.info("loading %s: %s", path.name, words))
    model.load(cache, spec.devices, pace, {module: spec.slots * size for module, size in slots.items()})
    generator = Generator(model, cache, tokenizer, max_batch=spec.max_batch, slots=spec.slots)
    generator.warmup()
    digest = facts.base_digest(path, spec.overrides)
    fields = facts.info(
        path, digest, generator.capacity, config.max_seq_len, config.vocab_size, spec.slots, spec.max_batch,
        generator.bank.max_rank, tokenizer.has_chat_template,
    )  # fmt: skip
    facts.publish(worker.scripts, spec.gpu, fields, worker.lease_ms, lambda: worker.draining)
    library = AdapterLibrary(
        functools.partial(scan, roots), functools.partial(Lora.from_directory, model), keep=2 * spec.slots + 8
    )
    log.info("%s serves %s", worker.name, path.name)
    worker.serve(generator, Preparer(tokenizer, library, generator.capacity), digest)


if __name__ == "__main__":
    main()
