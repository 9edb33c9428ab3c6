"""Draw the sample records: pictures of coloured shapes and signs with one true caption and one question each.

The caption is a function of the picture: elements are named along the axis on which they lie, from left to
right or from top to bottom, and a placement in which that axis is not clear is never drawn.

Example:
    python -m data.render_scenes --output data/scenes
"""

import argparse
import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFont

RGB = tuple[int, int, int]
Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS: dict[str, RGB] = {
    "red": (215, 30, 40),
    "green": (30, 150, 60),
    "blue": (35, 75, 210),
    "yellow": (245, 210, 20),
    "orange": (245, 125, 15),
    "purple": (130, 40, 170),
    "black": (20, 20, 20),
    "grey": (135, 135, 135),
}
GREY_COLOURS = ("black", "grey")
# Diameters as fractions of the picture's shorter side, with a clear gap between the two.
SIZES = {"large": (0.41, 0.47), "small": (0.22, 0.27)}
WORDS: tuple[str, ...] = _words(
    """
    ant arm bag bed bee box bus cab cap cat cow cup dog ear egg exit fan farm fish fly fox gate gift
    hat hen hill ice ink jam jar key kite lamp leaf lid lion map milk moon mug nut open owl pan park
    pen pig rain rope salt shop snow stop sun tea toy train up van zoo
    """
)
TITLE_ADJECTIVES: tuple[str, ...] = _words(
    """
    brave calm eager fancy gentle happy jolly kind lucky proud quiet swift
    """
)
TITLE_NOUNS: tuple[str, ...] = _words(
    """
    album archive bulletin catalogue chapter folio gallery journal memo notebook record sketch
    """
)

