"""A service whose inference is a real vLLM, and an adapter that is published while it runs."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import MODEL_CACHE, ROOT
from tests.e2e.conftest import SECRET, Deployment, start, stop
from tests.vllm.server import RANK, vllm_server

BASE = "smollm2-135m"
DTYPE = os.environ.get("VERITUNE_VLLM_DTYPE", "float32")
"""Of both engines. In float32 two implementations of one function differ in the last digits only."""

SPEC = {
    "name": "demo",
    "dataset": "demo",
    "adapter": {"type": "lora", "r": RANK},
    "trainer": {"train_steps": 24, "effective_batch_size": 8, "learning_rate": 0.001},
}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Any:
    """A skip counts as a failure here: the tests are about a vLLM that runs."""
    report = yield
    if report.skipped:
        report.outcome, report.longrepr = "failed", f"skipped: {report.longrepr}"
    return report


FIGURES: pytest.StashKey[list[str]] = pytest.StashKey()


@pytest.fixture(scope="session")
def figures(request: pytest.FixtureRequest) -> list[str]:
    """Lines to be shown at the end of the run."""
    return request.config.stash.setdefault(FIGURES, [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in terminalreporter.config.stash.get(FIGURES, []):
        terminalreporter.line(line)


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vllm") / "home"


def veritune(home: Path, *words: str) -> str:
    """What a command of the operator's prints last."""
    own = {"VERITUNE_HOME": str(home), "VERITUNE_CACHE": str(MODEL_CACHE)}
    command = [sys.executable, "-m", "app.cli", *words]
    done = subprocess.run(command, env=os.environ | own, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    return done.stdout.split()[-1]


@pytest.fixture(scope="session")
def exported(home: Path) -> Path:
    """The small base model, dequantised, in a directory named by its digest."""
    veritune(home, "models", "fetch", BASE)
    return Path(veritune(home, "models", "export", BASE, "--to", str(home / "bases")))


@pytest.fixture(scope="session")
def vllm(exported: Path) -> Iterator[str]:
    """The URL of a vLLM over it. Nobody tells it of any adapter."""
    with vllm_server(exported, MODEL_CACHE / "adapters", DTYPE, SECRET) as url:
        yield url


@pytest.fixture(scope="session")
def deployment(home: Path, vllm: str) -> Iterator[Deployment]:
    """`veritune up` with vLLM for its inference server."""
    running = start(home, VERITUNE_INFERENCE_URL=vllm)
    running.inference_url = vllm
    yield running
    assert stop(running) == []


@pytest.fixture(scope="session")
def job(deployment: Deployment) -> Any:
    """The demo's job: its adapter is published long after vLLM has started."""
    with (ROOT / "examples" / "train.jsonl").open("rb") as file:
        deployment.post("/datasets", files={"file": ("train.jsonl", file)}, data={"name": "demo"})
    submitted = deployment.post("/jobs", json=SPEC)
    done = deployment.wait_for_job(submitted["id"])
    assert done["status"] == "succeeded", done["error"]
    return done
