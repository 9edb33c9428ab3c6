"""From an image's bytes or path to uint8 patches, equal to those of transformers' PIL processor.

The header decides before any pixel is decoded. Normalisation is not done here: `normalisation_table`
maps each uint8 value to the very float32 that transformers computes, so the device looks it up.
"""

import errno
import io
import math
import os
import re
import stat
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# Pillow imports its other fifty plugins when it meets a format that is not registered yet.
from PIL import (
    BmpImagePlugin,  # noqa: F401  registers the format
    GifImagePlugin,  # noqa: F401  registers the format
    Image,
    JpegImagePlugin,  # noqa: F401  registers the format
    PngImagePlugin,  # noqa: F401  registers the format
    TiffImagePlugin,  # noqa: F401  registers the format
    WebPImagePlugin,  # noqa: F401  registers the format
)

from glm4v_batch.checkpoint import ImageProcessing
from glm4v_batch.errors import JobError, RecordError, SourceError, said_by, sanitise
from glm4v_batch.failure_codes import FailureCode
from glm4v_batch.types import GridTHW, ImageRef
from glm4v_batch.units import format_bytes, format_count

MAX_ASPECT = 200
"""The longer side of an image may be so many times the shorter one: the model refuses others."""

_PILLOW_PIXELS = 89_478_485  # Image.MAX_IMAGE_PIXELS, above which Pillow warns
_ORIENTATION_TAG = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_MAGIC = re.compile(
    rb"(?P<JPEG>\xff\xd8\xff)|(?P<PNG>\x89PNG\r\n\x1a\n)|(?P<WEBP>RIFF....WEBP)|(?P<GIF>GIF8[79]a)"
    rb"|(?P<BMP>BM)|(?P<TIFF>II[*+]\x00|MM\x00[*+])",
    re.DOTALL,
)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|data:", re.ASCII)
# The path is gone, too long, a loop of links, or a socket or a device without a driver.
_NO_FILE = {errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.ENXIO, errno.ENODEV}
# As `heed_only_bombs` leaves them, the last one set first.
_FILTERS = [("error", None, Image.DecompressionBombWarning, None, 0), ("ignore", None, Warning, None, 0)]
# What Pillow's plugins raise on bytes that are not what their header promises.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    EOFError,
    ArithmeticError,
    RuntimeError,
    struct.error,
    zlib.error,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageLimits:
    """What an image may ask for. Above these the record fails before anything is decoded."""

    max_image_pixels: int = 50_000_000
    max_image_bytes: int = 64 * 1024**2

    def __post_init__(self) -> None:
        if not 0 < self.max_image_pixels <= _PILLOW_PIXELS:
            raise JobError(
                f"max_image_pixels must be at least 1 and at most {_PILLOW_PIXELS:,}, "
                f"where Pillow stops, not {self.max_image_pixels:,}."
            )


@dataclass(frozen=True, slots=True)
class ImagePatches:
    """One image as the model sees it: uint8 [patches, channels × patch_size²] and its grid."""

    patches: NDArray[np.uint8]
    grid: GridTHW


def with_pixel_limits(
    processing: ImageProcessing, min_pixels: int | None, max_pixels: int | None
) -> ImageProcessing:
    """*processing* with the job's limits on height × width of one image; None keeps the checkpoint's.

    transformers compares its limits with height × width × temporal_patch_size, so `max_pixels: 1000000`
    here is `longest_edge: 2000000` there.
    """
    frames = processing.temporal_patch_size
    lowest = processing.min_frame_pixels if min_pixels is None else min_pixels * frames
    highest = processing.max_frame_pixels if max_pixels is None else max_pixels * frames
    if not 0 < lowest <= highest:
        raise JobError(
            f"images.min_pixels ({lowest // frames}) must be at least 1 and at most "
            f"images.max_pixels ({highest // frames})."
        )
    return replace(processing, min_frame_pixels=lowest, max_frame_pixels=highest)


