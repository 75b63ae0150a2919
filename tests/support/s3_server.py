"""An S3 server on this machine, with a folder in a bucket."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock
from urllib.request import urlopen

import fsspec
from moto.server import ThreadedMotoServer

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test-secret", "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@contextmanager
def serve_s3(folder: Path, bucket: str = "corpora") -> Iterator[str]:
    """Gives the url of the bucket; the environment of this process and its children leads there meanwhile."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    # Servers of one process share what they hold.
    with urlopen(f"http://{host}:{port}/moto-api/reset", data=b""):
        pass
    with mock.patch.dict("os.environ", {**CREDENTIALS, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}):
        try:
            store = fsspec.filesystem("s3", skip_instance_cache=True)
            store.mkdir(bucket)
            store.put(f"{folder}/", f"{bucket}/", recursive=True)
            # A file system of an earlier test would know an earlier server.
            type(store).clear_instance_cache()
            yield f"s3://{bucket}"
        finally:
            server.stop()
