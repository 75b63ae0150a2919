"""Where a corpus lies: a local path, or a url of which the scheme says how its files are read. Pure."""

import shlex
from pathlib import Path

from megascale.errors import ConfigError

PIPE = "pipe:"
"""Begins a command that writes a file to its standard output; `{}` stands for the file's name within the corpus."""


def scheme_of(place: str) -> str:
    """The scheme of a url in lower case, `pipe` for a command, `file` for a local path."""
    if place.startswith(PIPE):
        return "pipe"
    scheme, separator, _ = place.partition("://")
    return scheme.lower() if separator else "file"


def is_local(place: str) -> bool:
    """Whether files there are opened, not fetched."""
    return scheme_of(place) == "file"


def local_path(place: str) -> Path:
    """A local place as a path."""
    return Path(place.removeprefix("file://")).expanduser()


def join(place: str, *names: str) -> str:
    """A file or folder within a place, by its names; what follows a `?` in an http url stays at its end.

    Raises:
        ConfigError: a command that has no room for the name.
    """
    inner = "/".join(names)
    if scheme_of(place) in ("http", "https"):
        path, separator, query = place.partition("?")
        return f"{path.rstrip('/')}/{inner}{separator}{query}"
    if scheme_of(place) != "pipe":
        return f"{place.rstrip('/')}/{inner}" if place.strip("/") else f"/{inner}"
    if "{}" not in place:
        raise ConfigError(
            f"{place!r} has no {{}} for the name of the file to read; write it as: pipe:ssh host cat /corpus/{{}}"
        )
    return place.replace("{}", shlex.quote(inner))
