"""What a model folder says about itself, read from its small files without loading the model.

Weights are safetensors and code is transformers' own: a folder that brings pickles or its
own Python instead is refused here, before anything of it is loaded.
"""

import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from glm4v_batch.errors import JobError, on_one_line

# glmga is GLM-4.6V's classes under another name. Its memory is measured first, not computed.
MODEL_TYPES = ("glm4v", "glm46v", "glm4v_moe", "glm_ocr", "glmga")
_ALLOW_PATTERNS = ["*.json", "*.jinja", "*.safetensors"]
_SAMPLED_FROM_BYTES = 1024**3
_SAMPLE_BYTES = 4096
_COMMIT = re.compile(r"[0-9a-f]{40}")
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageProcessing:
    """How the checkpoint wants its images.

    *min_frame_pixels* and *max_frame_pixels* bound height × width × temporal_patch_size, as
    transformers counts them: an image is one frame repeated *temporal_patch_size* times.
    The defaults are those of transformers' Glm4vImageProcessor.
    """

    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    min_frame_pixels: int = 112 * 112
    max_frame_pixels: int = 28 * 28 * 15000
    resample: int = 3
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: tuple[float, ...] = _CLIP_MEAN
    image_std: tuple[float, ...] = _CLIP_STD


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A model folder. *revision* is the commit of a Hub snapshot, None for any other folder."""

    folder: Path
    revision: str | None
    model_type: str
    dtype: str | None
    context_tokens: int
    image_token_id: int
    eos_token_ids: tuple[int, ...]
    images: ImageProcessing
    tokenizer_file: Path
    tokenizer_config: Mapping[str, Any] = field(repr=False)
    chat_template: str = field(repr=False)
    weight_files: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as a safetensors file holds it; *dtype* is the file's word for it, such as BF16."""

    dtype: str
    num_values: int
    num_bytes: int


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read the folder's small files; everything that is missing or unusable is reported at once.

    Raises JobError for that. What the system refuses to show is told alone, because what else seems
    to be missing may stand there.
    """
    with _reading(folder):
        if not _is_folder(folder):
            raise JobError(
                f"{folder} is not a folder.", hint="Give model.name a checkpoint's folder or a Hub id."
            )
        return _read(_Findings(folder))


def _read(found: "_Findings") -> Checkpoint:
    folder = found.folder
    config = found.json("config.json")
    processor = found.image_processor()
    tokenizer_config = found.json("tokenizer_config.json", optional=True)
    generation = [found.json("generation_config.json", optional=True), *_both(config)]
    eos_token_ids = found.eos_token_ids(generation)
    found.refuse_foreign(config, processor, tokenizer_config)
    checkpoint = Checkpoint(
        folder=folder,
        revision=_snapshot_commit(folder),
        model_type=str(config.get("model_type", "")),
        dtype=_first(_both(config), "dtype", "torch_dtype"),
        context_tokens=found.number(_both(config), "max_position_embeddings"),
        image_token_id=found.number([config], "image_token_id"),
        eos_token_ids=eos_token_ids,
        images=found.processing(processor),
        tokenizer_file=found.file("tokenizer.json"),
        tokenizer_config=tokenizer_config,
        chat_template=found.chat_template(tokenizer_config),
        weight_files=found.weight_files(),
    )
    if found.mistakes:
        raise JobError.of_mistakes(f"the checkpoint {folder}", found.mistakes)
    return checkpoint


def locate(name: str, revision: str | None) -> Path:
    """The folder of *name*: itself if it exists, else the Hub's snapshot, downloaded where missing.

    Raises JobError where neither can be had, or nobody may look whether the folder exists.
    """
    try:
        folder = Path(name).expanduser()
        is_folder = _is_folder(folder)
    except RuntimeError:
        raise JobError(f"model.name {name} begins with the home folder of an unknown user.") from None
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise _unreadable(folder, error) from None
        raise JobError(
            f"model.name cannot be looked up: {error.strerror}.", hint="Give a local folder or a Hub id."
        ) from None
    if not is_folder:
        return _snapshot(name, revision)
    if revision is not None:
        raise JobError(
            f"model.revision is {revision}, but {name} is a local folder, which has no revisions.",
            hint="Leave model.revision out.",
        )
    return folder


def identity(checkpoint: Checkpoint) -> Mapping[str, str]:
    """What the job's fingerprint knows of the checkpoint: a hash of each part that shapes the output.

    Weights count by the commit of a Hub snapshot. Those of another folder are hashed whole up to
    1 GiB; above, by each file's size and header and both ends (4 KiB) of every tensor in it. Training,
    merging or requantising a tensor changes these; an edit inside one tensor by hand may not.
    Raises JobError where a file cannot be read.
    """
    files = {
        "config": "config.json",
        "generation_config": "generation_config.json",
        "image_processor": "preprocessor_config.json",
        "processor": "processor_config.json",
        "tokenizer": "tokenizer.json",
        "tokenizer_config": "tokenizer_config.json",
    }
    with _reading(checkpoint.folder):
        return {
            "weights": f"commit {checkpoint.revision}" if checkpoint.revision else _hash_weights(checkpoint),
            "chat_template": hashlib.sha256(checkpoint.chat_template.encode()).hexdigest(),
            **{part: _hash_file(checkpoint.folder / name) for part, name in files.items()},
        }


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of the safetensors file *path* by name, from its header alone.

    Raises JobError where it cannot be read.
    """
    with _reading(path), path.open("rb") as file:
        header = json.loads(_safetensors_header(file))
    return {
        name: StoredTensor(
            entry["dtype"], prod(entry["shape"]), entry["data_offsets"][1] - entry["data_offsets"][0]
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }


class _Findings:
    """Reads one folder and keeps the mistakes that it meets."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mistakes: list[str] = []

    def json(self, name: str, *, optional: bool = False) -> Mapping[str, Any]:
        """The object in the file, empty where it is missing or unusable."""
        path = self.folder / name
        if not _is_file(path) and optional:
            return {}
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            self.mistakes.append(f"has no {name}.")
            return {}
        except ValueError as error:
            self.mistakes.append(f"has a {name} that cannot be read: {error}.")
            return {}
        if not isinstance(content, dict):
            self.mistakes.append(f"has a {name} that is not a JSON object.")
            return {}
        return content

    def file(self, name: str) -> Path:
        path = self.folder / name
        if not _is_file(path):
            self.mistakes.append(f"has no {name}.")
        return path

    def number(self, sections: Sequence[Mapping[str, Any]], key: str) -> int:
        value = _first(sections, key)
        if not isinstance(value, int):
            self.mistakes.append(f"has no {key} in its config.json.")
            return 0
        return value

    def image_processor(self) -> Mapping[str, Any]:
        """The nested section of processor_config.json first, as in transformers."""
        nested = self.json("processor_config.json", optional=True).get("image_processor")
        if isinstance(nested, dict):
            return nested
        return self.json("preprocessor_config.json")

    def refuse_foreign(
        self, config: Mapping[str, Any], processor: Mapping[str, Any], tokenizer_config: Mapping[str, Any]
    ) -> None:
        """Remote code, and models that the product does not know."""
        if any("auto_map" in section for section in (config, processor, tokenizer_config)):
            self.mistakes.append(
                "brings its own Python code (auto_map), which is never run. "
                "Use a version of the model that transformers supports itself."
            )
        model_type = config.get("model_type")
        if config and model_type not in MODEL_TYPES:
            self.mistakes.append(
                f"is a model of type {model_type}, which is not supported. "
                f"Use one of the types {', '.join(MODEL_TYPES)}."
            )

    def eos_token_ids(self, sections: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
        ids = _first(sections, "eos_token_id")
        if isinstance(ids, int):
            return (ids,)
        if not ids:
            self.mistakes.append("has no eos_token_id, neither in generation_config.json nor in config.json.")
            return (0,)
        return tuple(ids)

    def processing(self, section: Mapping[str, Any]) -> ImageProcessing:
        for switch in ("do_resize", "do_convert_rgb"):
            if section.get(switch) is False:
                self.mistakes.append(f"switches {switch} off for its images, which is not supported.")
        if section.get("patch_expand_factor", 1) != 1:
            self.mistakes.append("expands its image patches (patch_expand_factor), which is not supported.")
        size = section.get("size") or {}
        edges = {"min_frame_pixels": size.get("shortest_edge"), "max_frame_pixels": size.get("longest_edge")}
        if size and None in edges.values():
            self.mistakes.append("gives its image size without shortest_edge and longest_edge.")
        names = set(ImageProcessing.__dataclass_fields__) - set(edges)
        values = {name: section[name] for name in names if section.get(name) is not None}
        for name in ("image_mean", "image_std"):
            if name in values:
                values[name] = tuple(float(number) for number in values[name])
        return ImageProcessing(**values, **{name: edge for name, edge in edges.items() if edge})

    def chat_template(self, tokenizer_config: Mapping[str, Any]) -> str:
        path = self.folder / "chat_template.jinja"
        if _is_file(path):
            return self._text(path)
        sections = [self.json("chat_template.json", optional=True), tokenizer_config]
        template = _first(sections, "chat_template")
        if isinstance(template, list):
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        if not isinstance(template, str):
            self.mistakes.append("has no chat template, such as chat_template.jinja.")
            return ""
        return template

    def _text(self, path: Path) -> str:
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            self.mistakes.append(f"has a {path.name} that is not UTF-8.")
            return ""

    def weight_files(self) -> tuple[Path, ...]:
        index = self.json("model.safetensors.index.json", optional=True)
        names = sorted(set(index.get("weight_map", {}).values())) or ["model.safetensors"]
        missing = [name for name in names if not _is_file(self.folder / name)]
        if missing and not index and self._has_pickles():
            self.mistakes.append(
                "has its weights only as pickles (*.bin, *.pt), which can run code when they are opened. "
                "Use a version of the model with safetensors weights."
            )
        elif missing:
            self.mistakes.append(
                f"lacks {len(missing)} of {len(names)} weight files: {', '.join(missing[:3])}."
            )
        paths = tuple(self.folder / name for name in names)
        self.mistakes += [
            f"has a damaged weight file: {path.name} {fault}. Download it again."
            for path in paths
            if _is_file(path) and (fault := _weight_fault(path))
        ]
        return paths

    def _has_pickles(self) -> bool:
        return any(next(self.folder.glob(pattern), None) for pattern in ("*.bin", "*.pt", "*.pth"))


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what the system says against reading *path*, or what stands below it, into a JobError."""
    try:
        yield
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> JobError:
    refused = on_one_line(str(error.filename or path))  # a read that breaks off names no file
    hint = "Mend this, then run the same command again."
    if isinstance(error, PermissionError):
        hint = (
            "Mend its permissions: this user has to read all files of the checkpoint and to enter the "
            "folders that lead to them."
        )
    return JobError(f"The checkpoint {refused} cannot be read: {error.strerror or error}.", hint=hint)


def _is_folder(path: Path) -> bool:
    return stat.S_ISDIR(_mode(path))


def _is_file(path: Path) -> bool:
    """Whether a file stands at *path*. Raises OSError, which names the folder, where nobody may look."""
    try:
        return stat.S_ISREG(_mode(path))
    except PermissionError as error:
        # It takes no permission of the file's own to look at it, only those of the way there.
        raise PermissionError(error.errno, error.strerror, str(path.parent)) from None


def _mode(path: Path) -> int:
    """The kind and permissions of what stands at *path*; 0 where nothing does, or nothing can.

    Raises OSError where the system does not tell, which `Path.is_file` of Python 3.14 takes for a no.
    """
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: such as "\0" in the name
        return 0


def _both(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The text model's section, then the whole: older configs are flat."""
    text = config.get("text_config")
    return [text, config] if isinstance(text, dict) else [config]


def _first(sections: Iterable[Mapping[str, Any]], *keys: str) -> Any:
    values = (section.get(key) for section in sections for key in keys)
    return next((value for value in values if value is not None), None)


def _snapshot_commit(folder: Path) -> str | None:
    in_cache = folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--")
    return folder.name if in_cache and _COMMIT.fullmatch(folder.name) else None


def _snapshot(name: str, revision: str | None) -> Path:
    # Imported here: it takes a tenth of a second, which `validate` on a local model need not pay.
    from huggingface_hub import errors

    try:
        return _download(name, revision)
    except errors.HFValidationError:
        problem, hint = "is neither a folder here nor a name on the Hub.", "Check model.name."
    except errors.GatedRepoError:
        problem = "is a gated model on the Hub."
        hint = "Accept its terms on its page, then log in with: hf auth login"
    except errors.RevisionNotFoundError:
        problem, hint = f"has no revision {revision} on the Hub.", "Check model.revision."
    except errors.RepositoryNotFoundError:
        problem = "is neither a folder here nor a model that the Hub shows to you."
        hint = "Check model.name; for a private model log in with: hf auth login"
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        problem = (
            f"{f'at revision {revision} ' if revision else ''}is no folder here and not downloaded, "
            "and the Hub is out of reach."
        )
        hint = f"Check model.name, or download it where there is a network, with: hf download {name}"
    except (errors.HfHubHTTPError, OSError) as error:
        problem, hint = f"could not be downloaded: {error}", "Try again; what has arrived is kept."
    raise JobError(f"model {name} {problem}", hint=hint)


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_ALLOW_PATTERNS))
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        # huggingface_hub 1.x asks the Hub about a pinned commit even where its snapshot is there.
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=_ALLOW_PATTERNS, local_files_only=True)
        )


