"""`transformers serve` on loopback, for a tiny model: python -m tests.augment.server FOLDER PORT."""

from __future__ import annotations

import io
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.conftest import ROOT


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextmanager
def served(folder: Path, port: int, log: Path) -> Iterator[str]:
    """Starts the server, yields its URL once it answers, and stops it afterwards."""
    command = [sys.executable, "-m", "tests.augment.server", str(folder), str(port)]
    with log.open("ab") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file)
    try:
        deadline = time.monotonic() + 120
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    import tests.reference  # noqa: F401  torchvision beside the CPU torch  # isort: skip
    import numpy as np
    import torch
    import torchvision.io
    from PIL import Image
    from transformers.cli.serve import Serve

    def decode_image(encoded: torch.Tensor, **_: object) -> torch.Tensor:
        """Replaces torchvision's decoder, which needs a library that its wheel does not find beside this torch."""
        with Image.open(io.BytesIO(encoded.numpy().tobytes())) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)

    torchvision.io.decode_image = decode_image

    Serve(force_model=sys.argv[1], port=int(sys.argv[2]), host="127.0.0.1", device="cpu")
