"""What a checkpoint folder says, which folders are refused, and how weights are told apart."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from glm4v_batch.checkpoint import Checkpoint, identity, locate, read_checkpoint
from glm4v_batch.errors import JobError

TINY = Path(__file__).parents[2] / "data" / "tiny-glm4v"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def make_folder(folder: Path) -> Path:
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file({"a": np.arange(8000.0), "b": np.ones(3000)}, folder / "model.safetensors")
    return folder


def edit(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None takes a key out."""
    content = json.loads(path.read_text())
    merged: Mapping[str, Any] = content | changes
    path.write_text(json.dumps({key: value for key, value in merged.items() if value is not None}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "model")


def test_checkpoint_says_what_its_files_say(folder: Path) -> None:
    edit(folder / "config.json", image_token_id=678)

    checkpoint = read_checkpoint(folder)

    assert checkpoint.model_type == "glm4v"
    assert checkpoint.image_token_id == 678
    assert checkpoint.eos_token_ids == (664, 671, 673)
    assert checkpoint.context_tokens == 4096
    assert checkpoint.dtype == "float32"
    assert checkpoint.revision is None
    assert (checkpoint.images.min_frame_pixels, checkpoint.images.max_frame_pixels) == (12544, 156800)
    assert checkpoint.weight_files == (folder / "model.safetensors",)
    assert "<|image|>" in checkpoint.chat_template


def test_checkpoint_agrees_with_transformers_image_processor(folder: Path) -> None:
    from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil

    theirs, ours = Glm4vImageProcessorPil.from_pretrained(folder), read_checkpoint(folder).images

    assert (theirs.size["shortest_edge"], theirs.size["longest_edge"]) == (
        ours.min_frame_pixels,
        ours.max_frame_pixels,
    )
    names = ("patch_size", "temporal_patch_size", "merge_size", "resample", "rescale_factor", "do_normalize")
    assert [getattr(theirs, name) for name in names] == [getattr(ours, name) for name in names]
    assert tuple(theirs.image_mean) == ours.image_mean


def test_image_defaults_are_those_of_transformers(folder: Path) -> None:
    from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil

    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "Glm4vImageProcessor"}')

    ours = read_checkpoint(folder).images

    theirs = Glm4vImageProcessorPil
    assert theirs.size == {"shortest_edge": ours.min_frame_pixels, "longest_edge": ours.max_frame_pixels}
    assert (theirs.image_mean, theirs.image_std) == (list(ours.image_mean), list(ours.image_std))
    assert (theirs.resample, theirs.rescale_factor) == (ours.resample, ours.rescale_factor)


def test_nested_image_processor_goes_before_the_older_file(folder: Path) -> None:
    nested = {"image_processor_type": "Glm4vImageProcessor", "merge_size": 4}
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": nested}))

    assert read_checkpoint(folder).images.merge_size == 4


def test_eos_falls_back_to_the_text_config(folder: Path) -> None:
    (folder / "generation_config.json").unlink()

    assert read_checkpoint(folder).eos_token_ids == (664, 671, 673)


@pytest.mark.parametrize("place", ["chat_template.json", "tokenizer_config.json"])
def test_chat_template_is_found_in_its_older_places(folder: Path, place: str) -> None:
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text("{}")
    edit(folder / place, chat_template="from " + place)

    assert read_checkpoint(folder).chat_template == "from " + place


