"""Pixels equal to transformers', limits before decoding, and a stable code for each bad image."""

import io
import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageOps

from glm4v_batch.checkpoint import ImageProcessing
from glm4v_batch.errors import JobError, RecordError
from glm4v_batch.images import (
    ImageLimits,
    ImagePatches,
    heed_only_bombs,
    normalisation_table,
    open_image,
    read_image,
    resized_size,
    visual_grid,
    with_pixel_limits,
)
from glm4v_batch.types import ImageRef

LIMITS = ImageLimits()
# The limits that GLM-4V checkpoints are published with.
PUBLISHED = ImageProcessing(min_frame_pixels=12544, max_frame_pixels=9633792)
SMALL = ImageProcessing(min_frame_pixels=12544, max_frame_pixels=156800)
SIZES = [
    (1, 1),
    (5, 900),
    (14, 14),
    (28, 28),
    (64, 64),
    (84, 56),
    (97, 131),
    (300, 200),
    (640, 480),
    (30, 5900),
]


def noise(mode: str, size: tuple[int, int], seed: int = 0) -> Image.Image:
    width, height = size
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (height, width, 4), dtype=np.uint8), "RGBA")
    return image.convert("RGB").convert(mode)


def encoded(image: Image.Image, image_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def read(data: bytes, processing: ImageProcessing = SMALL, limits: ImageLimits = LIMITS) -> ImagePatches:
    return read_image(ImageRef(data=data), None, limits, processing)


def pixel_values(patches: NDArray[np.uint8], processing: ImageProcessing) -> NDArray[np.float32]:
    """The numpy reference of what the device does: look up, then repeat over the temporal axis."""
    table = normalisation_table(processing)
    by_channel = patches.reshape(len(patches), len(table), -1)
    values = table[np.arange(len(table))[:, None], by_channel][:, :, None]
    return values.repeat(processing.temporal_patch_size, axis=2).reshape(len(patches), -1)


def theirs(image: Image.Image, processing: ImageProcessing) -> Any:
    from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil

    make: Any = Glm4vImageProcessorPil  # its annotations lack its own settings
    processor = make(
        size={"shortest_edge": processing.min_frame_pixels, "longest_edge": processing.max_frame_pixels},
        patch_size=processing.patch_size,
        temporal_patch_size=processing.temporal_patch_size,
        merge_size=processing.merge_size,
        resample=processing.resample,
        do_rescale=processing.do_rescale,
        do_normalize=processing.do_normalize,
    )
    return processor(images=image, return_tensors="np")


def assert_equal_to_transformers(data: bytes, upright: Image.Image, processing: ImageProcessing) -> None:
    ours, reference = read(data, processing), theirs(upright, processing)

    assert [list(ours.grid)] == reference["image_grid_thw"].tolist()
    assert ours.patches.dtype == np.uint8
    values = pixel_values(ours.patches, processing)
    assert values.dtype == reference["pixel_values"].dtype
    assert values.tobytes() == np.ascontiguousarray(reference["pixel_values"]).tobytes()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("processing", [PUBLISHED, SMALL], ids=["published", "small"])
def test_pixels_equal_transformers_at_every_size(size: tuple[int, int], processing: ImageProcessing) -> None:
    image = noise("RGB", size)

    assert_equal_to_transformers(encoded(image, "PNG"), image, processing)


@pytest.mark.parametrize(
    ("mode", "image_format"),
    [
        ("RGB", "JPEG"),
        ("L", "JPEG"),
        ("CMYK", "JPEG"),
        ("RGB", "WEBP"),
        ("RGB", "BMP"),
        ("RGB", "TIFF"),
        ("CMYK", "TIFF"),
        ("P", "GIF"),
        ("P", "PNG"),
        ("L", "PNG"),
        ("1", "PNG"),
        ("1", "TIFF"),
    ],
)
def test_opaque_pixels_equal_transformers_in_every_mode(mode: str, image_format: str) -> None:
    data = encoded(noise(mode, (120, 90)), image_format)

    assert_equal_to_transformers(data, Image.open(io.BytesIO(data)).convert("RGB"), SMALL)


@pytest.mark.parametrize(
    "processing",
    [
        replace(SMALL, resample=2),
        replace(SMALL, do_normalize=False),
        replace(SMALL, do_rescale=False),
        replace(SMALL, patch_size=16, merge_size=1, temporal_patch_size=1),
    ],
    ids=["bilinear", "not normalised", "not rescaled", "other patches"],
)
def test_pixels_follow_the_checkpoint_settings(processing: ImageProcessing) -> None:
    image = noise("RGB", (150, 100))

    assert_equal_to_transformers(encoded(image, "PNG"), image, processing)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_rotation_is_applied_exactly_once(orientation: int, image_format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(noise("RGB", (200, 60)), image_format, exif=exif)

    with Image.open(io.BytesIO(data)) as opened:
        upright = ImageOps.exif_transpose(opened)

    assert (upright.width < upright.height) == (orientation >= 5)
    assert_equal_to_transformers(data, upright.convert("RGB"), SMALL)


@pytest.mark.parametrize("orientation", [0, 9, 60000])
def test_senseless_exif_rotation_is_ignored(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = noise("RGB", (90, 60))

    assert_equal_to_transformers(encoded(image, "PNG", exif=exif), image, SMALL)


def flat(data: bytes) -> list[int]:
    """The colour of an image of one colour."""
    patches = read(data).patches.reshape(-1, 3, 14 * 14)
    colours = {tuple(colour) for colour in patches.transpose(0, 2, 1).reshape(-1, 3).tolist()}
    assert len(colours) == 1
    return list(colours.pop())


@pytest.mark.parametrize("image_format", ["PNG", "WEBP"])
def test_alpha_is_laid_over_white(image_format: str) -> None:
    half = Image.new("RGBA", (84, 84), (255, 0, 0, 128))

    assert flat(encoded(half, image_format, **({"lossless": True} if image_format == "WEBP" else {}))) == [
        255,
        127,
        127,
    ]


@pytest.mark.parametrize(
    ("image", "options"),
    [
        (Image.new("LA", (84, 84), (0, 0)), {}),
        (Image.new("P", (84, 84), 0), {"transparency": 0}),
        (Image.new("P", (84, 84), 0), {"transparency": b"\x00\xff"}),
        (Image.new("L", (84, 84), 7), {"transparency": 7}),
        (Image.new("RGB", (84, 84), (1, 2, 3)), {"transparency": (1, 2, 3)}),
    ],
    ids=["grey and alpha", "palette", "palette with alpha bytes", "grey key", "colour key"],
)
def test_every_kind_of_transparency_turns_white(image: Image.Image, options: dict[str, Any]) -> None:
    assert flat(encoded(image, "PNG", **options)) == [255, 255, 255]


@pytest.mark.parametrize("image_format", ["PNG", "TIFF"])
def test_16_bit_grey_keeps_its_shades(image_format: str) -> None:
    image = Image.fromarray(np.full((84, 84), 0x80FF, dtype=np.uint16))

    assert flat(encoded(image, image_format)) == [128, 128, 128]


def test_first_frame_of_an_animation_is_read() -> None:
    red, blue = (Image.new("RGB", (84, 84), colour) for colour in ("red", "blue"))

    assert flat(encoded(red, "GIF", save_all=True, append_images=[blue])) == [255, 0, 0]


@given(height=st.integers(1, 3000), width=st.integers(1, 3000))
def test_resized_size_equals_smart_resize(height: int, width: int) -> None:
    from transformers.models.glm4v.image_processing_pil_glm4v import smart_resize

    for processing in (PUBLISHED, SMALL):
        limits = (processing.min_frame_pixels, processing.max_frame_pixels)
        try:
            expected = smart_resize(2, height, width, 2, 28, *limits)
        except ValueError:
            with pytest.raises(RecordError, match="200 times"):
                resized_size(height, width, processing)
        else:
            assert resized_size(height, width, processing) == expected


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_grid_is_known_from_the_header(image_format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(noise("RGB", (200, 60)), image_format, exif=exif)

    header = open_image(ImageRef(data=data), None, LIMITS)

    assert visual_grid(header, SMALL) == read(data).grid


@given(values=st.lists(st.integers(0, 255), min_size=1, max_size=8))
def test_table_holds_the_floats_of_the_definition(values: list[int]) -> None:
    table = normalisation_table(SMALL)

    expected = (np.array(values) / 255 - SMALL.image_mean[1]) / SMALL.image_std[1]
    np.testing.assert_allclose(table[1, values], expected, rtol=1e-5, atol=1e-6)
    assert table.shape == (3, 256)
    assert table.dtype == np.float32


def test_job_pixel_limits_count_one_image() -> None:
    limited = with_pixel_limits(SMALL, 28 * 28, 56 * 56)

    assert resized_size(1000, 1000, limited) == (56, 56)
    assert resized_size(28, 28, limited) == (28, 28)
    assert with_pixel_limits(SMALL, None, None) == SMALL


@pytest.mark.parametrize(("lowest", "highest"), [(0, None), (5000, 4000), (None, 10)])
def test_pixel_limits_that_exclude_everything_are_refused(lowest: int | None, highest: int | None) -> None:
    with pytest.raises(JobError, match=r"images.min_pixels"):
        with_pixel_limits(SMALL, lowest, highest)


PHOTO = encoded(noise("RGB", (300, 200)), "JPEG")


def code_of(call: Callable[[], object]) -> tuple[str, str]:
    with pytest.raises(RecordError) as caught:
        call()
    return caught.value.stage, caught.value.code


@pytest.mark.parametrize(
    "data", [b"%PDF-1.7", b"%!PS-Adobe-3.0 EPSF", b"<svg/>", b"\x00" * 40, b"P6 1 1 255 abc"]
)
def test_formats_off_the_list_are_refused(data: bytes) -> None:
    assert code_of(lambda: read(data)) == ("decode", "image_format")


def test_null_and_empty_images_are_missing() -> None:
    assert code_of(lambda: read(b"")) == ("read", "image_missing")
    assert code_of(lambda: read_image(ImageRef(), None, LIMITS, SMALL)) == ("read", "image_missing")


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "GIF", "BMP", "TIFF"])
def test_image_cut_off_in_its_pixels_is_truncated(image_format: str) -> None:
    data = encoded(noise("RGB", (300, 200)), image_format)
    shortened = data[: len(data) // 2]

    stage, code = code_of(lambda: read(shortened))

    # A TIFF may have its directory behind its pixels, and then has lost it.
    assert stage == "decode"
    assert code == "image_truncated" or (image_format == "TIFF" and code == "image_corrupt")


@pytest.mark.parametrize(
    "data", [b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n????", b"GIF89a", b"RIFF0000WEBPVP8 "]
)
def test_header_without_an_image_is_corrupt(data: bytes) -> None:
    assert code_of(lambda: read(data))[1] in ("image_corrupt", "image_truncated")


@given(st.data())
def test_damaged_images_fail_with_a_code_or_decode(choice: st.DataObject) -> None:
    data = bytearray(DAMAGEABLE[choice.draw(st.sampled_from(sorted(DAMAGEABLE)))])
    for position in choice.draw(st.lists(st.integers(0, len(data) - 1), max_size=6)):
        data[position] = choice.draw(st.integers(0, 255))

    code = outcome(bytes(data[: choice.draw(st.integers(1, len(data)))]))

    assert code == "ok" or code.startswith("image_")


def outcome(data: bytes) -> str:
    try:
        read(data)
    except RecordError as error:
        return error.code
    return "ok"


DAMAGEABLE = {
    name: encoded(noise("RGB", (40, 30)), name) for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
}


def test_long_thin_image_fails_by_its_aspect() -> None:
    assert code_of(lambda: read(encoded(noise("RGB", (6000, 28)), "PNG"))) == ("decode", "image_aspect")


@pytest.mark.parametrize("side", [100, 9_000, 20_000])
def test_too_many_pixels_fail_before_decoding_and_warn_nobody(side: int) -> None:
    data = bytearray(encoded(Image.new("1", (8, 8)), "BMP"))
    data[18:26] = side.to_bytes(4, "little") * 2  # the header alone is read

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        code = code_of(lambda: read(bytes(data), limits=ImageLimits(max_image_pixels=64)))

    assert code == ("decode", "image_too_large")
    assert seen == []


@pytest.mark.parametrize("side", [100, 9_000, 20_000])
def test_a_process_that_heeds_only_bombs_sets_no_warnings_anew(
    side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = bytearray(encoded(Image.new("1", (8, 8)), "BMP"))
    data[18:26] = side.to_bytes(4, "little") * 2

    with warnings.catch_warnings(record=True) as seen:
        heed_only_bombs()
        with monkeypatch.context() as patched:
            patched.setattr(warnings, "catch_warnings", None)
            code = code_of(lambda: read(bytes(data), limits=ImageLimits(max_image_pixels=64)))

    assert code == ("decode", "image_too_large")
    assert seen == []


def test_warnings_are_as_they_were_after_an_image() -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        read(encoded(noise("RGB", (64, 64)), "PNG"))
        warnings.warn("still heard", UserWarning, stacklevel=1)

    assert len(seen) == 1


def test_pixel_limit_that_pillow_would_not_honour_is_refused() -> None:
    assert Image.MAX_IMAGE_PIXELS == 89_478_485

    with pytest.raises(JobError, match="max_image_pixels"):
        ImageLimits(max_image_pixels=100_000_000)


def test_too_many_bytes_fail_before_the_header() -> None:
    assert code_of(lambda: read(PHOTO, limits=ImageLimits(max_image_bytes=100))) == (
        "decode",
        "image_too_large",
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root" / "inner").mkdir(parents=True)
    (tmp_path / "root" / "photo.jpg").write_bytes(PHOTO)
    (tmp_path / "secret.jpg").write_bytes(PHOTO)
    return tmp_path / "root"


def read_path(path: str, root: Path | None, limits: ImageLimits = LIMITS) -> ImagePatches:
    return read_image(ImageRef(path=path), root, limits, SMALL)


@pytest.mark.parametrize("path", ["photo.jpg", "inner/../photo.jpg", "./photo.jpg"])
def test_path_below_the_root_is_read(root: Path, path: str) -> None:
    assert (read_path(path, root).patches == read(PHOTO).patches).all()


def test_absolute_path_and_link_inside_the_root_are_read(root: Path) -> None:
    (root / "inner" / "link.jpg").symlink_to(root / "photo.jpg")

    assert read_path(str(root / "photo.jpg"), root).grid == read_path("inner/link.jpg", root).grid


@pytest.mark.parametrize("path", ["../secret.jpg", "/etc/passwd", "inner/../../secret.jpg", "link.jpg"])
def test_path_outside_the_root_is_refused(root: Path, path: str) -> None:
    (root / "link.jpg").symlink_to(root.parent / "secret.jpg")

    assert code_of(lambda: read_path(path, root)) == ("read", "path_outside_root")


def test_path_without_a_root_is_refused(root: Path) -> None:
    assert code_of(lambda: read_path(str(root / "photo.jpg"), None)) == ("read", "path_outside_root")


@pytest.mark.parametrize("path", ["nothing.jpg", "photo.jpg/x", "inner", "pipe", "loop", "a\0b", "x" * 5000])
def test_path_that_is_no_file_is_missing_and_never_hangs(root: Path, path: str) -> None:
    os.mkfifo(root / "pipe")
    (root / "loop").symlink_to(root / "loop")

    assert code_of(lambda: read_path(path, root)) == ("read", "image_missing")


@pytest.mark.parametrize(
    "path", ["https://example.org/a.jpg", "file:///etc/passwd", "data:image/png;base64,AA"]
)
def test_url_is_never_followed(root: Path, path: str) -> None:
    assert code_of(lambda: read_path(path, root)) == ("read", "url_not_allowed")


def test_path_that_turns_into_a_link_or_a_fifo_when_it_is_opened_is_refused(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(root / "pipe")
    (root / "link.jpg").symlink_to(root.parent / "secret.jpg")
    # As if the look at the name had come before another stood there.
    monkeypatch.setattr(Path, "resolve", lambda path: path)
    monkeypatch.setattr(Path, "is_file", lambda _: True)

    assert code_of(lambda: read_path("link.jpg", root)) == ("read", "image_missing")
    assert code_of(lambda: read_path("pipe", root)) == ("read", "image_missing")


def test_path_whose_folder_turns_into_a_link_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "inner").rmdir()
    (root / "inner").symlink_to(root.parent)
    looked = Path.resolve
    monkeypatch.setattr(Path, "resolve", lambda path: path if path.name == "secret.jpg" else looked(path))

    assert code_of(lambda: read_path("inner/secret.jpg", root)) == ("read", "path_outside_root")


def test_a_failure_quotes_nothing_of_the_image() -> None:
    broken = bytearray(encoded(noise("RGB", (40, 30)), "PNG"))
    broken[37:41] = b"zzzz"  # the name of the chunk after the header

    with pytest.raises(RecordError) as caught:
        read(bytes(broken))

    assert caught.value.code == "image_corrupt"
    assert "zzzz" not in str(caught.value)


def test_large_file_is_refused_unread(root: Path) -> None:
    with (root / "sparse.jpg").open("wb") as file:
        file.truncate(2**40)

    assert code_of(lambda: read_path("sparse.jpg", root)) == ("decode", "image_too_large")
