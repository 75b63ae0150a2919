"""Reads the structure of a tar header by header, and takes nothing on trust.

Python's tarfile and the readers on top of it take a damaged header for the end of the tar, follow links and hand out
any name. A corpus must neither lose documents in silence nor reach outside of its files, so this walk knows plain files
and folders only, and a tar ends where it says so.

Source: POSIX.1-2024, pax, "ustar Interchange Format" and "pax Extended Header"; GNU tar's long names (type L).
"""

import re
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from megascale.errors import DataError

BLOCK_BYTES = 512
MAX_EXTENSION_BYTES = 1 << 20
"""Largest extended header or long name that is read: a hostile one can't fill the memory."""
ZERO_BLOCK = bytes(BLOCK_BYTES)
FILE_TYPES, FOLDER_TYPE = (b"0", b"\0"), b"5"
PAX_TYPE, PAX_GLOBAL_TYPE, LONG_NAME_TYPE = b"x", b"g", b"L"
TYPE_NAMES = {
    b"1": "hard link", b"2": "symbolic link", b"3": "character device", b"4": "block device", b"6": "named pipe",
    b"K": "link", b"S": "sparse file",
}


class Member(NamedTuple):
    """A plain file of a tar: its content is `size` bytes from byte `offset`."""

    name: str
    offset: int
    size: int


def walk_tar(file: BinaryIO, place: str) -> Iterator[Member]:
    """Yields the files of a tar; folders are passed over.

    The caller may read a member's content from `file`, which stands at it. That the content is whole is known once the
    next member, or the end, was reached.

    Args:
        file: the tar from its first byte; it is read and moved forwards only, so it may be decompressed on the way.
        place: path or url of the tar, for messages.

    Raises:
        DataError: the tar is cut short or damaged, goes on after its end, or has a link, a device, a sparse file, a
            name twice or a name that points outside.
    """
    offset, names, extended = 0, set(), {}
    while (header := file.read(BLOCK_BYTES)) != ZERO_BLOCK:
        _check_header(header, offset, place)
        kind, size, content = header[156:157], _parse_number(header[124:136], offset, place), offset + BLOCK_BYTES
        if kind in (PAX_TYPE, PAX_GLOBAL_TYPE, LONG_NAME_TYPE):
            extended |= _read_extension(file, kind, size, offset, place)
        else:
            size = int(extended.get("size", size))
            name = _check_name(extended.get("path") or _header_name(header), offset, place)
            _check_type(kind, name, extended, offset, place)
            if kind in FILE_TYPES and not name.endswith("/"):
                if name in names:
                    raise _damage(place, offset, f"member {name} is there twice")
                names.add(name)
                yield Member(name, content, size)
            elif size:
                raise _damage(place, offset, f"folder {name} has {size} bytes of content")
            extended = {}
        offset = content + -(-size // BLOCK_BYTES) * BLOCK_BYTES
        if file.tell() < offset:
            file.seek(offset)  # past the end too: then the next header is missing
    _check_end(file, offset, place)


def _check_header(header: bytes, offset: int, place: str) -> None:
    if len(header) < BLOCK_BYTES:
        found = f"only {len(header)} bytes of a header" if header else "no more bytes"
        raise _damage(place, offset, f"{found} where a member or the zeros that end a tar are due: it was cut short")
    expected = _parse_number(header[148:156], offset, place)
    found = sum(header[:148]) + 8 * ord(" ") + sum(header[156:])
    if found != expected:
        raise _damage(place, offset, f"the header's bytes add up to {found}, its checksum field says {expected}")


def _parse_number(field: bytes, offset: int, place: str) -> int:
    """A number of a header: octal digits, or binary behind a byte of 128 as GNU tar writes large ones."""
    if field[0] == 0x80 and not any(field[1:-7]):
        return int.from_bytes(field[-7:])
    text = field.strip(b" \0") or b"0"
    if not text.isdigit() or set(text) & set(b"89"):
        raise _damage(place, offset, f"the header has {bytes(field)!r} where an octal number is due")
    return int(text, 8)


def _header_name(header: bytes) -> str:
    name, prefix = (part.split(b"\0", 1)[0] for part in (header[:100], header[345:500]))
    is_posix = header[257:263] == b"ustar\0"  # GNU tar keeps other things in the prefix's place
    return (prefix + b"/" + name if prefix and is_posix else name).decode(errors="surrogateescape")


def _read_extension(file: BinaryIO, kind: bytes, size: int, offset: int, place: str) -> dict[str, str]:
    """What an extended header says of the next member; one about all members may say nothing that matters here."""
    if size > MAX_EXTENSION_BYTES:
        raise _damage(place, offset, f"an extended header of {size} bytes, {MAX_EXTENSION_BYTES} at most are read")
    content = file.read(size)
    if kind == LONG_NAME_TYPE:
        return {"path": content.split(b"\0", 1)[0].decode(errors="surrogateescape")}
    records = {}
    while content:
        digits, _, _ = content[:20].partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        key, separator, value = content[len(digits) + 1 : length - 1].partition(b"=")
        if not len(digits) < length <= len(content) or not separator:
            raise _damage(place, offset, "an extended header that doesn't follow its own lengths")
        records[key.decode(errors="surrogateescape")] = value.decode(errors="surrogateescape")
        content = content[length:]
    if not re.fullmatch("[0-9]{1,18}", records.get("size", "0")):
        raise _damage(place, offset, f"an extended header with the size {records['size']!r}")
    if kind == PAX_GLOBAL_TYPE and records.keys() & {"path", "size"}:
        raise _damage(place, offset, "an extended header that gives all members one name or size")
    return {} if kind == PAX_GLOBAL_TYPE else records


def _check_name(name: str, offset: int, place: str) -> str:
    if not name or name.startswith("/") or ".." in name.split("/") or "\0" in name:
        raise _damage(place, offset, f"member {name!r} isn't a name within the tar: absolute, empty or with `..`")
    return name


def _check_type(kind: bytes, name: str, extended: dict[str, str], offset: int, place: str) -> None:
    if any(key.startswith("GNU.sparse") for key in extended):
        kind = b"S"
    if kind not in (*FILE_TYPES, FOLDER_TYPE):
        what = TYPE_NAMES.get(kind, f"member of type {kind!r}")
        raise _damage(place, offset, f"member {name} is a {what}; only plain files and folders are read")


def _check_end(file: BinaryIO, offset: int, place: str) -> None:
    if file.read(BLOCK_BYTES) != ZERO_BLOCK:
        raise _damage(place, offset, "one block of zeros where a member or two blocks, which end a tar, are due")
    while content := file.read(1 << 20):
        if content.strip(b"\0"):
            raise _damage(place, offset, "the tar ends there, but other bytes than zeros follow")


def _damage(place: str, offset: int, fault: str) -> DataError:
    return DataError(f"{place}: byte {offset}: {fault}; restore the file or make it again")
