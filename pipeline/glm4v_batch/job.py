"""The job file: every setting with its default, checked at once before anything is loaded.

This module alone decides which settings exist. A setting of a later version is simply not here yet.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from glm4v_batch.errors import JobError
from glm4v_batch.mistakes import explain, shown
from glm4v_batch.templates import columns_of
from glm4v_batch.yaml_lines import Location, Mistake, Origin, read_yaml, set_value

PART_COLUMNS = (
    "id",
    "text",
    "status",
    "finish_reason",
    "prompt_tokens",
    "completion_tokens",
    "error_stage",
    "error_code",
    "error_message",
    "source",
    "row",
)
"""The columns that every part has, before those that the job passes through."""

_MAPS: frozenset[Location] = frozenset({("devices", "layout")})

Text = Annotated[str, Field(min_length=1), AfterValidator(lambda value: _without_null(value))]
_Names = Annotated[tuple[Text, ...], BeforeValidator(lambda value: _as_tuple(value))]


class _Section(BaseModel):
    """One section. `strict`: a quoted number or a bare `true` is never turned into something else."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_empty(cls, value: Any) -> Any:
        # A section whose settings are all commented out is a null in YAML.
        return {} if value is None else value


class ParquetSettings(_Section):
    """Records are the rows of Parquet files."""

    kind: Literal["parquet"] = Field(description="Rows of Parquet files.")
    path: Text = Field(description="A file, a glob, or a folder (every *.parquet below it); any fsspec path.")
    root: Text | None = Field(
        default=None,
        description="The folder below which image paths are looked up. Null: records hold no paths.",
    )
    id: Text | None = Field(
        default=None, description='The column that names each record. Null: "<file>#<row>" names it.'
    )
    image: Text = Field(
        default="image",
        description="The column of images: bytes, {bytes, path} structs, paths, or lists of these.",
    )


class DatasetSettings(_Section):
    """Records are the rows of a Hugging Face data set."""

    kind: Literal["dataset"] = Field(description="Rows of a data set of the `datasets` library.")
    path: Text = Field(description="A Hub id, a local folder, or a folder written by save_to_disk.")
    name: Text | None = Field(default=None, description="The configuration (subset) of the data set.")
    split: Text = Field(default="train", description="The split to read.")
    revision: Text | None = Field(
        default=None, description="A commit, tag or branch on the Hub. Give a commit for a repeatable run."
    )
    streaming: bool = Field(default=False, description="Read while downloading, without a copy on disk.")
    root: Text | None = Field(
        default=None,
        description="The folder below which image paths are looked up. Null: the data set's own folder.",
    )
    id: Text | None = Field(
        default=None, description='The column that names each record. Null: "<data set>#<row>" names it.'
    )
    image: Text = Field(default="image", description="The column of images.")


SourceSettings = ParquetSettings | DatasetSettings


class PromptSettings(_Section):
    """What the model is asked. Changing it changes the output."""

    system: str | None = Field(default=None, description="The system message, as it stands. Null: none.")
    user: Text = Field(
        description="The question. {column} stands for the record's value; {{ and }} for plain braces."
    )

    @field_validator("user")
    @classmethod
    def _braces_match(cls, value: str) -> str:
        columns_of(value)
        return value


class ModelSettings(_Section):
    """Which checkpoint answers, and in which precision."""

    name: Text = Field(description="A local folder or a Hub id.")
    revision: Text | None = Field(default=None, description="A Hub id needs a commit for a repeatable run.")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        default="auto", description="The precision of the weights. auto: the checkpoint's own."
    )


class ImageSettings(_Section):
    """How large the model sees an image, in pixels (width times height)."""

    min_pixels: int | None = Field(
        default=None, ge=1, description="Smaller images are enlarged. Null: as trained."
    )
    max_pixels: int | None = Field(
        default=None, ge=1, description="Larger images are reduced. Null: as trained."
    )

    max_image_pixels: int = Field(
        default=50_000_000,
        ge=1,
        le=89_478_485,
        description="An image of more pixels fails undecoded. Does not change the output of others.",
    )
    max_image_bytes: int = Field(
        default=64 * 1024**2,
        ge=1,
        le=96 * 1024**2,
        description="An image of more encoded bytes fails. Does not change the output of others.",
    )

    @field_validator("max_pixels")
    @classmethod
    def _not_below_min(cls, value: int | None, info: ValidationInfo) -> int | None:
        least = info.data.get("min_pixels")
        if value is not None and least is not None and value < least:
            raise ValueError(f"must be images.min_pixels ({least}) or more, not {value}")
        return value


