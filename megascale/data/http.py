"""Files over http and https, from any byte on."""

import base64
import netrc
import os
import re
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import cache
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit

from megascale.data.transfer import Access, Body, TransientError
from megascale.errors import ConfigError, DataError

TRANSIENT_STATUSES = {408, 425, 429, *range(500, 600)}
MISSING_STATUSES = {404, 410}
PAST_THE_END = 416


@contextmanager
def open_http(place: str, start: int, access: Access) -> Iterator[Body]:
    """Asks for the bytes of a file from `start` on.

    Raises:
        FileNotFoundError: the server says that there is none.
        DataError: the server refuses.
        TransientError: no answer, or one that asks to come again.
    """
    request = _request(place, start)
    try:
        response = _opener().open(request, timeout=access.timeout_s)
    except HTTPError as error:
        with error:
            if error.code != PAST_THE_END:
                raise _refusal(place, error) from None
        yield Body(start, None, lambda count: b"")
        return
    except (OSError, HTTPException) as error:
        raise TransientError(f"no answer ({getattr(error, 'reason', error)})") from None
    with closing(response):
        yield _body(response)


def _body(response: HTTPResponse) -> Body:
    def read(count: int) -> bytes:
        try:
            return response.read(count)
        except (OSError, HTTPException) as error:
            raise TransientError(f"the connection was lost ({error})") from None

    # A server that doesn't know Range answers 200 with the whole file.
    ranged = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", "")) if response.status == 206 else None
    return Body(int(ranged[1]) if ranged else 0, response.length, read)


def _refusal(place: str, error: HTTPError) -> Exception:
    answer = f"the server answered {error.code} {error.reason}"
    if error.code in TRANSIENT_STATUSES:
        return TransientError(answer)
    if error.code in MISSING_STATUSES:
        return FileNotFoundError(place)
    remedy = (
        "is the url right, and may this machine read it? A name and password go into ~/.netrc"
        if error.code in (401, 403, 407)
        else "open the url by hand to see why"
    )
    return DataError(f"{place}: {answer}; {remedy}")


def _request(place: str, start: int) -> urllib.request.Request:
    try:
        parts = urlsplit(place)
        is_complete = bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_complete = False
    if not is_complete or re.search(r"[\s\x00-\x1f\x7f]", place):
        raise ConfigError(f"{place!r} is no url; write it as: https://HOST/FOLDER, a space as %20")
    if "@" in parts.netloc:
        raise ConfigError(f"{place}: a url in a config is stored with every run; put name and password into ~/.netrc")
    request = urllib.request.Request(place)
    if login := _login(parts.hostname):
        # Not sent on to where the server may redirect.
        request.add_unredirected_header("Authorization", f"Basic {base64.b64encode(login.encode()).decode()}")
    if start:
        request.add_header("Range", f"bytes={start}-")
    return request


def _login(host: str) -> str | None:
    """`NAME:PASSWORD` of a host from the file that curl and git read too."""
    path = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    try:
        found = netrc.netrc(path).authenticators(host) if path.is_file() else None
    except (OSError, netrc.NetrcParseError) as error:
        raise ConfigError(f"{path} can't be read ({error}); mend it, or point NETRC at another file") from None
    return f"{found[0]}:{found[2]}" if found else None


@cache
def _opener() -> urllib.request.OpenerDirector:
    """An opener of http and https alone: the usual one would follow a redirect to ftp."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler, urllib.request.HTTPHandler, urllib.request.HTTPSHandler,
        urllib.request.HTTPRedirectHandler, urllib.request.HTTPDefaultErrorHandler, urllib.request.HTTPErrorProcessor,
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(handler())
    return opener