def test_named_chat_templates_give_the_default_one(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    edit(folder / "tokenizer_config.json", chat_template=named)

    assert read_checkpoint(folder).chat_template == "yes"


def test_everything_missing_is_reported_at_once(folder: Path) -> None:
    for name in ("tokenizer.json", "chat_template.jinja", "model.safetensors", "preprocessor_config.json"):
        (folder / name).unlink()

    with pytest.raises(JobError) as caught:
        read_checkpoint(folder)

    message = str(caught.value)
    assert str(folder) in message
    assert message.startswith("4 mistakes")
    for name in ("tokenizer.json", "chat template", "weight files", "preprocessor_config.json"):
        assert name in message


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "preprocessor_config.json"])
def test_remote_code_is_refused(folder: Path, name: str) -> None:
    edit(folder / name, auto_map={"AutoModel": "modeling_chatglm.ChatGLM"})

    with pytest.raises(JobError, match="its own Python code"):
        read_checkpoint(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.pt"])
def test_pickled_weights_are_refused(folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder / name)

    with pytest.raises(JobError, match="only as pickles"):
        read_checkpoint(folder)


def test_missing_shard_is_named(folder: Path) -> None:
    weight_map = {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    with pytest.raises(JobError, match=r"lacks 1 of 2 weight files: model-00002"):
        read_checkpoint(folder)


def test_unsupported_model_type_names_the_supported_ones(folder: Path) -> None:
    edit(folder / "config.json", model_type="llava")
    edit(folder / "preprocessor_config.json", image_processor_type="LlavaImageProcessor")

    with pytest.raises(JobError, match=r"type llava.*glm4v, glm46v, glm4v_moe, glm_ocr"):
        read_checkpoint(folder)


def test_another_model_with_a_glm_image_processor_is_refused(folder: Path) -> None:
    edit(folder / "config.json", model_type="llama")

    with pytest.raises(JobError, match="type llama"):
        read_checkpoint(folder)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_half_downloaded_weights_are_refused(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])

    with pytest.raises(JobError, match=r"damaged weight file: model\.safetensors"):
        read_checkpoint(folder)


def test_broken_json_is_reported_and_no_traceback(folder: Path) -> None:
    (folder / "config.json").write_text("{")

    with pytest.raises(JobError) as caught:
        read_checkpoint(folder)

    assert str(caught.value).count("config.json that cannot be read") == 1


def test_switched_off_resizing_is_refused_and_not_ignored(folder: Path) -> None:
    edit(folder / "preprocessor_config.json", do_resize=False)

    with pytest.raises(JobError, match="do_resize"):
        read_checkpoint(folder)


def test_missing_folder_is_a_job_error(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="is not a folder"):
        read_checkpoint(tmp_path / "nothing")


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hub cache with one model, and no network."""
    from huggingface_hub import constants

    model = tmp_path / "hub" / "models--org--name"
    make_folder(model / "snapshots" / COMMIT)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_hub_id_becomes_its_snapshot_with_the_commit(hub_cache: Path, revision: str | None) -> None:
    checkpoint = read_checkpoint(locate("org/name", revision))

    assert checkpoint.folder == hub_cache / "models--org--name" / "snapshots" / COMMIT
    assert checkpoint.revision == COMMIT
    assert identity(checkpoint)["weights"] == f"commit {COMMIT}"


def test_model_that_is_not_downloaded_says_how_to_get_it(hub_cache: Path) -> None:
    with pytest.raises(JobError) as caught:
        locate("org/other", "v1")

    assert "revision v1" in str(caught.value)
    assert "hf download org/other" in caught.value.hint


def test_name_that_is_no_hub_id_is_a_job_error(hub_cache: Path) -> None:
    with pytest.raises(JobError, match="neither a folder here nor"):
        locate("data/tiny/nothing", None)


def test_revision_of_a_local_folder_is_refused(folder: Path) -> None:
    with pytest.raises(JobError, match="which has no revisions"):
        locate(str(folder), "main")


def test_a_chat_template_that_is_no_text_is_named(folder: Path) -> None:
    (folder / "chat_template.jinja").write_bytes(b"caf\xe9")

    with pytest.raises(JobError, match=r"has a chat_template\.jinja that is not UTF-8"):
        read_checkpoint(folder)


def test_the_home_of_an_unknown_user_is_a_mistake_of_the_job() -> None:
    with pytest.raises(JobError, match=r"~nosuchuser/m begins with the home folder of an unknown user"):
        locate("~nosuchuser/m", None)


def test_local_folder_is_located_without_the_hub(folder: Path) -> None:
    assert locate(str(folder), None) == folder


def test_identity_stays_when_files_are_only_copied_or_touched(folder: Path, tmp_path: Path) -> None:
    before = identity(read_checkpoint(folder))
    os.utime(folder / "model.safetensors", (1, 1))

    shutil.copytree(folder, tmp_path / "copy")

    assert identity(read_checkpoint(tmp_path / "copy")) == before


@pytest.mark.parametrize("sampled", [False, True])
def test_identity_changes_with_any_tensor(
    folder: Path, sampled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sampled:
        monkeypatch.setattr("glm4v_batch.checkpoint._SAMPLED_FROM_BYTES", 0)
    before = identity(read_checkpoint(folder))

    save_file({"a": np.arange(8000.0), "b": np.ones(3000) * 1.5}, folder / "model.safetensors")

    after = identity(read_checkpoint(folder))
    assert after["weights"] != before["weights"]
    assert {key: after[key] for key in after if key != "weights"} == {
        key: before[key] for key in before if key != "weights"
    }


def change_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages }}")


def change_pixels(folder: Path) -> None:
    edit(folder / "preprocessor_config.json", size={"shortest_edge": 1, "longest_edge": 2})


def change_eos(folder: Path) -> None:
    edit(folder / "generation_config.json", eos_token_id=1)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (change_template, "chat_template"),
        (change_pixels, "image_processor"),
        (change_eos, "generation_config"),
    ],
)
def test_identity_names_the_part_that_changed(folder: Path, change: Any, part: str) -> None:
    before = identity(read_checkpoint(folder))

    change(folder)

    after = identity(read_checkpoint(folder))
    assert {key for key in after if after[key] != before[key]} == {part}


def test_reading_a_checkpoint_imports_no_model_library(folder: Path) -> None:
    import subprocess
    import sys

    program = (
        "import sys, glm4v_batch.checkpoint as c, pathlib; "
        "c.read_checkpoint(pathlib.Path(sys.argv[1])); "
        "sys.exit(bool({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)))"
    )
    finished = subprocess.run([sys.executable, "-c", program, str(folder)], check=False)

    assert finished.returncode == 0


def test_checkpoint_crosses_process_borders(folder: Path) -> None:
    import pickle

    checkpoint: Checkpoint = read_checkpoint(folder)

    assert pickle.loads(pickle.dumps(checkpoint)) == checkpoint