class GenerationSettings(_Section):
    """How the model writes. Changing any of these changes the output."""

    max_new_tokens: int = Field(default=64, ge=1, description="An answer is cut after this many tokens.")
    max_new_tokens_column: Text | None = Field(
        default=None,
        description="The column of whole numbers that cut the answers of single rows earlier. Null: none.",
    )
    temperature: float = Field(
        default=0.0, ge=0, description="0 takes the likeliest token; more is more random."
    )
    top_p: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Sample among the likeliest tokens that add up to this probability.",
    )
    top_k: int | None = Field(default=None, ge=1, description="Sample among this many likeliest tokens.")
    repetition_penalty: float = Field(
        default=1.0, gt=0, description="Above 1, tokens already used become unlikelier."
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="The seed of sampling.")

    @property
    def own_columns(self) -> tuple[str, ...]:
        """The columns from which rows take settings of their own."""
        return (self.max_new_tokens_column,) if self.max_new_tokens_column else ()

    @field_validator("top_p", "top_k")
    @classmethod
    def _only_when_sampling(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is not None and info.data.get("temperature") == 0:
            raise ValueError("has no effect at generation.temperature 0: raise that, or leave this out")
        return value


def _check_devices(value: Any) -> Any:
    if value in ("all", "cpu"):
        return value
    numbers = isinstance(value, (list, tuple)) and all(type(item) is int and item >= 0 for item in value)
    if not numbers or not value:
        raise ValueError(f"must be all, cpu or GPU numbers such as [0, 2], not {shown(value)}")
    twice = sorted(number for number in set(value) if value.count(number) > 1)
    if twice:
        raise ValueError(f"names GPU {twice[0]} twice")
    return tuple(value)


_MOST_OF_A_NAME = 64
_LAYOUTS = ("auto", "replicas", "balanced", "balanced_low_0", "sequential")


def _check_layout(value: Any) -> Any:
    if isinstance(value, dict) and value:
        return {module: _check_spot(module, spot) for module, spot in value.items()}
    if value not in _LAYOUTS:
        *names, last = _LAYOUTS
        raise ValueError(
            f"must be {', '.join(names)}, {last} or a map of module names to GPU numbers, not {shown(value)}"
        )
    return value


def _check_spot(module: Any, spot: Any) -> Any:
    is_gpu = type(spot) is int and spot >= 0
    if not isinstance(module, str) or not (is_gpu or spot in ("cpu", "disk")):
        raise ValueError(
            f"puts {shown(module)} on {shown(spot)}: a module's name goes with a GPU number, cpu or disk"
        )
    return spot


def _check_group(value: Any) -> Any:
    if value == "auto" or (type(value) is int and value >= 1):
        return value
    raise ValueError(f"must be auto or a number of GPUs, not {shown(value)}")


class DeviceSettings(_Section):
    """Where the model runs. None of this changes the output."""

    use: Annotated[Literal["all", "cpu"] | tuple[int, ...], BeforeValidator(_check_devices)] = Field(
        default="all", description="all; cpu; or GPUs by number, such as [0, 2], as nvidia-smi counts them."
    )
    layout: Annotated[
        Literal["auto", "replicas", "balanced", "balanced_low_0", "sequential"]
        | dict[str, int | Literal["cpu", "disk"]],
        BeforeValidator(_check_layout),
    ] = Field(
        default="auto",
        description="auto: as many copies of the model as fit. replicas: one on each GPU. The others, or a "
        "map of module names to GPU numbers, lay one copy over several GPUs.",
    )
    gpus_per_replica: Annotated[Literal["auto"] | int, BeforeValidator(_check_group)] = Field(
        default="auto", description="How many GPUs share one copy of the model."
    )
    memory_fraction: float = Field(
        default=0.92, gt=0, le=1, description="The part of each GPU's free memory that may be used."
    )
    memory_limit_gib: float | None = Field(
        default=None, gt=0, description="The most that is taken of any GPU, in GiB. Null: no limit."
    )
    offload: Literal["none", "cpu", "disk"] = Field(
        default="none", description="Where layers go that fit on no GPU, which is much slower. none: refuse."
    )

    @field_validator("gpus_per_replica")
    @classmethod
    def _not_with_a_map(cls, value: Literal["auto"] | int, info: ValidationInfo) -> Literal["auto"] | int:
        if value != "auto" and isinstance(info.data.get("layout"), dict):
            raise ValueError("has no effect where devices.layout is a map: leave it out")
        return value

    @field_validator("offload")
    @classmethod
    def _said_by_a_map(cls, value: str, info: ValidationInfo) -> str:
        if value != "none" and isinstance(info.data.get("layout"), dict):
            raise ValueError("has no effect where devices.layout is a map: put modules on cpu or disk there")
        return value


class BatchingSettings(_Section):
    """How records are put into batches. None of this changes the output."""

    engine: Literal["auto", "packed", "generate", "echo"] = Field(
        default="auto",
        description="packed: no padding, continuous batching; generate: transformers' own loop; echo: a hash "
        "of pixels and prompt, without a model, for trying out. auto: packed for dense GLM-4V models in 16 "
        "bits on GPUs, else generate, and plan says why.",
    )
    max_batch_size: int | None = Field(default=None, ge=1, description="Null: as many as the memory holds.")
    echo_seconds: float = Field(
        default=0.0, ge=0, le=86_400, description="How long the echo engine takes for a batch."
    )
    echo_replicas: int = Field(
        default=0, ge=0, le=64, description="Processes that the echo engine runs in; 0: the run's own."
    )

    @field_validator("echo_seconds", "echo_replicas")
    @classmethod
    def _only_for_echo(cls, value: float, info: ValidationInfo) -> float:
        if value and info.data.get("engine") in ("auto", "packed", "generate"):
            raise ValueError("has an effect only with batching.engine: echo")
        return value


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _without_null(value: str) -> str:
    if "\0" in value:
        raise ValueError("holds a null character, which no name may have")
    return value


def _local_folder(value: str) -> str:
    if "://" in value:
        raise ValueError(f"must be a folder on this machine, not {shown(value)}: parts are linked and synced")
    return os.path.expanduser(value)  # noqa: PTH111  Path's raises where there is no such user


class OutputSettings(_Section):
    """Where the parts go. The folder is also the checkpoint of the run."""

    path: Annotated[Text, AfterValidator(_local_folder)] = Field(
        description="The folder of the output; it belongs to one job."
    )
    rows_per_part: int = Field(
        default=128, ge=1, description="Rows that are committed together, as one file."
    )
    columns: _Names = Field(
        default=(), description="Columns of the source that are passed through to the output."
    )

    @field_validator("columns")
    @classmethod
    def _no_column_twice(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if taken := [column for column in value if column in PART_COLUMNS]:
            raise ValueError(f"names {shown(taken[0])}, a column that every part has already")
        if len(set(value)) < len(value):
            raise ValueError("names a column twice")
        return value


class LimitSettings(_Section):
    """When a run stops rather than fails a whole data set. None of this changes the output."""

    failed_fraction: float | None = Field(
        default=0.2,
        ge=0,
        le=1,
        description="Stop when more than this part of the last records failed, or all of the first 100. "
        "Null: never.",
    )
    failed_window: int = Field(default=1000, ge=1, description="How many records the last ones are.")


class Job(_Section):
    """Everything one run needs to know."""

    name: str = Field(description="A short name for the job: letters, digits, dots, - and _.")
    source: SourceSettings = Field(discriminator="kind", description="Where the records come from.")
    prompt: PromptSettings = Field(description="What the model is asked.")
    model: ModelSettings = Field(description="Which checkpoint answers.")
    images: ImageSettings = Field(
        default_factory=ImageSettings, description="How large the model sees an image."
    )
    generation: GenerationSettings = Field(
        default_factory=GenerationSettings, description="How the model writes."
    )
    devices: DeviceSettings = Field(default_factory=DeviceSettings, description="Where the model runs.")
    batching: BatchingSettings = Field(
        default_factory=BatchingSettings, description="How records are put into batches."
    )
    output: OutputSettings = Field(description="Where the answers go.")
    limits: LimitSettings = Field(
        default_factory=LimitSettings, description="When a run stops rather than fails a whole data set."
    )

    _file: str = PrivateAttr("")
    _origins: dict[Location, Origin] = PrivateAttr(default_factory=dict)

    @field_validator("name")
    @classmethod
    def _is_slug(cls, value: str) -> str:
        if len(value) > _MOST_OF_A_NAME or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value):
            most = f"{_MOST_OF_A_NAME} at most"
            raise ValueError(f"must be letters, digits, dots, - and _ only, {most}, not {shown(value)}")
        return value

    def remember(self, file: str, origins: Mapping[Location, Origin]) -> Self:
        """Keep where each setting stands, for messages; it is no part of `as_dict`."""
        self._file, self._origins = file, dict(origins)
        return self

    def as_dict(self) -> dict[str, Any]:
        """Every setting, as plain values that JSON can hold."""
        return self.model_dump(mode="json")

    def asked_columns(self) -> dict[str, tuple[str, ...]]:
        """The source columns that each setting asks for; keys name the setting, with its line if known."""
        asked = {
            ("source", "id"): (self.source.id,) if self.source.id else (),
            ("source", "image"): (self.source.image,),
            ("prompt", "user"): columns_of(self.prompt.user),
            ("generation", "max_new_tokens_column"): self.generation.own_columns,
            ("output", "columns"): self.output.columns,
        }
        return {self._locate(location): columns for location, columns in asked.items() if columns}

    def _locate(self, location: tuple[str, str]) -> str:
        setting = ".".join(location)
        origin = self._origins.get(location)
        if origin is None:
            return f"{self._file} {setting}".strip()
        place = f"{self._file} line {origin}" if isinstance(origin, int) else origin
        return f"{place}: {setting}"


def read_job(path: Path, overrides: Sequence[str] = ()) -> Job:
    """The job of the file *path*, each of *overrides* ("a.b=c") applied over it.

    Raises one `JobError` that names every mistake with its line.
    """
    document = read_yaml(path)
    for option in overrides:
        set_value(document, option, maps=_MAPS)
    mistakes = list(document.mistakes)
    try:
        job = Job.model_validate(document.values)
    except ValidationError as error:
        found = explain(error, Job)
        mistakes += [Mistake(document.origin_of(location), text) for location, text in found]
    if mistakes:
        raise _job_error(path, mistakes)
    return job.remember(str(path), document.origins)


def job_schema() -> dict[str, Any]:
    """The JSON Schema of a job file, with which editors complete and check it."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Job.model_json_schema()}


def _job_error(path: Path, mistakes: Sequence[Mistake]) -> JobError:
    # Lines of the file first, in their order; then the options, in theirs.
    ordered = sorted(mistakes, key=lambda each: each.origin if isinstance(each.origin, int) else 1 << 32)
    if len(ordered) == 1 and not isinstance(ordered[0].origin, int):
        return JobError(f"{ordered[0]}")
    return JobError.of_mistakes(str(path), [str(mistake) for mistake in ordered])


def write_template(path: Path) -> None:
    """Write `INIT_TEMPLATE`, named after the file, to *path*, which must not exist."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(INIT_TEMPLATE.replace("caption", _slug(path.stem)))
    except FileExistsError:
        raise JobError(f"{path} exists already.", hint="Give another path.") from None
    except OSError as error:
        raise JobError(f"{path} cannot be written: {error.strerror}.") from None


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("._-")[:_MOST_OF_A_NAME] or "caption"


INIT_TEMPLATE = """\
# A job for glm4v-batch. Run it with: glm4v-batch run <this file>
# Settings that are commented out show their defaults. All of them: glm4v-batch schema

name: caption

source:
  kind: parquet                # parquet | dataset
  path: data/*.parquet         # a file, a folder or a glob; any fsspec path
  # root: null                 # the folder below which image paths are looked up
  # id: null                   # the column that names each record; default "<file>#<row>"
  # image: image               # bytes, {bytes, path} structs, paths, or lists of these

# A data set of the `datasets` library instead: a Hub id, a folder, or what save_to_disk wrote.
# source:
#   kind: dataset
#   path: my-org/my-pictures
#   name: null
#   split: train
#   revision: null             # a commit, for a repeatable run
#   streaming: false

prompt:
  # system: null
  user: "Describe this picture."   # {column} stands for a record's value, {{ and }} for braces

model:
  name: zai-org/GLM-4.1V-9B-Thinking   # a local folder or a Hub id
  # revision: null             # a Hub id needs a commit for a repeatable run
  # dtype: auto                # auto | bfloat16 | float16 | float32

images:
  # min_pixels: null           # null: the checkpoint's own
  # max_pixels: null
  # max_image_pixels: 50000000 # a larger image fails before it is decoded
  # max_image_bytes: 67108864

generation:
  max_new_tokens: 64
  # max_new_tokens_column: null  # a column of whole numbers that cut the answers of single rows earlier
  # temperature: 0             # 0: always the likeliest token
  # top_p: null
  # top_k: null
  # repetition_penalty: 1.0
  # seed: 0

devices:
  # use: all                   # all | cpu | GPUs by number, as [0, 2]
  # layout: auto               # auto | replicas | balanced | balanced_low_0 | sequential | {module: GPU}
  # gpus_per_replica: auto     # how many GPUs share one copy of the model
  # memory_fraction: 0.92      # of what is free on each GPU
  # memory_limit_gib: null     # the most that is taken of any GPU
  # offload: none              # none | cpu | disk: where layers go that fit on no GPU

batching:
  # engine: auto               # auto | packed | generate | echo (no model: for trying out)
  # max_batch_size: null       # null: as many as the memory holds
  # echo_seconds: 0.0
  # echo_replicas: 0

output:
  path: out/caption            # the answers, and the checkpoint of the run
  # rows_per_part: 128
  # columns: []                # columns passed through

limits:
  # failed_fraction: 0.2       # stop when more than this part of the last records failed; null: never
  # failed_window: 1000        # how many records the last ones are
"""
"""A commented job file to begin with; `init` writes it."""
