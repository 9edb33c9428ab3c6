"""Every reason why a row can have no answer: a closed list, each with what it means and what to do about it.

A code is stable: programs may compare it. mypy refuses a `RecordError` or `Failure` with any other.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Stage = Literal["read", "decode", "render", "generate"]

FailureCode = Literal[
    "image_missing",
    "image_unreadable",
    "path_outside_root",
    "url_not_allowed",
    "record_too_large",
    "image_format",
    "image_truncated",
    "image_corrupt",
    "image_too_large",
    "image_aspect",
    "text_not_utf8",
    "prompt_missing_column",
    "prompt_column_type",
    "prompt_too_long",
    "no_new_tokens",
    "decoder_crashed",
    "decoder_timeout",
    "preprocess_error",
    "out_of_memory",
    "replica_crashed",
]


@dataclass(frozen=True, slots=True)
class FailureKind:
    """One code: the stages in which it occurs, what was wrong, and what to do about it."""

    stages: tuple[Stage, ...]
    meaning: str
    remedy: str


FAILURE_KINDS: Mapping[FailureCode, FailureKind] = {
    "image_missing": FailureKind(
        ("read",),
        "the image is null or empty, or its path names no regular file",
        "Put the file there, or the image into the row.",
    ),
    "image_unreadable": FailureKind(
        ("read",), "this user may not read the file", "Mend the file's permissions."
    ),
    "path_outside_root": FailureKind(
        ("read",),
        "the path leads out of `source.root`, or there is no `source.root`",
        "Set `source.root` to a folder that holds all images, or copy the image there.",
    ),
    "url_not_allowed": FailureKind(
        ("read",),
        "the image is a URL, and nothing is ever downloaded for a record",
        "Download the image and store its bytes, or its path below `source.root`.",
    ),
    "record_too_large": FailureKind(
        ("read",),
        "the cells that the job needs of a Parquet row take more than 128 MiB, an item of a list 128 bytes "
        "at least",
        "Shorten the row, or pass fewer columns through.",
    ),
    "image_format": FailureKind(
        ("decode",),
        "the bytes are not JPEG, PNG, WebP, GIF, BMP or TIFF",
        "Convert the image.",
    ),
    "image_truncated": FailureKind(("decode",), "the image ends before its pixels do", "Fetch it again."),
    "image_corrupt": FailureKind(
        ("decode",), "the image breaks the rules of its format", "Fetch or convert it again."
    ),
    "image_too_large": FailureKind(
        ("decode",),
        "the image has more pixels or bytes than is allowed; it was not decoded",
        "Scale it down, or raise `images.max_image_pixels` or `images.max_image_bytes`.",
    ),
    "image_aspect": FailureKind(
        ("decode",), "one side is over 200 times the other, which the model refuses", "Crop or pad it."
    ),
    "text_not_utf8": FailureKind(
        ("read", "render"), "a text that the prompt needs is not valid Unicode", "Mend the column's encoding."
    ),
    "prompt_missing_column": FailureKind(
        ("render",),
        "a column that the prompt needs is null in this row",
        "Fill it, or leave it out of the prompt.",
    ),
    "prompt_column_type": FailureKind(
        ("render",), "a column that the prompt needs is no text or number", "Convert the column to text."
    ),
    "prompt_too_long": FailureKind(
        ("render",),
        "prompt, images and answer exceed the model's context",
        "Shorten the text, lower `images.max_pixels` or `generation.max_new_tokens`.",
    ),
    "no_new_tokens": FailureKind(
        ("render",),
        "the column of `generation.max_new_tokens_column` holds 0 or less",
        "Put 1 or more there, or a null for the job's own number.",
    ),
    "decoder_crashed": FailureKind(
        ("decode",),
        "the process that prepared the record died, twice with nothing else in hand "
        "(five times where others killed it)",
        "Convert the image; keep the file, for it shows a fault of a library.",
    ),
    "decoder_timeout": FailureKind(
        ("decode",),
        "preparing the record took too much time, twice with nothing else in hand",
        "Scale the image down or shorten the text. If many rows have it, look at the images' disk.",
    ),
    "preprocess_error": FailureKind(
        ("decode",),
        "an error that nobody expected, about this record alone",
        "Please report it: it is a bug.",
    ),
    "out_of_memory": FailureKind(
        ("decode", "generate"),
        "preparing the record took too much memory, or it does not fit on the device even alone",
        "Lower `images.max_pixels`, shorten the text, or use a larger GPU.",
    ),
    "replica_crashed": FailureKind(
        ("generate",),
        "the model's process died over the record, twice with nothing else in hand",
        "Look at the log of the run; lower `images.max_pixels`.",
    ),
}
"""In the order of the pipe. The README's table is made of these by a test's help."""
