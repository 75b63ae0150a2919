"""Records: frozen dataclasses that travel as JSON and are read back strictly.

Unknown, missing and mistyped fields are refused by name. The reader stops at the first of them, so that a hostile file
costs no more memory than its parsed text.
"""

import dataclasses
import json
import math
import types
import typing
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from megascale.errors import CheckpointError

T = TypeVar("T")


class MisfitError(ValueError):
    """A value that doesn't fit a record's field; `where` gathers the names on the way out to the root."""

    def __init__(self, problem: str, *where: str):
        super().__init__(problem)
        self.where = where


def to_json(values: dict[str, Any]) -> bytes:
    """One line of JSON; floats keep every bit."""
    return (json.dumps(values) + "\n").encode()


def parse_record(kind: type[T], text: bytes, path: Path | str) -> T:
    """Reads a record from JSON.

    Raises:
        CheckpointError: what is wrong with the first value that doesn't fit, with the file and its dotted name.
    """
    try:
        return _decode(kind, json.loads(text))
    except RecursionError:
        raise CheckpointError(f"{path}: nested too deeply to be a {kind.__name__}") from None
    except MisfitError as misfit:
        field = ".".join(misfit.where)
        raise CheckpointError(f"{path}: {field + ': ' if field else ''}{misfit}") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from None


def check_counts(record: object, *names: str) -> None:
    """Refuses negative numbers in these fields."""
    for name in names:
        if getattr(record, name) < 0:
            raise MisfitError(f"{getattr(record, name)} is negative", name)


def _decode(kind: Any, value: Any) -> Any:
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return _decode_record(kind, value)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        return None if value is None else _decode(arguments[0], value)
    if origin is dict:
        return {key: _decode_at(str(key), arguments[1], item) for key, item in _expect(dict, value).items()}
    if origin is tuple:
        return tuple(_decode_at(str(i), arguments[0], item) for i, item in enumerate(_expect(list, value)))
    if kind is float:
        return _decode_float(value)
    return _expect(kind, value)


def _decode_record(kind: type[T], value: Any) -> T:
    hints = _type_hints(kind)
    for name in _expect(dict, value):
        if name not in hints:
            raise MisfitError("unknown field", name)
    for name in hints:
        if name not in value:
            raise MisfitError("missing", name)
    return kind(**{name: _decode_at(name, hint, value[name]) for name, hint in hints.items()})


def _decode_at(name: str, kind: Any, value: Any) -> Any:
    try:
        return _decode(kind, value)
    except MisfitError as misfit:
        misfit.where = (name, *misfit.where)
        raise


def _decode_float(value: Any) -> float:
    number = float(value) if type(value) is int and abs(value) < 2**53 else _expect(float, value)
    if not math.isfinite(number):
        raise MisfitError(f"{number} is not finite")
    return number


def _expect(kind: type[T], value: Any) -> T:
    if type(value) is not kind:
        raise MisfitError(f"expected {kind.__name__}, found {type(value).__name__}")
    return value


@cache
def _type_hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)
