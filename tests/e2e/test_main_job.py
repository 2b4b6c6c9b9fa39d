"""The main job, on real input and the real small base model: upload, train in 4 bits, publish, judge.

The input is the user's file, configuration and pages where they are here, and the examples where they are not.
"""

import csv
import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from app.domain.base_models import served_base_digest
from app.domain.tuning_methods import Quantization
from tests.conftest import MODEL_CACHE, ROOT, SHARED
from tests.e2e.conftest import SECRET, Deployment

pytestmark = pytest.mark.slow
EXAMPLES = ROOT / "examples"
ROWS = int(os.environ.get("VERITUNE_E2E_ROWS", "32"))
"""Rows of the user's file to train on; `make acceptance` takes all 270."""


CONFIG: dict[str, Any] = {
    "adapter": {"type": "lora"},
    "quantization": {"bits": 4},
    "preprocessing": {"global_max_sequence_length": 512},
    "trainer": {"batch_size": 1, "gradient_accumulation_steps": 16, "learning_rate": 0.0004},
}


def rows() -> tuple[str, bytes]:
    """A file's name and content."""
    if SHARED.is_dir():
        return "react.csv", users_csv()
    return "train.jsonl", b"".join((EXAMPLES / "train.jsonl").read_bytes().splitlines(keepends=True)[:ROWS])


def configuration() -> dict[str, Any]:
    if not SHARED.is_dir():
        return CONFIG
    given: dict[str, Any] = yaml.safe_load((SHARED / "seed_config.yaml").read_text("utf-8"))
    return given


def pages_and_claim() -> tuple[Path, str]:
    if SHARED.is_dir():
        return SHARED / "fever_pages.jsonl", "2 Hearts is a musical composition by Minogue."
    return EXAMPLES / "corpus.jsonl", "The aardvark feeds mainly on termites."