MIN_SIDE, MAX_SIDE, MAX_ASPECT = 56, 448, 4.0
FACTOR = 28  # pixels per visual token and axis: 14-pixel patches, merged 2 x 2
# The limits of data/tiny-glm4v/preprocessor_config.json, counted like there: both temporal copies.
MIN_PIXELS, MAX_PIXELS = 12544, 156800
# EXIF orientation to the transposition that stores an upright picture under it.
STORE_AS: dict[int, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
EXIF_ORIENTATION = 0x0112
HELD_OUT_SEED = "held-out"  # training draws from Random(f"train/..."): see `held_out_rng`


@dataclass(frozen=True, slots=True)
class Shape:
    """One drawn shape; *x*, *y* is its centre and *diameter* its extent, in pixels."""

    kind: str
    colour: str
    size: str
    x: float = 0.0
    y: float = 0.0
    diameter: float = 0.0

    @property
    def phrase(self) -> str:
        """The shape as the caption names it."""
        return f"a {self.size} {self.colour} {self.kind}"


@dataclass(frozen=True, slots=True)
class Layout:
    """What stands where. *horizontal* tells along which axis the shapes are ordered."""

    width: int
    height: int
    shapes: tuple[Shape, ...]
    horizontal: bool
    sign: str | None
    sign_box: Box | None
    font_size: int

    @property
    def relation(self) -> str:
        """How each shape stands to the next one."""
        return "left of" if self.horizontal else "above"


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture with everything that can be asked about it."""

    image: Image.Image
    title: str
    question: str
    answer: str
    caption: str
    layout: Layout
    grey: bool


def smart_resize(width: int, height: int) -> tuple[int, int]:
    """The (width, height) that the image processor of the tiny checkpoint resizes a picture to."""
    new_width, new_height = round(width / FACTOR) * FACTOR, round(height / FACTOR) * FACTOR
    if 2 * new_width * new_height > MAX_PIXELS:
        beta = math.sqrt(2 * width * height / MAX_PIXELS)
        new_width = max(FACTOR, math.floor(width / beta / FACTOR) * FACTOR)
        new_height = max(FACTOR, math.floor(height / beta / FACTOR) * FACTOR)
    elif 2 * new_width * new_height < MIN_PIXELS:
        beta = math.sqrt(MIN_PIXELS / (2 * width * height))
        new_width = math.ceil(width * beta / FACTOR) * FACTOR
        new_height = math.ceil(height * beta / FACTOR) * FACTOR
    return new_width, new_height


def visual_tokens(width: int, height: int) -> int:
    """Prompt tokens that a picture of this size takes up.

    >>> visual_tokens(448, 448)
    100
    """
    new_width, new_height = smart_resize(width, height)
    return new_width * new_height // FACTOR**2


def picture_size(rng: Random) -> tuple[int, int]:
    """A random (width, height): each side 56 to 448 pixels, aspect ratio at most 1:4."""
    while True:
        area_root = rng.uniform(MIN_SIDE, 340)
        stretch = MAX_ASPECT ** rng.triangular(-0.5, 0.5)
        width, height = round(area_root * stretch), round(area_root / stretch)
        if min(width, height) >= MIN_SIDE and max(width, height) <= MAX_SIDE:
            return width, height


@lru_cache(maxsize=128)
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow must be built with FreeType"
    return font


def _sign_text(rng: Random) -> str:
    if rng.random() < 0.7:
        return rng.choice(WORDS)
    digits = rng.randint(1, 3)
    return str(rng.randint(10 ** (digits - 1) if digits > 1 else 0, 10**digits - 1))


def _sign_size(text: str, font_size: int) -> tuple[float, float]:
    return _font(font_size).getlength(text) + 0.6 * font_size, 1.5 * font_size


def _place_sign(rng: Random, width: int, height: int, text: str, alone: bool) -> tuple[Box, Box, int] | None:
    """Put the sign at an edge: its box, the box left over for shapes, and the font size."""
    resized_width, resized_height = smart_resize(width, height)
    scale = min(resized_width / width, resized_height / height)
    font_size = math.ceil(rng.uniform(22, 32) / scale)
    sign_width, sign_height = _sign_size(text, font_size)
    if sign_width > width - 4 or sign_height > height - 4:
        return None
    left = rng.uniform(2, width - 2 - sign_width)
    top = rng.uniform(2, height - 2 - sign_height)
    if alone:
        return (left, top, left + sign_width, top + sign_height), (0, 0, 0, 0), font_size
    if width > 1.6 * height:
        left = rng.choice((2, width - 2 - sign_width))
        free: Box = (sign_width + 4, 0, width, height) if left == 2 else (0, 0, left - 2, height)
    else:
        top = rng.choice((2, height - 2 - sign_height))
        free = (0, sign_height + 4, width, height) if top == 2 else (0, 0, width, top - 2)
    return (left, top, left + sign_width, top + sign_height), free, font_size


def _spread(rng: Random, extents: Sequence[float], start: float, end: float) -> list[float] | None:
    """Random ordered centres between *start* and *end* for extents that must not touch."""
    slack = (end - start) - sum(extents) - 4 * (len(extents) + 1)
    if slack < 0:
        return None
    cuts = sorted(rng.uniform(0, slack) for _ in extents)
    centres, used = [], start + 4.0
    for extent, cut in zip(extents, cuts, strict=True):
        centres.append(used + cut + extent / 2)
        used += extent + 4
    return centres


def _across(rng: Random, extents: Sequence[float], start: float, end: float) -> list[float] | None:
    if max(extents) + 6 > end - start:
        return None
    return [rng.uniform(start + extent / 2 + 3, end - extent / 2 - 3) for extent in extents]


def _place_shapes(
    rng: Random, shapes: Sequence[Shape], box: Box, horizontal: bool
) -> tuple[Shape, ...] | None:
    """Place *shapes* in *box* along one axis, or None where that axis would not be clear."""
    extents = [shape.diameter for shape in shapes]
    along_span, across_span = ((box[0], box[2]), (box[1], box[3]))[:: 1 if horizontal else -1]
    along = _spread(rng, extents, *along_span)
    across = _across(rng, extents, *across_span)
    if along is None or across is None:
        return None
    for i in range(len(shapes) - 1):
        if along[i + 1] - along[i] < 1.7 * abs(across[i + 1] - across[i]):
            return None
    centres = zip(along, across, strict=True) if horizontal else zip(across, along, strict=True)
    return tuple(replace(s, x=x, y=y) for s, (x, y) in zip(shapes, centres, strict=True))


def _random_shapes(rng: Random, count: int, short_side: int, grey: bool) -> list[Shape]:
    shapes = []
    for _ in range(count):
        size = rng.choice(("large", "small"))
        colour = rng.choice(GREY_COLOURS) if grey else rng.choice(tuple(COLOURS))
        shapes.append(
            Shape(rng.choice(SHAPES), colour, size, diameter=short_side * rng.uniform(*SIZES[size]))
        )
    return shapes


def _plan(rng: Random, max_elements: int) -> tuple[int, bool]:
    """How many shapes, and whether there is a sign."""
    if max_elements == 1:
        return (0, True) if rng.random() < 0.35 else (1, False)
    if max_elements == 2:
        return rng.choices(((1, False), (0, True), (2, False), (1, True)), (2, 1, 4, 4))[0]
    plans = ((1, False), (0, True), (2, False), (1, True), (3, False), (2, True))
    return rng.choices(plans, (1, 1, 3, 2, 5, 5))[0]


def _try_layout(rng: Random, width: int, height: int, max_elements: int, grey: bool) -> Layout | None:
    count, has_sign = _plan(rng, max_elements)
    box: Box = (0, 0, width, height)
    sign, sign_box, font_size = None, None, 0
    if has_sign:
        sign = _sign_text(rng)
        placed = _place_sign(rng, width, height, sign, alone=count == 0)
        if placed is None:
            return None
        sign_box, box, font_size = placed
    shapes = _random_shapes(rng, count, min(width, height), grey)
    horizontal = rng.random() < 0.5
    if shapes:
        placed_shapes = _place_shapes(rng, shapes, box, horizontal)
        if placed_shapes is None:
            return None
        shapes = list(placed_shapes)
    return Layout(width, height, tuple(shapes), horizontal, sign, sign_box, font_size)


def random_layout(
    rng: Random, size: tuple[int, int] | None = None, max_elements: int = 3, grey: bool = False
) -> Layout:
    """A random arrangement; small pictures hold fewer elements."""
    width, height = size or picture_size(rng)
    tokens = visual_tokens(width, height)
    fitting = 1 if tokens <= 12 else 2 if tokens <= 25 else 3
    while True:
        layout = _try_layout(rng, width, height, min(max_elements, fitting), grey)
        if layout is not None:
            return layout


def caption_of(layout: Layout) -> str:
    """The one true caption of an arrangement."""
    if not layout.shapes:
        return f"a sign reads {layout.sign}"
    caption = f" {layout.relation} ".join(shape.phrase for shape in layout.shapes)
    return f"{caption}; the sign reads {layout.sign}" if layout.sign is not None else caption


def _unique(values: Sequence[str]) -> Iterator[tuple[int, str]]:
    yield from ((i, value) for i, value in enumerate(values) if values.count(value) == 1)


def _relation_questions(layout: Layout) -> Iterator[tuple[str, str]]:
    kinds = [shape.kind for shape in layout.shapes]
    if len(kinds) == 2 and len(set(kinds)) == 2:
        before, after = ("left of", "right of") if layout.horizontal else ("above", "below")
        yield f"Where is the {kinds[0]}?", f"{before} the {kinds[1]}"
        yield f"Where is the {kinds[1]}?", f"{after} the {kinds[0]}"


def questions_of(layout: Layout) -> list[tuple[str, list[tuple[str, str]]]]:
    """All (question, answer) pairs whose answer is unique, by kind of question."""
    kinds = [shape.kind for shape in layout.shapes]
    colours = [shape.colour for shape in layout.shapes]
    by_kind = {
        "colour": [(f"What colour is the {kind}?", colours[i]) for i, kind in _unique(kinds)],
        "shape": [(f"What shape is {colour}?", kinds[i]) for i, colour in _unique(colours)],
        "size": [(f"How large is the {kind}?", layout.shapes[i].size) for i, kind in _unique(kinds)],
        "count": [("How many shapes are there?", str(len(kinds)))],
        "sign": [("Is there a sign?", "no" if layout.sign is None else "yes")],
        "reading": [] if layout.sign is None else [("What does the sign read?", layout.sign)],
        "relation": list(_relation_questions(layout)),
    }
    return [(kind, pairs) for kind, pairs in by_kind.items() if pairs]


def random_question(rng: Random, layout: Layout) -> tuple[str, str]:
    """One question and its answer; reading and relations are asked more often."""
    kinds = questions_of(layout)
    weights = [
        {"reading": 2.0, "relation": 3.0, "count": 0.6, "sign": 0.4}.get(kind, 1.0) for kind, _ in kinds
    ]
    pairs: list[tuple[str, str]] = rng.choices(kinds, weights)[0][1]
    return rng.choice(pairs)


def random_title(rng: Random, layout: Layout) -> str:
    """A title that says nothing about the picture."""
    number = rng.choice([n for n in range(10, 100) if str(n) != layout.sign])
    return f"{rng.choice(TITLE_ADJECTIVES)} {rng.choice(TITLE_NOUNS)} {number}"


@lru_cache(maxsize=1)
def _noise() -> Image.Image:
    # One tile, cut at a random place: drawing fresh noise would take most of the rendering time.
    noise = np.random.default_rng(0).integers(0, 24, (2 * MAX_SIDE, 2 * MAX_SIDE, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def _light(rng: Random, grey: bool) -> RGB:
    base = rng.randint(222, 255)
    if grey:
        return base, base, base
    return base - rng.randint(0, 14), base - rng.randint(0, 14), base - rng.randint(0, 14)


def _background(rng: Random, width: int, height: int, grey: bool) -> Image.Image:
    style = rng.choice(("plain", "gradient", "noise"))
    image = Image.new("RGB", (width, height), _light(rng, grey))
    if style == "gradient":
        corners = Image.new("RGB", (2, 2))
        for i in range(4):
            corners.putpixel((i % 2, i // 2), _light(rng, grey))
        image = corners.resize((width, height), Image.Resampling.BILINEAR)
    elif style == "noise":
        left, top = rng.randrange(MAX_SIDE), rng.randrange(MAX_SIDE)
        noise = _noise().crop((left, top, left + width, top + height))
        image = ImageChops.subtract(image, noise.convert("L").convert("RGB") if grey else noise)
    return image


def _polygon(shape: Shape) -> list[tuple[float, float]]:
    """Corners of the shapes that have corners."""
    r = shape.diameter / 2
    match shape.kind:
        case "square":
            unit = [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)]
        case "triangle":
            unit = [(0.0, -0.95), (1.0, 0.85), (-1.0, 0.85)]
        case "cross":
            a = 0.33
            quarter = [(-a, -1.0), (a, -1.0), (a, -a)]
            unit = [p for turn in range(4) for p in (_turn(corner, turn * math.pi / 2) for corner in quarter)]
        case _:
            unit = [_turn((0.0, -1.0 if i % 2 == 0 else -0.42), i * math.pi / 5) for i in range(10)]
    return [(shape.x + r * x, shape.y + r * y) for x, y in unit]


def _turn(point: tuple[float, float], angle: float) -> tuple[float, float]:
    x, y = point
    return x * math.cos(angle) - y * math.sin(angle), x * math.sin(angle) + y * math.cos(angle)


def _draw_shape(rng: Random, draw: ImageDraw.ImageDraw, shape: Shape, grey: bool) -> None:
    shift = rng.randint(-8, 8) if grey else 0
    red, green, blue = (
        min(255, max(0, c + (shift if grey else rng.randint(-10, 10)))) for c in COLOURS[shape.colour]
    )
    fill, r = (red, green, blue), shape.diameter / 2
    box = (shape.x - r, shape.y - r, shape.x + r, shape.y + r)
    if shape.kind == "circle":
        draw.ellipse(box, fill=fill)
    elif shape.kind == "ring":
        draw.ellipse(box, outline=fill, width=max(2, round(0.42 * r)))
    else:
        draw.polygon(_polygon(shape), fill=fill)


def _draw_sign(draw: ImageDraw.ImageDraw, layout: Layout) -> None:
    assert layout.sign is not None
    assert layout.sign_box is not None
    left, top, right, bottom = layout.sign_box
    border = max(1, layout.font_size // 14)
    draw.rectangle(layout.sign_box, fill=(255, 255, 255), outline=(40, 40, 40), width=border)
    centre = ((left + right) / 2, (top + bottom) / 2)
    draw.text(centre, layout.sign, fill=(10, 10, 10), font=_font(layout.font_size), anchor="mm")


def draw_layout(rng: Random, layout: Layout, grey: bool = False) -> Image.Image:
    """The RGB picture of an arrangement; a *grey* one has no colour in it."""
    image = _background(rng, layout.width, layout.height, grey)
    _draw_elements(rng, ImageDraw.Draw(image), layout, grey)
    return image


def _draw_elements(rng: Random, draw: ImageDraw.ImageDraw, layout: Layout, grey: bool) -> None:
    for shape in layout.shapes:
        _draw_shape(rng, draw, shape, grey)
    if layout.sign is not None:
        _draw_sign(draw, layout)


def scene(
    rng: Random,
    size: tuple[int, int] | None = None,
    max_elements: int = 3,
    grey: bool | None = None,
) -> Scene:
    """A random scene; equal *rng* states give equal scenes."""
    is_grey = rng.random() < 0.1 if grey is None else grey
    layout = random_layout(rng, size, max_elements, is_grey)
    question, answer = random_question(rng, layout)
    return Scene(
        image=draw_layout(rng, layout, is_grey),
        title=random_title(rng, layout),
        question=question,
        answer=answer,
        caption=caption_of(layout),
        layout=layout,
        grey=is_grey,
    )


def held_out_rng(index: int) -> Random:
    """The generator of held-out record *index*.

    Training seeds its generators "train/...": as strings are hashed whole, the two seed domains are disjoint.
    """
    return Random(f"{HELD_OUT_SEED}/{index}")


def _as_palette(image: Image.Image) -> Image.Image:
    return image.quantize(128, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)


def encode(image: Image.Image, style: str, orientation: int = 1, quality: int = 95) -> bytes:
    """The bytes of a picture file whose upright view, over white, shows *image*.

    *style* is one of `STYLES`; *orientation* is an EXIF orientation, 1 for a picture stored upright.
    """
    stored = image.transpose(STORE_AS[orientation]) if orientation != 1 else image
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    options: dict[str, Any] = {"exif": exif} if orientation != 1 else {}
    buffer = io.BytesIO()
    match style:
        case "jpeg":
            stored.save(buffer, "JPEG", quality=quality, **options)
        case "jpeg-grey":
            stored.convert("L").save(buffer, "JPEG", quality=quality, **options)
        case "png-grey":
            stored.convert("L").save(buffer, "PNG", **options)
        case "png-palette":
            _as_palette(stored).save(buffer, "PNG", **options)
        case "webp":
            stored.save(buffer, "WEBP", quality=quality, **options)
        case _:
            stored.save(buffer, "PNG", **options)
    return buffer.getvalue()


def encode_transparent(rng: Random, layout: Layout, grey: bool) -> bytes:
    """An RGBA PNG of *layout* with a transparent background, for a picture laid over white."""
    # The invisible colour is white too, so that dropping the alpha channel shows the same picture.
    upright = Image.new("RGBA", (layout.width, layout.height), (255, 255, 255, 0))
    _draw_elements(rng, ImageDraw.Draw(upright), layout, grey)
    buffer = io.BytesIO()
    upright.save(buffer, "PNG")
    return buffer.getvalue()


SUFFIXES = {"jpeg": "jpg", "jpeg-grey": "jpg", "webp": "webp"}
STYLES = ("jpeg", "jpeg", "jpeg", "png", "png-palette", "png-rgba", "webp", "jpeg", "grey")


def held_out_record(index: int) -> dict[str, Any]:
    """Row *index* of data/scenes."""
    rng = held_out_rng(index)
    style = STYLES[index % len(STYLES)]
    if style == "grey":
        style = rng.choice(("jpeg-grey", "png-grey"))
    drawn = scene(rng, grey=style.endswith("-grey") or None)
    orientation = rng.choice(tuple(STORE_AS)) if style == "jpeg" and rng.random() < 0.4 else 1
    if style == "png-rgba":
        encoded = encode_transparent(rng, drawn.layout, drawn.grey)
    else:
        encoded = encode(drawn.image, style, orientation, rng.choice((90, 93, 96)))
    name = f"scene-{index:05d}"
    return {
        "id": name,
        "image": {"bytes": encoded, "path": f"{name}.{SUFFIXES.get(style, 'png')}"},
        "title": drawn.title,
        "question": drawn.question,
        "answer": drawn.answer,
        "caption": drawn.caption,
    }


def scenes_schema() -> Any:
    """The Arrow schema of the shards, with the metadata by which `datasets` decodes the picture."""
    import pyarrow as pa

    texts = ("title", "question", "answer", "caption")
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    value = {"dtype": "string", "_type": "Value"}
    features = {"id": value, "image": {"_type": "Image"}} | dict.fromkeys(texts, value)
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    fields = [("id", pa.string()), ("image", image), *((name, pa.string()) for name in texts)]
    return pa.schema(fields, metadata=metadata)


def write_shards(folder: Path, num_records: int, num_shards: int) -> None:
    """Write the held-out records as Parquet shards of two to three row groups each."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    per_shard = -(-num_records // num_shards)
    for shard in range(num_shards):
        indices = range(shard * per_shard, min((shard + 1) * per_shard, num_records))
        table = pa.Table.from_pylist([held_out_record(i) for i in indices], schema=scenes_schema())
        final = folder / f"scenes-{shard:05d}.parquet"
        temporary = final.with_name(f".{final.name}.tmp")
        pq.write_table(
            table, temporary, row_group_size=-(-per_shard // (2 + shard % 2)), write_page_checksum=True
        )
        temporary.replace(final)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Write the sample records as Parquet shards.")
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent / "scenes")
    parser.add_argument("--records", type=int, default=576)
    parser.add_argument("--shards", type=int, default=4)
    arguments = parser.parse_args()
    write_shards(arguments.output, arguments.records, arguments.shards)


if __name__ == "__main__":
    main()