def read_image(
    ref: ImageRef, root: Path | None, limits: ImageLimits, processing: ImageProcessing
) -> ImagePatches:
    """Open, decode, turn upright, resize and cut one image. Raises RecordError."""
    data = _read_bytes(ref, root, limits)
    with _decoding():
        image = to_rgb(_open_header(data, limits))
        height, width = resized_size(image.height, image.width, processing)
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling(processing.resample))
    grid = (1, height // processing.patch_size, width // processing.patch_size)
    # Not np.asarray(image): it asks Pillow for a description first, which costs time where images are small.
    pixels = np.frombuffer(image.tobytes(), np.uint8).reshape(height, width, -1)
    return ImagePatches(patchify(pixels, processing), grid)


def open_image(ref: ImageRef, root: Path | None, limits: ImageLimits) -> Image.Image:
    """The image's header, with its limits checked and no pixel decoded. Raises RecordError."""
    data = _read_bytes(ref, root, limits)
    with _decoding():
        return _open_header(data, limits)


def visual_grid(image: Image.Image, processing: ImageProcessing) -> GridTHW:
    """Frames, patch rows and patch columns of an image that `open_image` returned.

    From its header, except for a PNG, whose EXIF rotation may stand behind its pixels.
    """
    with _decoding():
        # Pillow gives a TIFF's size as it will be after its own rotation.
        turned = image.format != "TIFF" and _orientation(image) >= 5
    height, width = (image.width, image.height) if turned else (image.height, image.width)
    height, width = resized_size(height, width, processing)
    return (1, height // processing.patch_size, width // processing.patch_size)


def resized_size(height: int, width: int, processing: ImageProcessing) -> tuple[int, int]:
    """The (height, width) that an image is resized to; transformers' `smart_resize` to the letter."""
    factor = processing.patch_size * processing.merge_size
    frames = processing.temporal_patch_size
    if height < factor or width < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise RecordError("decode", "image_aspect", f"one side is over {MAX_ASPECT} times the other")
    rows, columns = round(height / factor), round(width / factor)
    frame_pixels = frames * rows * columns * factor**2
    if frame_pixels > processing.max_frame_pixels:
        shrink = math.sqrt((frames * height * width) / processing.max_frame_pixels)
        rows = max(1, math.floor(height / shrink / factor))
        columns = max(1, math.floor(width / shrink / factor))
    elif frame_pixels < processing.min_frame_pixels:
        grow = math.sqrt(processing.min_frame_pixels / (frames * height * width))
        rows, columns = math.ceil(height * grow / factor), math.ceil(width * grow / factor)
    return rows * factor, columns * factor


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode the first frame, turn it upright, and lay it over white.

    16-bit grey keeps its high byte, as 16-bit colour does in Pillow.
    """
    # Before the orientation is asked for: Pillow turns a TIFF itself while loading it, and then
    # forgets its tag; and a PNG may carry its EXIF behind the pixels.
    image.load()
    turn = _TURNS.get(_orientation(image))
    if image.mode.startswith("I"):
        image = _high_byte(image)
    if image.has_transparency_data:
        image = _over_white(image)
    elif image.mode != "RGB":
        image = image.convert("RGB")
    return image if turn is None else image.transpose(turn)


def patchify(pixels: NDArray[np.uint8], processing: ImageProcessing) -> NDArray[np.uint8]:
    """uint8 [height, width, channels] to [patches, channels × patch_size²] in transformers' order.

    The patches of one merge_size × merge_size block are neighbours; in a patch the channel comes first.
    """
    patch, merge = processing.patch_size, processing.merge_size
    height, width, channels = pixels.shape
    blocks = pixels.reshape(
        height // (patch * merge), merge, patch, width // (patch * merge), merge, patch, channels
    )
    return blocks.transpose(0, 3, 1, 4, 6, 2, 5).reshape(-1, channels * patch * patch)


def normalisation_table(processing: ImageProcessing) -> NDArray[np.float32]:
    """float32 [channels, 256]: what transformers' PIL processor makes of each uint8 value.

    The same operations in the same precision and order, hence the same bits.
    """
    values = np.arange(256).astype(np.float64)
    if processing.do_rescale:
        values = values * processing.rescale_factor
    table = np.tile(values.astype(np.float32), (len(processing.image_mean), 1))
    if processing.do_normalize:
        mean = np.array(processing.image_mean, dtype=np.float32)[:, None]
        std = np.array(processing.image_std, dtype=np.float32)[:, None]
        table = (table - mean) / std
    return table


def visual_tokens(grid: GridTHW, merge_size: int) -> int:
    """Prompt tokens that one image takes up.

    >>> visual_tokens((1, 24, 36), 2)
    216
    """
    frames, rows, columns = grid
    return frames * rows * columns // merge_size**2


def _read_bytes(ref: ImageRef, root: Path | None, limits: ImageLimits) -> bytes:
    data = ref.data if ref.data is not None else _read_file(ref.path, root, limits)
    if not data:
        raise RecordError("read", "image_missing", "the image is empty")
    if len(data) > limits.max_image_bytes:
        raise _too_large(_size_message(len(data), limits))
    return data


def _read_file(path: str | None, root: Path | None, limits: ImageLimits) -> bytes:
    if path is None:
        raise RecordError("read", "image_missing", "the image is null")
    if _URL.match(path):
        raise RecordError("read", "url_not_allowed", "the image is a URL, and nothing is downloaded")
    if root is None:
        raise RecordError("read", "path_outside_root", "the image is a path, but source.root is not set")
    file_path = _below(root, path)
    try:
        if not file_path.is_file():  # asked before it is opened: opening a device may do something
            raise _no_file()
        return _read_regular(file_path, root, limits)
    except PermissionError as error:
        raise RecordError("read", "image_unreadable", "the file may not be read by this user") from error
    except OSError as error:
        if error.errno in _NO_FILE:
            raise _no_file() from error
        raise SourceError(  # the disk's trouble is not the record's
            f"{sanitise(str(file_path))} cannot be read: {error.strerror}.",
            hint="What is committed is safe. Mend this, then run the same command again.",
        ) from error


def _read_regular(path: Path, root: Path, limits: ImageLimits) -> bytes:
    # Between the look and this moment another may stand there: a link, or a FIFO that would hang.
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
    with os.fdopen(os.open(path, flags), "rb") as file:
        _check_opened(file.fileno(), root)
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise _no_file()
        if status.st_size > limits.max_image_bytes:
            raise _too_large(_size_message(status.st_size, limits))
        return file.read(limits.max_image_bytes + 1)


def _check_opened(descriptor: int, root: Path) -> None:
    """Where the kernel tells the path of an open file, it must be below *root* as well."""
    link = Path(f"/proc/self/fd/{descriptor}")
    if link.is_symlink() and not link.readlink().is_relative_to(root.resolve()):
        raise _outside()


def _no_file() -> RecordError:
    return RecordError("read", "image_missing", "there is no such regular file")


def _outside() -> RecordError:
    return RecordError("read", "path_outside_root", "the path leads outside source.root")


def _below(root: Path, path: str) -> Path:
    """*path* with its links followed, which must end below *root*."""
    base = root.resolve()
    try:
        resolved = (base / path).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name too long, a NUL
        raise RecordError("read", "image_missing", "the path cannot be followed") from error
    if not resolved.is_relative_to(base):
        raise _outside()
    return resolved


def _open_header(data: bytes, limits: ImageLimits) -> Image.Image:
    found = _MAGIC.match(data)
    if found is None:
        raise RecordError("decode", "image_format", "the bytes are not JPEG, PNG, WebP, GIF, BMP or TIFF")
    image = Image.open(io.BytesIO(data), formats=(str(found.lastgroup),))
    num_pixels = image.width * image.height
    if num_pixels > limits.max_image_pixels:
        allowed = limits.max_image_pixels
        raise _too_large(f"{format_count(num_pixels, 'pixel')} are more than the {allowed:,} allowed")
    return image


def _orientation(image: Image.Image) -> int:
    orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    return orientation if orientation in _TURNS else 1


def _over_white(image: Image.Image) -> Image.Image:
    rgba = image.convert("RGBA")
    white = Image.new("RGB", rgba.size, "white")
    white.paste(rgba, mask=rgba.getchannel("A"))
    return white


def _high_byte(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64).clip(0, 0xFFFF)
    return Image.fromarray((values >> 8).astype(np.uint8))


def _too_large(message: str) -> RecordError:
    return RecordError("decode", "image_too_large", message)


def _size_message(num_bytes: int, limits: ImageLimits) -> str:
    return f"{format_bytes(num_bytes)} are more than the {format_bytes(limits.max_image_bytes)} allowed"


def heed_only_bombs() -> None:
    """Have this process ignore warnings, but take Pillow's of decompression bombs for errors.

    For processes that do nothing but decode: to set this anew for each image takes a twentieth of their
    time.
    """
    warnings.simplefilter("ignore")
    warnings.simplefilter("error", Image.DecompressionBombWarning)


@contextmanager
def _only_bombs_warn() -> Iterator[None]:
    with warnings.catch_warnings():
        heed_only_bombs()
        yield


@contextmanager
def _decoding() -> Iterator[None]:
    """Turn what Pillow raises or warns of into a RecordError with a stable code."""
    with nullcontext() if warnings.filters[:2] == _FILTERS else _only_bombs_warn():
        try:
            yield
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise _too_large("decoding it would take too much memory") from error
        except _DECODE_ERRORS as error:
            # Pillow has one OSError for both; only its message tells a file that was cut off.
            cut = "truncated" in str(error).lower()
            code: FailureCode = "image_truncated" if cut else "image_corrupt"
            raise RecordError("decode", code, said_by(error)) from error