def users_csv() -> bytes:
    with (SHARED / "react_fever_270.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))[:ROWS]
    out = io.StringIO()
    writer = csv.DictWriter(out, ["claim", "trajectories", "label"])
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


@pytest.fixture(scope="module")
def job(deployment: Deployment) -> Any:
    """Rows and configuration, posted as they are but for dataset, base model and one epoch."""
    dataset = deployment.post("/datasets", files={"file": rows()}, data={"name": "users"})
    assert dataset["report"]["rows_refused"] == 0
    config = configuration() | {"dataset": "users", "base_model": "smollm2-135m"}
    config["trainer"] = config["trainer"] | {"epochs": 1}
    plan = deployment.post("/jobs/plan", json=config)
    assert plan["rows_dropped"] == 0
    submitted = deployment.post("/jobs", json=config)
    done = deployment.wait_for_job(submitted["id"], seconds=1_800)
    assert done["status"] == "succeeded", done["error"]
    return done


@pytest.fixture(scope="module")
def downloaded(deployment: Deployment, job: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("adapter")
    content = deployment.client.get(f"/adapters/{job['adapter_id']}/download").content
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        archive.extractall(directory)
    return directory


def test_the_loss_falls(deployment: Deployment, job: Any) -> None:
    losses = [row["loss"] for row in deployment.get(f"/jobs/{job['id']}/metrics")["data"]]
    assert len(losses) == job["plan"]["total_updates"]
    assert losses[-1] < losses[0]


def test_no_row_loses_its_finish(deployment: Deployment, job: Any) -> None:
    plan = job["plan"]
    assert plan["rows_trained"] == plan["rows"]
    assert plan["lengths"]["maximum"] <= plan["max_sequence_length"] == 512


def test_stock_peft_gives_the_served_logits(deployment: Deployment, job: Any, downloaded: Path) -> None:
    adapter = deployment.get(f"/adapters/{job['adapter_id']}")
    base = next(m for m in deployment.get("/base-models")["data"] if m["name"] == "smollm2-135m")
    prompt = list(range(1_000, 1_040))
    digests = {"adapter": adapter["digest"], "base": served_base_digest(base["digest"], Quantization())}
    served = {name: _first_logprobs(deployment, digest, prompt) for name, digest in digests.items()}
    script = ROOT / "tests" / "e2e" / "stock_peft.py"
    models = MODEL_CACHE / "models" / base["digest"]
    asked = json.dumps({"base": str(models), "adapter": str(downloaded), "prompt": prompt})
    done = subprocess.run(
        [sys.executable, str(script)], input=asked, capture_output=True, text=True, check=False, cwd=downloaded
    )
    assert done.returncode == 0, done.stderr[-2000:]
    stock = json.loads(done.stdout.strip().splitlines()[-1])
    assert stock["zero_lora_b"] == []
    for name in ("adapter", "base"):
        differences = [abs(stock[name][token] - value) for token, value in served[name].items()]
        assert max(differences) <= 2e-2, (name, differences)
    moved = [abs(stock["base"][token] - value) for token, value in served["adapter"].items()]
    assert max(moved) > 5e-2


def _first_logprobs(deployment: Deployment, model: str, prompt: list[int]) -> dict[int, float]:
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": 10,
        "return_tokens_as_token_ids": True,
    }
    headers = {"Authorization": f"Bearer {SECRET}"}
    answer = httpx.post(
        f"{deployment.inference_url}/v1/completions", json=body, headers=headers, timeout=120, trust_env=False
    )
    assert answer.is_success, answer.text
    top = answer.json()["choices"][0]["logprobs"]["top_logprobs"][0]
    return {int(key.removeprefix("token_id:")): value for key, value in top.items()}


def test_claims_are_judged_by_base_and_adapter_with_evidence(deployment: Deployment, job: Any) -> None:
    pages, claim = pages_and_claim()
    with pages.open("rb") as file:
        corpus = deployment.post("/corpora", files={"file": ("pages.jsonl", file)}, data={"name": "fever"})
    assert corpus["default"]
    for adapter in (job["adapter_id"], None):
        answer = deployment.post("/predict", json={"claim": claim, "adapter": adapter, "max_steps": 3})
        assert answer["verdict"] in ("SUPPORTS", "REFUTES", "NOT ENOUGH INFO")
        assert abs(sum(answer["probabilities"].values()) - 1) < 1e-3
        assert answer["grounded"]
        assert 0 < answer["timings"]["scoring"] < answer["timings"]["generation"] < answer["timings"]["total"]
        for step in answer["steps"][:-1]:
            assert step["observation"]["source"] in ("corpus", "server")
        for cited in answer["evidence"]:
            assert cited["text"]


def test_a_stream_tells_the_steps_and_then_the_prediction(deployment: Deployment, job: Any) -> None:
    ask = {"claim": "The Danube is a river.", "stream": True, "max_steps": 2}
    with deployment.client.stream("POST", "/predict", json=ask) as stream:
        lines = [line for line in stream.iter_lines() if line.startswith("event: ")]
    assert lines[0] == "event: thought"
    assert lines[-1] == "event: prediction"


def test_the_events_of_the_job_stream_without_a_gap_and_end(deployment: Deployment, job: Any) -> None:
    headers = {"Accept": "text/event-stream", "Last-Event-ID": "2"}
    with deployment.client.stream("GET", f"/jobs/{job['id']}/events", headers=headers) as stream:
        ids = [int(line.removeprefix("id: ")) for line in stream.iter_lines() if line.startswith("id: ")]
    assert ids == list(range(3, ids[-1] + 1))


def test_swagger_is_served_without_a_third_party(deployment: Deployment) -> None:
    page = deployment.client.get("/docs").text
    assert "https://" not in page
    assert deployment.client.get("/static/swagger/swagger-ui-bundle.js").is_success


def test_the_state_lives_under_one_directory(deployment: Deployment) -> None:
    assert {"blobs", "work", "up.log"} <= {path.name for path in deployment.home.iterdir()}
