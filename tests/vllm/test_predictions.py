"""Claims judged over vLLM: the tests of the main job, and verdict by verdict beside the embedded engine."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from app.cli.ports import free_port
from app.cli.processes import Processes, ProcessSpec
from app.composition import compose
from app.domain.predictions import Prediction, PredictRequest
from app.settings import Settings
from tests.conftest import MODEL_CACHE, ROOT, SHARED
from tests.e2e import test_main_job as main_job
from tests.e2e.conftest import SECRET, Deployment, command_of
from tests.e2e.test_main_job import downloaded as downloaded
from tests.vllm.conftest import DTYPE
from tests.vllm.server import until_ready

pytestmark = pytest.mark.vllm

test_stock_peft_gives_the_served_logits = main_job.test_stock_peft_gives_the_served_logits
test_claims_are_judged = main_job.test_claims_are_judged_by_base_and_adapter_with_evidence
test_a_stream_tells_the_steps = main_job.test_a_stream_tells_the_steps_and_then_the_prediction

CLAIMS = 60
AGREEMENT = 0.98


@pytest.fixture
def embedded(home: Path, deployment: Deployment) -> Iterator[str]:
    """The URL of our own front and engine, over what the same deployment has published."""
    port = free_port()
    own = {
        "VERITUNE_HOME": str(home),
        "VERITUNE_CACHE": str(MODEL_CACHE),
        "VERITUNE_INFERENCE_PORT": str(port),
        "VERITUNE_INFERENCE_SECRET": SECRET,
        "VERITUNE_INFERENCE_DTYPE": DTYPE,
    }
    lines: list[str] = []
    processes = Processes(lambda _who, line: lines.append(line))
    try:
        processes.start(ProcessSpec("inference", [sys.executable, "-m", "worker.inference"], own))
        until_ready("inference", f"http://127.0.0.1:{port}", processes, lines)
        yield f"http://127.0.0.1:{port}"
    finally:
        processes.stop()


def claims() -> tuple[list[str], Path]:
    """(claims, the pages they are about): real ones where they are, else the examples'."""
    if not (SHARED / "fever_claims.jsonl").is_file():
        rows = _rows(ROOT / "examples" / "heldout.jsonl")
        return [row["claim"] for row in rows][:CLAIMS], ROOT / "examples" / "corpus.jsonl"
    titles = {page["title"] for page in _rows(SHARED / "fever_pages.jsonl")}
    about = [row["claim"] for row in _rows(SHARED / "fever_claims.jsonl") if row["page"] in titles]
    return about[:CLAIMS], SHARED / "fever_pages.jsonl"


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def judged(home: Path, url: str, requests: list[PredictRequest]) -> list[Prediction]:
    """The predictions of this deployment when the inference server is the one at `url`."""
    settings = Settings(home=home, cache=MODEL_CACHE, inference_url=url, inference_secret=SecretStr(SECRET))
    with closing(compose(settings)) as services:
        answers = services.predictions.predict_batch(requests)
    failed = [answer for answer in answers if not isinstance(answer, Prediction)]
    assert failed == []
    return [answer for answer in answers if isinstance(answer, Prediction)]


def test_no_inference_of_our_own_runs_beside_it(deployment: Deployment) -> None:
    modules = [word for process in deployment.processes() for word in command_of(process) if word.startswith("worker")]
    assert "worker" in modules
    assert not [module for module in modules if module.startswith("worker.inference")]


def test_the_verdicts_are_those_of_the_embedded_engine(
    home: Path, deployment: Deployment, job: Any, vllm: str, embedded: str, figures: list[str]
) -> None:
    wanted, pages = claims()
    with pages.open("rb") as file:
        corpus = deployment.post("/corpora", files={"file": (pages.name, file)}, data={"name": "judged"})["id"]
    asks = [PredictRequest(claim=c, adapter=job["adapter_id"], corpus=corpus, max_steps=3) for c in wanted]
    assert len(asks) >= 50

    started = time.monotonic()
    theirs = judged(home, vllm, asks)
    between = time.monotonic()
    ours = judged(home, embedded, asks)
    seconds = (between - started, time.monotonic() - between)

    pairs = list(zip(theirs, ours, strict=True))
    apart = [(a, b) for a, b in pairs if a.verdict is not b.verdict]
    agreement = 1 - len(apart) / len(pairs)
    alike = sum(a.text == b.text for a, b in pairs) / len(pairs)
    shift = max(abs(a.confidence - b.confidence) for a, b in pairs if a.text == b.text)
    figures.append(
        f"verdicts of vLLM and the embedded engine agree on {agreement:.1%} of {len(pairs)} claims in {DTYPE} "
        f"(whole trajectories: {alike:.1%}; the confidence then differs by at most {shift:.4f}); "
        f"{seconds[0]:.0f} s and {seconds[1]:.0f} s"
    )
    figures += [f"apart: {a.claim}\n  vLLM: {a.text}\n  embedded: {b.text}" for a, b in apart]
    assert len({prediction.verdict for prediction in ours}) > 1
    assert agreement >= AGREEMENT
