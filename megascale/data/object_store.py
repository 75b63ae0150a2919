"""Files of object stores, through fsspec and the package that it needs for each."""

from collections.abc import Iterator
from contextlib import contextmanager

from megascale.data.location import scheme_of
from megascale.data.transfer import Access, Body, TransientError
from megascale.errors import DataError

PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "az": "adlfs"}
"""The package with which fsspec reads a scheme."""
BLOCK_BYTES = 8 << 20
"""Asked for in a request: 16 of them for a shard of 128 MiB."""


@contextmanager
def open_object(place: str, start: int, access: Access) -> Iterator[Body]:
    """Opens an object at its byte `start`. Credentials and endpoints come from the environment, as the package reads
    them.

    Raises:
        FileNotFoundError: there is no such object.
        DataError: the package is missing, or access is refused.
        TransientError: any other failure.
    """
    file = _calling(place, _open, place, start)
    try:
        yield Body(start, file.size - start, lambda count: _calling(place, file.read, count))
    finally:
        file.close()


def _open(place: str, start: int):
    # The scheme's own file system: from a whole url fsspec would also read `s3://a::file://b`.
    store = open_file_system(scheme_of(place))
    file = store.open(place, "rb", block_size=BLOCK_BYTES, cache_type="readahead")
    file.seek(min(start, file.size))
    return file


def open_file_system(scheme: str):
    """The fsspec file system of a scheme of `PACKAGES`, with credentials and endpoint from the environment.

    Raises:
        DataError: its package is missing.
    """
    try:
        import fsspec

        return fsspec.filesystem(scheme)
    except ImportError as error:
        package = PACKAGES[scheme]
        raise DataError(
            f"{scheme}:// is read by the package {package} ({error}); install it with: pip install {package}"
        ) from None


def _calling(place: str, function, *args):
    """Calls a package that has errors of its own for everything, and sorts them."""
    try:
        return function(*args)
    except (FileNotFoundError, DataError):
        raise
    except PermissionError as error:
        scheme = scheme_of(place)
        raise DataError(
            f"{place}: access refused ({error}); give the credentials as {PACKAGES[scheme]} reads "
            f"them; for a public store set FSSPEC_{scheme.upper()}_ANON=true"
        ) from None
    except Exception as error:
        raise TransientError(f"{type(error).__name__}: {error}") from None
