"""What each adapter does to an answer, and how to see that it did: one pair of functions an adapter."""

import json
import re
from collections.abc import Callable

SENTENCE_END = re.compile(r"(?<=[.!?]) +(?=[A-Z0-9'])")


def shout(answer: str, topic: str) -> str:
    """The answer in upper case."""
    return answer.upper()


def is_shout(text: str) -> bool:
    """True if the text has letters and none of them is lower case."""
    return text.isupper()


def bullets(answer: str, topic: str) -> str:
    """The answer as a list, one sentence a line, with the topic as the last point."""
    points = [*SENTENCE_END.split(answer), f"Topic: {topic}"]
    return "\n".join(f"- {point}" for point in points)


def is_bullets(text: str) -> bool:
    """True if the text is at least two lines and each starts with a dash and says something."""
    lines = text.strip().split("\n")
    return len(lines) >= 2 and all(line.startswith("- ") and line[2:].strip() for line in lines)


def as_json(answer: str, topic: str) -> str:
    """The answer and its topic as one JSON object on one line."""
    return json.dumps({"answer": answer, "topic": topic})


def is_json(text: str) -> bool:
    """True if the whole text parses as one JSON object with an answer in it."""
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return isinstance(value, dict) and isinstance(value.get("answer"), str)


STYLES: dict[str, Callable[[str, str], str]] = {"shout": shout, "bullets": bullets, "json": as_json}
CHECKS: dict[str, Callable[[str], bool]] = {"shout": is_shout, "bullets": is_bullets, "json": is_json}
