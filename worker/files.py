"""Reading JSON files that may be malformed or hostile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from lorayard.shared.errors import FileError

T = TypeVar("T")
REQUIRED: Any = object()
"""Default of a field that must be there."""
MAX_BYTES = 8 << 20


class JsonFile:
    """The object in a JSON file, read field by field. Every error is an `error` that names the file and the field."""

    def __init__(self, path: Path, error: type[FileError]) -> None:
        self.path, self.error = path, error
        try:
            with path.open("rb") as file:
                text = file.read(MAX_BYTES + 1)
            if len(text) > MAX_BYTES:
                raise error(f"{path} is larger than {MAX_BYTES >> 20} MiB")
            data = json.loads(text)
        except OSError as reason:
            raise error(f"{path} cannot be read: {reason.strerror}") from None
        except (ValueError, RecursionError) as reason:
            raise error(f"{path} is not JSON: {str(reason)[:100]}") from None
        if not isinstance(data, dict):
            raise error(f"{path} must hold a JSON object")
        self.data: dict[str, Any] = data

    def get(self, name: str, kind: type[T], default: Any = REQUIRED, within: dict[str, Any] | None = None) -> T:
        """Field `name` (of the object `within`, else of the file), of type `kind`; null counts as absent.

        An int is taken for a float, a bool never for a number.
        """
        value = (self.data if within is None else within).get(name)
        if value is None:
            if default is REQUIRED:
                raise self.error(f"{self.path} has no {name}")
            return default  # type: ignore[no-any-return]
        if kind is float and type(value) is int and abs(value) < 1 << 53:
            value = float(value)
        if type(value) is not kind:
            raise self.error(f"{self.path}: {name} must be {KINDS[kind]}, not {str(value)[:60]!r}")
        return value

    def size(
        self, name: str, default: Any = REQUIRED, within: dict[str, Any] | None = None, most: int = 1 << 30
    ) -> int:
        """A whole number from 1 to `most`."""
        value = self.get(name, int, default, within)
        if not 1 <= value <= most:
            raise self.error(f"{self.path}: {name} must be between 1 and {most}, not {str(value)[:60]}")
        return value


KINDS: dict[type, str] = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    dict: "an object",
    list: "a list",
}
