"""Tries a chat template in a child process with little memory and time before this process reads it.

Run as `python -m lorayard.worker.text.trial`, it reads a JSON map with `source` and `special_tokens` and writes the
reason against the template, or null.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Mapping

from lorayard.shared.errors import ModelError

from .budget import MessagesRefused, OverBudget, TemplateFault
from .template import ChatTemplate

SECONDS = 5
MEMORY = 1 << 29
USER = {"role": "user", "content": "Hello!"}
CONVERSATIONS = (
    [USER],
    [{"role": "system", "content": "Be brief."}, USER],
    [USER, {"role": "assistant", "content": "Hi."}, USER],
)
"""A template must render one of these, or refuse it in its own words."""


def checked_template(source: str, special_tokens: Mapping[str, str]) -> ChatTemplate:
    """The template, parsed here after it was parsed and rendered in a child. Raises ModelError."""
    request = json.dumps({"source": source, "special_tokens": dict(special_tokens)})
    command = [sys.executable, "-m", __name__]
    try:
        child = subprocess.run(command, input=request, capture_output=True, text=True, timeout=4 * SECONDS)
    except subprocess.TimeoutExpired:
        raise ModelError(f"the chat template takes more than {SECONDS} seconds") from None
    if child.returncode:
        last = (child.stderr.strip().splitlines() or ["it was killed"])[-1]
        raise ModelError(f"the chat template takes too much memory or time to read: {last[:200]}")
    reason = json.loads(child.stdout)
    if reason is not None:
        raise ModelError(reason)
    return ChatTemplate(source, special_tokens)


def fault_of(template: ChatTemplate) -> str | None:
    """Why the template can never serve, or None."""
    faults = []
    for messages in CONVERSATIONS:
        try:
            template.try_render(messages, True)
        except MessagesRefused:
            pass
        except TemplateFault as fault:
            faults.append(fault)
            if isinstance(fault, OverBudget) or len(faults) == len(CONVERSATIONS):
                return f"the chat template cannot render a plain message: {fault}"
    return None


def main() -> None:
    """The child."""
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    request = json.load(sys.stdin)
    try:
        reason = fault_of(ChatTemplate(request["source"], request["special_tokens"]))
    except ModelError as error:
        reason = str(error)
    json.dump(reason, sys.stdout)


if __name__ == "__main__":
    main()
