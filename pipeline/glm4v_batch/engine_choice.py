"""Choose the engine that a copy of a model runs on, and say why."""

from collections.abc import Iterator

from glm4v_batch.activations import can_predict
from glm4v_batch.errors import JobError
from glm4v_batch.job import Job
from glm4v_batch.needs import ModelNeeds
from glm4v_batch.types import Replica

_KERNEL_VALUE_BYTES = 2


def reason_for_generate(job: Job, needs: ModelNeeds, replica: Replica) -> str | None:
    """Why `generate()` runs on *replica*, or None where the packed engine does.

    Raises JobError where the job asks for the packed engine and it cannot serve.
    """
    if job.batching.engine == "generate":
        return "as the job says"
    cannot = next(_cannot(needs, replica), None)
    if job.batching.engine == "packed":
        if cannot:
            raise JobError(
                f"batching.engine: packed cannot run this: {cannot}.", hint="Set batching.engine: generate."
            )
        return None
    return cannot or next(_is_slower(needs, replica), None)


def _cannot(needs: ModelNeeds, replica: Replica) -> Iterator[str]:
    if not can_predict(needs.config):
        yield f"the packed engine does not know models of the type {needs.config.get('model_type')}"
    if replica.offloaded_bytes:
        yield "a part of the model lies in host memory or on the disk (devices.offload)"


def _is_slower(needs: ModelNeeds, replica: Replica) -> Iterator[str]:
    """Where the packed engine would be right, and slower or not measured."""
    if replica.devices[0].index is None:
        yield "on a CPU it is faster than the packed engine, whose attention is made for GPUs"
    if needs.bytes_per_value != _KERNEL_VALUE_BYTES:
        yield "the packed engine's attention is fast for values of 16 bits only (model.dtype)"
    if "quantization_config" in needs.config:
        yield "the packed engine is not measured with quantised weights yet"
    if "moe" in str(needs.config.get("model_type")):
        yield "the packed engine is not measured with mixtures of experts yet"
