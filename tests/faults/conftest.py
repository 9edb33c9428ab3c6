"""What the fault tests share: the shim, a scene, and a line each on what was tried."""

import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.faults.harness import Scene, make_scene

Judge = Callable[[str, int, Sequence[str]], None]


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`shim.c`, compiled."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    assert compiler, "the fault tests need a C compiler: apt-get install gcc libc6-dev"
    library = tmp_path_factory.mktemp("shim") / "shim.so"
    source = Path(__file__).with_name("shim.c")
    options = ["-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([compiler, *options, "-o", str(library), str(source), "-ldl", "-lpthread"], check=True)
    return library


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory, shim: Path) -> Scene:
    """The job that the faults meet."""
    return make_scene(tmp_path_factory.mktemp("faults") / "scene", shim)


@pytest.fixture
def judge(record_property: Callable[[str, object], None]) -> Judge:
    """Say how many points were tried, and fail with all violations there were."""

    def conclude(what: str, num_points: int, violations: Sequence[str]) -> None:
        record_property("fault", f"{what}: {num_points} points tried, {len(violations)} violations")
        assert num_points > 0
        assert not violations, "\n".join(violations)

    return conclude


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what was tried, however the tests were spread over processes."""
    reports = [r for kind in ("passed", "failed") for r in terminalreporter.getreports(kind)]
    for report in reports:
        if report.when == "call":
            for name, text in report.user_properties:
                if name == "fault":
                    terminalreporter.write_line(str(text))
