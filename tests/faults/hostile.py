"""Images, paths and texts as an enemy would send them, made here, each with the outcomes that are right."""

import io
import os
import socket
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from glm4v_batch.failure_codes import FailureCode

SECRET = "xyzzy"
"""Stands in every hostile text and image, and may stand in no message."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
OK = "ok"
Outcome = FailureCode | str
DAMAGED: tuple[Outcome, ...] = ("image_truncated", "image_corrupt", "image_format", "image_missing")
REFUSED: tuple[Outcome, ...] = ("image_too_large", *DAMAGED)


@dataclass(frozen=True, slots=True)
class Attack:
    """A record: its image, as bytes or a path, its title, and the outcomes that are right."""

    name: str
    outcomes: tuple[Outcome, ...]
    data: bytes | None = None
    path: str | None = None
    title: str | bytes | None = "a title"


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """*image* as a file of the format *kind*."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(mode: str = "RGB", size: tuple[int, int] = (90, 60)) -> Image.Image:
    """Noise, which no format makes small."""
    noise = np.random.default_rng(7).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


def truncations() -> Iterator[Attack]:
    """Every format cut off at every tenth."""
    for kind in FORMATS:
        whole = encoded(picture(), kind)
        for tenth in range(10):
            yield Attack(f"{kind} cut at {tenth}0 %", DAMAGED, whole[: len(whole) * tenth // 10])


def _png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _png_with(kind: bytes, body: bytes) -> bytes:
    whole = encoded(picture(), "PNG")
    return whole[:33] + _png_chunk(kind, body) + whole[33:]


def _patched(whole: bytes, at: int, patch: bytes) -> bytes:
    return whole[:at] + patch + whole[at + len(patch) :]


def lies_and_bombs() -> Iterator[Attack]:
    """Headers that promise too much, and small files that unpack to a lot."""
    png = encoded(picture(), "PNG")
    giant = _png_chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    yield Attack("PNG header of 3.6 gigapixels", REFUSED, png[:8] + giant + png[33:])
    yield Attack(
        "BMP header of 4 gigapixels", REFUSED, _patched(encoded(picture(), "BMP"), 18, b"\xff\xff\0\0" * 2)
    )
    yield Attack(
        "GIF screen of 4 gigapixels", REFUSED, _patched(encoded(picture(), "GIF"), 6, b"\xff\xff\xff\xff")
    )
    jpeg = encoded(picture(), "JPEG")
    sof = jpeg.index(b"\xff\xc0")
    yield Attack("JPEG header of 4 gigapixels", REFUSED, _patched(jpeg, sof + 5, b"\xff\xdc\xff\xdc"))
    yield Attack("JPEG of no height", REFUSED, _patched(jpeg, sof + 5, b"\0\0"))
    yield Attack("PNG of 64 megapixels", ("image_too_large",), encoded(Image.new("1", (8000, 8000)), "PNG"))
    yield Attack("PNG of 48 megapixels", (OK,), encoded(Image.new("1", (6900, 6900)), "PNG"))
    zeros = zlib.compress(bytes(50 << 20))
    yield Attack("PNG with a text of 50 MiB", REFUSED, _png_with(b"zTXt", b"k\0\0" + zeros))
    yield Attack("PNG with an iTXt of 50 MiB", REFUSED, _png_with(b"iTXt", b"k\0\1\0\0\0" + zeros))
    yield Attack("PNG with a profile of 50 MiB", REFUSED, _png_with(b"iCCP", b"icc\0\0" + zeros))
    yield Attack("PNG with plain text of 1 MB", (OK,), _png_with(b"tEXt", b"k\0" + SECRET.encode() * 200_000))
    yield Attack(
        "PNG with noise for EXIF",
        (OK, *REFUSED),
        _png_with(b"eXIf", b"MM\0*\0\0\0\x08\xff\xff" + os.urandom(90_000)),
    )
    yield Attack("65 MiB", ("image_too_large",), jpeg + bytes(65 << 20))
    yield Attack("a strip of 60,000 pixels", ("image_aspect",), encoded(Image.new("1", (60_000, 30)), "PNG"))


def odd_but_fine() -> Iterator[Attack]:
    """What decoders meet in the wild, and must read."""
    red, blue = Image.new("RGB", (90, 60), "red"), Image.new("RGB", (90, 60), "blue")
    for kind in ("GIF", "WEBP", "TIFF", "PNG"):
        yield Attack(f"{kind} of two frames", (OK,), encoded(red, kind, save_all=True, append_images=[blue]))
    yield Attack("JPEG of two pictures", (OK,), encoded(red, "MPO", save_all=True, append_images=[blue]))
    kinds = {"CMYK": ("JPEG", "TIFF"), "P": ("PNG", "GIF"), "1": ("PNG", "TIFF"), "L": ("JPEG", "PNG")}
    for mode, kinds_of_mode in (kinds | {"RGBA": ("PNG", "WEBP")}).items():
        for kind in kinds_of_mode:
            yield Attack(f"{mode} {kind}", (OK,), encoded(picture(mode), kind))
    grey = np.arange(90 * 60).reshape(60, 90)
    for name, image, kind in [
        ("16-bit PNG", Image.fromarray(grey.astype(np.uint16)), "PNG"),
        ("16-bit TIFF", Image.fromarray(grey.astype(np.uint16)), "TIFF"),
        ("32-bit TIFF", Image.fromarray((grey - 2000).astype(np.int32)), "TIFF"),
        ("floating TIFF", Image.fromarray(grey.astype(np.float32) * 1e30), "TIFF"),
        ("no number in any pixel", Image.fromarray(np.full((60, 90), np.nan, np.float32)), "TIFF"),
        ("grey with alpha", picture("L").convert("LA"), "PNG"),
        ("LAB", Image.new("LAB", (90, 60)), "TIFF"),
        ("YCbCr", Image.new("YCbCr", (90, 60)), "TIFF"),
    ]:
        yield Attack(name, (OK,), encoded(image, kind))
    yield Attack("a comment", (OK,), encoded(picture(), "JPEG", comment=SECRET.encode() * 10_000))


_FOREIGN = {
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(xyzzy) run\n",
    "PDF": b"%PDF-1.7\n",
    "WMF": b"\xd7\xcd\xc6\x9a" + bytes(60),
    "SVG": b"<svg><image href='file:///etc/passwd'/></svg>",
    "ICO": b"\0\0\1\0\1\0" + bytes(40),
    "PSD": b"8BPS\0\1" + bytes(40),
    "PPM": b"P6 1 1 255 abc",
    "JPEG 2000": b"\0\0\0\x0cjP  \r\n\x87\n",
    "HTML": b"<html>xyzzy",
    "zeros": bytes(1000),
    "one byte": b"\xff",
}
_MAGIC = {
    "JPEG": b"\xff\xd8\xff",
    "PNG": b"\x89PNG\r\n\x1a\n",
    "GIF": b"GIF89a",
    "TIFF": b"II*\0",
    "BMP": b"BM",
}


def foreign_formats() -> Iterator[Attack]:
    """Formats whose decoders are never asked, and noise."""
    for name, data in _FOREIGN.items():
        yield Attack(name, ("image_format",), data)
    for kind, head in _MAGIC.items():
        yield Attack(f"noise called {kind}", REFUSED, head + np.random.default_rng(1).bytes(3000))
    yield Attack("empty", ("image_missing",), b"")
    yield Attack("null", ("image_missing",))


_OUTSIDE = (
    "out",
    "zero",
    "up/outside.png",
    "../outside.png",
    "folder/../../outside.png",
    "/etc/passwd",
    "//etc/passwd",
    "/dev/zero",
    "/proc/self/environ",
)
_NO_FILES = ("fifo", "socket", "folder", "loop", "broken", "gone", "a\0b", "x" * 300, "x/" * 3000, "", ".")
_URLS = (
    "http://127.0.0.1:9/a.png",
    "HTTPS://example.org/a.png",
    "ftp://example.org/a.png",
    "file:///etc/passwd",
    "s3://bucket/a.png",
    "hf://datasets/a/b.png",
    "data:image/png;base64,AAAA",
)


def paths(root: Path) -> Iterator[Attack]:
    """Paths that lead elsewhere, or to what is no file. Makes what they name in and beside *root*."""
    _furnish(root)
    inside = ("good.png", "inside", str(root / "good.png"), "folder/../good.png")
    groups: list[tuple[Sequence[str], Outcome]] = [
        (inside, OK),
        (_OUTSIDE, "path_outside_root"),
        (_NO_FILES, "image_missing"),
        (_URLS, "url_not_allowed"),
    ]
    for names, outcome in groups:
        yield from (Attack(f"path {name[:30]!r}", (outcome,), path=name) for name in names)


def _furnish(root: Path) -> None:
    (root / "folder").mkdir(parents=True)
    for path in (root / "good.png", root.parent / "outside.png"):
        path.write_bytes(encoded(picture(), "PNG"))
    os.mkfifo(root / "fifo")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.path.relpath(root / "socket"))  # the path of a socket is at most 107 bytes
    (root / "inside").symlink_to("good.png")
    (root / "out").symlink_to(root.parent / "outside.png")
    (root / "up").symlink_to(root.parent)
    (root / "zero").symlink_to("/dev/zero")
    (root / "loop").symlink_to("loop")
    (root / "broken").symlink_to("gone")


def texts() -> Iterator[Attack]:
    """Titles that would be special, or broken, or far too long."""
    image = encoded(picture(), "PNG")
    fine = {
        "special tokens": "<|image|><|endoftext|><|user|>[gMASK]<sop><|assistant|><think>",
        "template braces": "{title} {{title}} {0} {title.__class__} }}{{ {% raw %} {{ 7*7 }}",
        "control characters": "\x00\x1b[2J\x07\r\n\u202egnp.exe\u2066\ufeff",
        "percents": "%s %d %(title)s \\1 $title `id`",
    }
    for name, title in fine.items():
        yield Attack(name, (OK,), image, title=f"{SECRET} {title}")
    for name, text in {
        "letters": "a",
        "words": "hello ",
        "emoji": "😀",
        "blanks": " ",
        "digits": "7",
    }.items():
        yield Attack(
            f"4 MB of {name}",
            ("prompt_too_long",),
            image,
            title=SECRET + text * (4_000_000 // len(text.encode())),
        )
    yield Attack("null text", ("prompt_missing_column",), image, title=None)
    yield Attack("not UTF-8", ("text_not_utf8",), image, title=SECRET.encode() + b"\xff\xfe\xed\xa0\x80")


def attacks(root: Path) -> list[Attack]:
    """All of them, each followed by an innocent record."""
    innocent = Attack("innocent", (OK,), encoded(picture(), "PNG"))
    hostile = [*truncations(), *lies_and_bombs(), *odd_but_fine(), *foreign_formats(), *paths(root), *texts()]
    return [record for attack in hostile for record in (attack, innocent)]
