"""What a replica's process decides while it loads."""

import pytest

from glm4v_batch.engines.loading import is_worth_compiling


@pytest.mark.parametrize(("num_expected", "expected"), [(20, False), (699, False), (700, True), (None, True)])
def test_only_a_short_job_does_without_compiling(num_expected: int | None, *, expected: bool) -> None:
    assert is_worth_compiling(num_expected) is expected
