"""Generates hostile records from a seed: errors that occur in catalogues, and malicious content."""

import io
import json
import os
import struct
import zlib

import numpy as np
from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


def picture(rng, mode="RGB"):
    height, width = rng.integers(9, 60, 2)
    array = rng.integers(0, 256, (height, width, 3), np.uint8)
    return (
        Image.fromarray(array).convert(mode)
        if mode != "I;16"
        else Image.fromarray(array[..., 0].astype(np.uint16) * 257)
    )


def encoded(image, format, **options):
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def fine_image(rng):
    """An unusual but valid image."""
    kind = rng.integers(7)
    if kind == 0:
        return encoded(picture(rng, "CMYK"), str(rng.choice(["JPEG", "TIFF"])))
    if kind == 1:
        return encoded(picture(rng, "I;16"), "PNG")
    if kind == 2:
        first = picture(rng)
        more = [first.transpose(Image.Transpose.FLIP_LEFT_RIGHT), first.transpose(Image.Transpose.FLIP_TOP_BOTTOM)]
        return encoded(first, str(rng.choice(["GIF", "WEBP"])), save_all=True, append_images=more)
    if kind == 3:
        exif = Image.Exif()
        exif[0x0112] = int(rng.integers(1, 9))
        return encoded(picture(rng), "JPEG", exif=exif)
    if kind == 4:
        return encoded(picture(rng, "RGBA"), str(rng.choice(["PNG", "WEBP", "TIFF"])))
    if kind == 5:
        return encoded(picture(rng, "P"), str(rng.choice(["PNG", "GIF", "BMP"])))
    return encoded(picture(rng, str(rng.choice(["RGB", "L"]))), str(rng.choice(FORMATS)))


def bomb(rng):
    """A few bytes with a header that claims 30,000 x 30,000 pixels."""
    side = 30_000
    kind = rng.integers(4)
    if kind == 0:
        header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        parts = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1 << 16))), (b"IEND", b"")]
        body = b"".join(
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
            for name, data in parts
        )
        return b"\x89PNG\r\n\x1a\n" + body
    if kind == 1:
        made = bytearray(encoded(picture(rng), "JPEG"))
        offset = made.index(b"\xff\xc0") + 5
        made[offset : offset + 4] = struct.pack(">HH", side, side)
        return bytes(made)
    if kind == 2:
        made = bytearray(encoded(picture(rng), "GIF"))
        made[6:10] = struct.pack("<HH", side, side)
        return bytes(made)
    made = bytearray(encoded(picture(rng), "BMP"))
    made[18:26] = struct.pack("<ii", side, side)
    return bytes(made)


def broken_image(rng):
    """An image that is truncated or has flipped bits; some of these are still readable."""
    content = fine_image(rng)
    if rng.random() < 0.5:
        return content[: rng.integers(0, len(content))]
    content = bytearray(content)
    for position in rng.integers(0, len(content), rng.integers(1, 20)):
        content[position] ^= 1 << rng.integers(8)
    return bytes(content)


WRONG = [
    {"title": 7},
    {"title": ["a", "b"]},
    {"title": {"a": 1}},
    {"title": "\ud800 alone"},
    {"title": "x" * 70_000},
    {"title": "x" * 3_000_000},
    {"title": True},
    {"product_id": None},
    {"product_id": ""},
    {"product_id": "  "},
    {"product_id": float("nan")},
    {"product_id": {"a": 1}},
    {"product_id": [1]},
    {"product_id": "\udfff"},
    {"category": 7},
    {"category": {"a": 1}},
    {"category": [["deep"]]},
    {"category": ["c"] * 10_000},
    {"attributes": [1, 2]},
    {"attributes": "colour=red"},
    {"attributes": {f"a{n}": "b" for n in range(5000)}},
    {"attributes": {"a": {"b": 1}}},
    {"brand": {"name": "x"}},
    {"brand": "x" * 100_000},
    {"description": 1},
    {"images": 7},
    {"images": [7]},
    {"images": [["nested.jpg"]]},
    {"images": {"path": 7}},
    {"images": True},
    {"images": ["photo.jpg"] * 5000},
    {"images": ["../secret.jpg"]},
    {"images": ["images/../../secret.jpg"]},
    {"images": ["/etc/passwd"]},
    {"images": ["outside.jpg"]},
    {"images": ["outside/secret.jpg"]},
    {"images": ["loop.jpg"]},
    {"images": ["pipe.jpg"]},
    {"images": ["folder.jpg"]},
    {"images": ["missing.jpg"]},
    {"images": ["nul\x00.jpg"]},
    {"images": ["x" * 5000]},
    {"images": ["\ud800.jpg"]},
    {"images": ["."]},
    {"images": ["http://127.0.0.1/a.jpg"]},
    {"images": ["file:///etc/passwd"]},
    {"title": None, "images": []},
    {"title": float("nan"), "images": None},
]
"""Changes that make a good record bad."""

LINES = [
    b"{broken",
    b"[1, 2]",
    b"null",
    b'"text"',
    b"[" * 200_000,
    b"9" * 20_000,
    b"\xff\xfe\x00",
    b'{"product_id": "a"} {"product_id": "b"}',
    b"\x00\x00\x00",
]

FINE = [
    {},
    {"title": "control \x00\x07\x1b[31m characters"},
    {"title": "  spaces\u3000 around\t"},
    {"title": "红色 运动鞋 👟"},
    {"title": "'; DROP TABLE product; --"},
    {"title": "$query {} %s \\ \" '"},
    {"title": None},
    {"title": float("nan")},
    {"category": None, "brand": None, "attributes": None},
    {"category": "one level", "attributes": {"size": 42, "new": True, "none": None}},
    {"category": ["a", None, "b"]},
    {"unknown": {"deep": [1, {"x": None}]}},
    {"attributes": {"": "", "a'b": "\x00"}},
    {"description": "x" * 60_000},
    {"images": ["", None]},  # no image
]
"""Changes that leave a record good if it keeps a title or an image."""


def surroundings(folder, photo):
    """Creates the files, links and pipes that hostile paths refer to."""
    (folder.parent / "secret.jpg").write_bytes(photo)
    (folder / "photo.jpg").write_bytes(photo)
    (folder / "outside.jpg").symlink_to(folder.parent / "secret.jpg")
    (folder / "outside").symlink_to(folder.parent)
    (folder / "loop.jpg").symlink_to(folder / "loop.jpg")
    (folder / "inside.jpg").symlink_to("photo.jpg")
    (folder / "folder.jpg").mkdir()
    os.mkfifo(folder / "pipe.jpg")


def plain(number):
    return {
        "product_id": f"id {number}",
        "title": f"thing {number}",
        "category": ["all"],
        "images": [f"images/{number}"],
    }


def records(seed, count):
    """Yields (JSON line, expected result "good", "bad" or "either", record, image content or None)."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        record = plain(number)
        kind = rng.random()
        if kind < 0.3:
            expected, content = "good", fine_image(rng)
            record |= FINE[rng.integers(len(FINE))]
        elif kind < 0.5:
            expected, content = "either", broken_image(rng)
        elif kind < 0.6:
            expected, content = "bad", bomb(rng)
        elif kind < 0.9:
            expected, content = "bad", fine_image(rng)
            record |= WRONG[rng.integers(len(WRONG))]
        elif kind < 0.95:
            expected, content = "bad", fine_image(rng)
            record["product_id"] = "id of many"
        else:
            yield LINES[rng.integers(len(LINES))], "bad", None, None
            continue
        yield json.dumps(record).encode(), expected, record, content