def _weight_fault(path: Path) -> str:
    """What is wrong with a safetensors file's size, from its header; empty where nothing is."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            header = _safetensors_header(file)
        expected = 8 + len(header) + max((end for _, end in _tensor_ranges(header)), default=0)
    except (ValueError, KeyError, TypeError, AttributeError):
        return "has no safetensors header"
    return "" if size == expected else f"has {size:,} bytes instead of {expected:,}"


def _hash_weights(checkpoint: Checkpoint) -> str:
    total_bytes = sum(path.stat().st_size for path in checkpoint.weight_files)
    hash_one = _hash_file if total_bytes <= _SAMPLED_FROM_BYTES else _hash_samples
    lines = [f"{path.name} {hash_one(path)}" for path in checkpoint.weight_files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _hash_file(path: Path) -> str:
    if not _is_file(path):
        return "none"
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash_samples(path: Path) -> str:
    """The hash of a safetensors file's size, its header, and both ends of each of its tensors."""
    digest = hashlib.sha256(str(path.stat().st_size).encode())
    with path.open("rb") as file:
        header = _safetensors_header(file)
        digest.update(header)
        for start, end in _tensor_ranges(header):
            _update(digest, file, 8 + len(header) + start, min(_SAMPLE_BYTES, end - start))
            _update(
                digest,
                file,
                8 + len(header) + max(start, end - _SAMPLE_BYTES),
                min(_SAMPLE_BYTES, end - start),
            )
    return digest.hexdigest()


def _safetensors_header(file: BinaryIO) -> bytes:
    """The JSON at the beginning of a safetensors file, as far as there is any."""
    num_bytes = int.from_bytes(file.read(8), "little")
    return file.read(min(num_bytes, os.fstat(file.fileno()).st_size))


def _tensor_ranges(header: bytes) -> list[tuple[int, int]]:
    tensors = json.loads(header)
    return sorted(tuple(entry["data_offsets"]) for name, entry in tensors.items() if name != "__metadata__")


def _update(digest: "hashlib._Hash", file: BinaryIO, position: int, num_bytes: int) -> None:
    file.seek(position)
    digest.update(file.read(num_bytes))
