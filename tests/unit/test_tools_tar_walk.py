"""The strict walk over a tar against tarfile, and the faults that tarfile and webdataset pass over in silence."""

import gzip
import io
import tarfile

import numpy as np
import pytest

from data_tools.tar_walk import Member, walk_tar
from megascale.errors import DataError

BLOCK = tarfile.BLOCKSIZE


def make_tar(files, form=tarfile.PAX_FORMAT):
    """A tar of (name, content), a folder first."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        folder = tarfile.TarInfo("texts")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


SAMPLE = make_tar([(f"{number:02d}.txt", bytes([65 + number]) * (300 * number)) for number in range(6)])


def header_offset(name):
    with tarfile.open(fileobj=io.BytesIO(SAMPLE)) as tar:
        return tar.getmember(name).offset


def walk(content):
    return list(walk_tar(io.BytesIO(content), "place"))


def fault_of(content):
    with pytest.raises(DataError) as refused:
        walk(content)
    assert "place: byte " in str(refused.value)
    assert "restore the file or make it again" in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("seed", range(20))
def test_it_finds_what_tarfile_finds(form, seed):
    """Names up to 250 characters, also not ASCII, in all three dialects. Caught mutation: no ustar prefix."""
    random = np.random.default_rng(seed)
    longest = 90 if form == tarfile.USTAR_FORMAT else 250
    files = {}
    for number in range(int(random.integers(0, 12))):
        stem = "é" * int(random.integers(0, 3)) + "x" * int(random.integers(1, longest))
        files[f"{'y' * int(random.integers(1, 60))}/{number}{stem}.txt"[-200:].lstrip("/")] = random.bytes(
            int(random.integers(0, 2000)))
    content = make_tar(files.items(), form)
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        expected = [Member(info.name, info.offset_data, info.size) for info in tar if info.isfile()]
    assert walk(content) == expected
    unpacked = gzip.GzipFile(fileobj=io.BytesIO(gzip.compress(content)))
    read = {member.name: unpacked.read(member.size) for member in walk_tar(unpacked, "place")}
    assert read == files


def test_every_cut_is_an_error():
    """Caught mutation: taking the end of the file for the end of the tar."""
    whole = len(SAMPLE.rstrip(b"\0")) // BLOCK * BLOCK + BLOCK
    for stop in range(0, whole + BLOCK, 100):
        assert "cut short" in fault_of(SAMPLE[:stop]) or stop > whole
    assert len(walk(SAMPLE[: whole + 2 * BLOCK])) == 6


def test_every_flipped_bit_of_a_header_is_an_error():
    """tarfile takes most of them for the end of the tar. Caught mutation: no checksum."""
    offset = header_offset("02.txt")
    for bit in range(0, BLOCK * 8, 7):
        content = bytearray(SAMPLE)
        content[offset + bit // 8] ^= 1 << bit % 8
        fault_of(bytes(content))


def test_zeros_in_place_of_a_header_are_an_error():
    offset = header_offset("02.txt")
    for size in (BLOCK, 2 * BLOCK):
        hole = SAMPLE[:offset] + bytes(size) + SAMPLE[offset + size :]
        assert "zeros" in fault_of(hole)


def raw_member(name="a", kind=tarfile.REGTYPE, size=0, pax=None):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "target"
    info.size = size
    if pax is not None:
        info.pax_headers = pax
    return info.tobuf(tarfile.PAX_FORMAT if pax else tarfile.GNU_FORMAT)


def extension(kind, content):
    return raw_member("x", kind, len(content)) + content + bytes(-len(content) % BLOCK) + raw_member()


@pytest.mark.parametrize(("content", "fault"), [
    (raw_member("a", tarfile.SYMTYPE), "member a is a symbolic link"),
    (raw_member("a", tarfile.LNKTYPE), "member a is a hard link"),
    (raw_member("a", tarfile.CHRTYPE), "member a is a character device"),
    (raw_member("a", tarfile.BLKTYPE), "member a is a block device"),
    (raw_member("a", tarfile.FIFOTYPE), "member a is a named pipe"),
    (raw_member("a", b"Z"), "member a is a member of type b'Z'"),
    (raw_member("a", pax={"GNU.sparse.major": "1"}), "member a is a sparse file"),
    (raw_member("/a"), "absolute"),
    (raw_member("a/../b"), "`..`"),
    (raw_member(".."), "`..`"),
    (raw_member("a", pax={"path": "../b"}), "'../b'"),
    (raw_member(), None),
    (raw_member() + raw_member(), "member a is there twice"),
    (raw_member("a", size=1 << 40), "cut short"),
    (raw_member("a", pax={"size": "1" * 30}), "size '111"),
    (raw_member("a", pax={"size": "-5"}), "size '-5'"),
    (extension(b"x", b"99 path=a\n"), "doesn't follow its own lengths"),
    (extension(b"x", b"path=a\n"), "doesn't follow its own lengths"),
    (extension(b"g", b"10 path=a\n"), "all members one name"),
    (raw_member("x", b"x", 1 << 30), "at most are read"),
    (extension(b"L", b"/abs\0"), "absolute"),
])
def test_what_is_no_plain_file_is_refused_by_name(content, fault):
    """Caught mutations: each check left out, and the limit on what an extended header may hold."""
    content += bytes(2 * BLOCK)
    if fault is None:
        assert walk(content) == [Member("a", BLOCK, 0)]
    else:
        assert fault in fault_of(content)


def test_what_follows_the_end_must_be_zeros():
    assert "other bytes than zeros" in fault_of(SAMPLE + b"x")
    assert len(walk(SAMPLE + bytes(10_000))) == 6
