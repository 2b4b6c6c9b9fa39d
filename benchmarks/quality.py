"""`python -m benchmarks.quality`: what a trained adapter's verdicts on FEVER are worth, with controls and a peer.

    --home DIR     state of the run; a run that was stopped goes on there (default .cache/quality)
    --claims N     only the first N test claims
    --seeds N      adapters of the same recipe
    --quick        a few updates, dev claims and encoder updates, to see that it runs; writes no result
    --cache DIR    where converted base models lie (VERITUNE_CACHE)

Pages are split 60/15/25 by the hash of their title. Trajectories are synthesised from the claims, adapters are
trained on them, calibrated on dev, and judge the test claims by evaluation jobs. A small encoder that reads the first
five sentences of the gold page is the peer. Everything goes through the HTTP API of one deployment. Writes
`benchmarks/results/quality.json`.
"""

import argparse
import json
import os
import time
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from app.domain.claims import Verdict
from app.domain.evaluation_report import judge_by_overlap
from app.domain.evaluations import GoldClaim
from benchmarks.deployment import BenchmarkError, Deployment
from benchmarks.encoder_peer import Encoder, Pair, fetch_encoder
from benchmarks.fever import Fever, FeverClaim, write_claims
from benchmarks.machine import ROOT, head
from benchmarks.quality_scores import accuracy_where, read_answers, score

RESULTS = ROOT / "benchmarks" / "results" / "quality.json"
BASE = "qwen2.5-coder-0.5b-instruct"
TRAINER: dict[str, Any] = {
    "epochs": 1,
    "effective_batch_size": 16,
    "learning_rate": 5e-4,
    "verdict_branch": 1.0,
    "verdict_weight": 30,
}
"""The recipe. `docs/log.md` has what was tried on dev."""

ENCODER_RATE = 1e-4
DOWNLOAD_SECONDS = 1_800.0
"""Longest start of the deployment, which downloads the base first."""


class Size(NamedTuple):
    """How much is done. `trainer`: in addition to the recipe."""

    trainer: dict[str, Any]
    dev_claims: int
    control_claims: int
    ungrounded_claims: int
    encoder_epochs: float
    encoder_seconds: float


WHOLE = Size({}, dev_claims=300, control_claims=500, ungrounded_claims=100, encoder_epochs=3, encoder_seconds=3_600)
QUICK = Size(
    {"train_steps": 4}, dev_claims=30, control_claims=12, ungrounded_claims=4, encoder_epochs=3, encoder_seconds=20
)


class Run:
    """The steps, each of which leaves a named thing in the deployment and is skipped if that is there."""

    def __init__(self, deployment: Deployment, directory: Path, fever: Fever, size: Size) -> None:
        self.deployment = deployment
        self.size = size
        self.directory = directory
        self.fever = fever

    def upload(self, parts: dict[str, list[FeverClaim]]) -> None:
        if not self._has("/corpora/fever"):
            path = self.fever.write_corpus(self.directory / "corpus.jsonl")
            self._send("/corpora", path, name="fever")
        for part, claims in parts.items():
            if not self._has(f"/datasets/claims-{part}"):
                path = write_claims(claims, self.directory / f"claims-{part}.jsonl")
                self._send("/datasets", path, name=f"claims-{part}", kind="claims")

    def synthesise(self) -> dict[str, Any]:
        """The report of the synthesis of the train part."""
        if not self._has("/jobs/synthesis"):
            body = {"dataset": "claims-train", "corpus": "fever", "output": "train", "split": [1, 0, 0]}
            self.deployment.post("/datasets/synthesize", json=body | {"name": "synthesis"})
        self._finish("synthesis")
        return self._artifact("synthesis", "report.json")

    def train(self, name: str, dataset: str, seed: int) -> dict[str, Any]:
        """{seconds, updates, losses} of the job, which publishes an adapter of this name."""
        if not self._has(f"/jobs/{name}"):
            spec = {"name": name, "dataset": dataset, "base_model": BASE, "seed": seed}
            spec["trainer"] = TRAINER | self.size.trainer
            self.deployment.post("/jobs", json=spec)
        job = self._finish(name)
        metrics = self._all(f"/jobs/{name}/metrics")
        return {
            "seconds": round(sum(one["seconds"] for one in metrics), 1),
            "updates": job["progress"]["update"],
            "losses": [round(one["loss"], 4) for one in metrics if one["loss"] is not None],
        }

    def evaluate(self, name: str, **spec: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """(the report, the answers by name of the run) of an evaluation job."""
        if not self._has(f"/jobs/{name}"):
            self.deployment.post("/evaluations", json={"name": name, "corpus": "fever"} | spec)
        self._finish(name)
        answers = self.deployment.client.get(f"/jobs/{name}/artifacts/answers.jsonl")
        return self._artifact(name, "report.json"), read_answers(answers.content)

    def _has(self, route: str) -> bool:
        return self.deployment.client.get(route).is_success

    def _send(self, route: str, path: Path, **fields: str) -> None:
        with path.open("rb") as file:
            self.deployment.post(route, files={"file": (path.name, file)}, data=fields)

    def _finish(self, name: str) -> dict[str, Any]:
        """Wait for the job, and tell its progress each minute."""
        printed_at = 0.0
        while True:
            job: dict[str, Any] = self.deployment.get(f"/jobs/{name}")
            if job["status"] == "succeeded":
                return job
            if job["status"] in ("failed", "cancelled"):
                raise BenchmarkError(f"{name} is {job['status']}: {job['error']}")
            if time.monotonic() - printed_at > 60:
                printed_at = time.monotonic()
                print(f"{name}: {job['status']} {json.dumps(job['progress'])}", flush=True)
            time.sleep(1)

    def _all(self, route: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        while True:
            page = self.deployment.client.get(
                route, params={"limit": 1000, "after": found[-1]["update"] if found else 0}
            ).json()
            found += page["data"]
            if not page["has_more"]:
                return found

    def _artifact(self, job: str, name: str) -> dict[str, Any]:
        document: dict[str, Any] = self.deployment.get(f"/jobs/{job}/artifacts/{name}")
        return document


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--home", type=Path, default=ROOT / ".cache" / "quality")
    parser.add_argument("--claims", type=int)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    cache = os.environ.get("VERITUNE_CACHE", str(ROOT / ".cache" / "veritune"))
    parser.add_argument("--cache", type=Path, default=Path(cache))
    given = parser.parse_args()
    given.home.mkdir(parents=True, exist_ok=True)
    fever = Fever()
    parts = {part: fever.list_claims(part) for part in ("train", "dev", "test")}
    chosen = parts["test"][: given.claims]
    deployment = Deployment(given.home / "deployment", given.cache.resolve(), BASE, DOWNLOAD_SECONDS)
    try:
        result = _measure(
            Run(deployment, given.home, fever, QUICK if given.quick else WHOLE), parts, chosen, given.seeds
        )
    finally:
        deployment.stop()
    if not given.quick:
        RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result["scores"], indent=1))


def _measure(run: Run, parts: dict[str, list[FeverClaim]], chosen: list[FeverClaim], seeds: int) -> dict[str, Any]:
    run.upload(parts)
    synthesis = run.synthesise()
    names = [f"seed-{number}" for number in range(1, seeds + 1)]
    trained = {name: run.train(name, "train", number) for number, name in enumerate(names, start=1)}
    trained["claim-only"] = run.train("claim-only", "claims-train", 1)
    run.evaluate(
        "dev",
        dataset="claims-dev",
        adapters=names,
        controls=[],
        include_base=False,
        fit_calibration=True,
        max_claims=run.size.dev_claims,
    )
    count = len(chosen)
    test = {"dataset": "claims-test", "include_base": False, "controls": []}
    answers: dict[str, list[dict[str, Any]]] = {}
    baselines: dict[str, Any] = {}
    for name in (*names, "claim-only"):
        report, found = run.evaluate(f"test-{count}-{name}", **test, adapters=[name], max_claims=count)
        answers |= found
        baselines = report["baselines"]
    few = min(count, run.size.control_claims)
    controls = {"include_base": True, "controls": ["shuffled_pages"], "max_claims": few}
    _, controlled = run.evaluate(f"controls-{few}", **test | controls, adapters=names[:1])
    peers = [_judge_with_encoder(run, parts["train"], chosen, number) for number in range(1, seeds + 1)]
    ungrounded = {"controls": ["ungrounded"], "max_claims": run.size.ungrounded_claims}
    alone, _ = run.evaluate("ungrounded", **test | ungrounded, adapters=names[:1])
    valid = next(one["valid_actions"] for one in alone["runs"] if one["run"]["control"] == "ungrounded")
    return head("verdicts on FEVER, pages never trained on", "benchmarks.quality") | {
        "recipe": TRAINER,
        "base": BASE,
        "synthesis": {
            key: synthesis[key] for key in ("rows_read", "rows_made", "refused", "labels", "steps", "actions")
        },
        "trained": trained,
        "baselines": baselines,
        "scores": _summarise(run.fever, chosen, answers, names, peers)
        | {"wrong_page_nei": score(chosen[:few], controlled[f"{names[0]}, shuffled pages"])["nei_share"]}
        | {"valid_actions_ungrounded": valid},
        "runs": {name: score(chosen[: len(found)], found) for name, found in (controlled | answers).items()},
        "peers": peers,
        "rows": _raw_rows(chosen, answers),
    }


def _summarise(
    fever: Fever,
    claims: list[FeverClaim],
    answers: dict[str, list[dict[str, Any]]],
    names: list[str],
    peers: list[dict[str, Any]],
) -> dict[str, Any]:
    """The table of the results: means over the seeds."""
    gold = [
        GoldClaim(claim=c.claim, label=Verdict(c.label), page=c.page, read=fever.first_sentences(c.page))
        for c in claims
    ]
    overlap = judge_by_overlap(gold)
    claim_only = [a["verdict"] == c.label for c, a in zip(claims, answers["claim-only"], strict=True)]
    scored = [score(claims, answers[name]) for name in names]
    hard = [accuracy_where(claims, answers[name], lambda i: not claim_only[i])[0] or 0.0 for name in names]
    hard_overlap = [right for right, known in zip(overlap, claim_only, strict=True) if not known]
    peer = fmean(one["accuracy"] for one in peers)
    means = {key: _mean([one[key] for one in scored]) for key in scored[0]}
    return {
        "claims": len(claims),
        **means,
        "accuracy_of_each_seed": [one["accuracy"] for one in scored],
        "overlap": fmean(overlap),
        "claim_only_trained": fmean(claim_only),
        "where_claim_only_is_wrong": fmean(hard),
        "overlap_where_claim_only_is_wrong": fmean(hard_overlap),
        "peer_encoder": peer,
        "against_the_peer": (means["accuracy"] or 0.0) / peer,
    }


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(fmean(known), 4) if known else None


def _judge_with_encoder(run: Run, train: list[FeverClaim], test: list[FeverClaim], seed: int) -> dict[str, Any]:
    """The peer's accuracy on the test claims, given the first five sentences of their pages."""
    stored = run.directory / f"encoder-{len(test)}-{seed}.json"
    if stored.exists():
        document: dict[str, Any] = json.loads(stored.read_text())
        return document
    encoder = Encoder(fetch_encoder(run.directory / "encoder"), seed)
    learned, judged_pairs = (
        [Pair(c.claim, run.fever.first_sentences(c.page), c.label) for c in claims] for claims in (train, test)
    )
    began = time.perf_counter()
    updates = encoder.train(learned, run.size.encoder_epochs, run.size.encoder_seconds, ENCODER_RATE, seed)
    seconds = time.perf_counter() - began
    judged = encoder.judge(judged_pairs)
    right = [max(p, key=p.__getitem__) == pair.label for pair, p in zip(judged_pairs, judged, strict=True)]
    found = {"seed": seed, "accuracy": fmean(right), "updates": updates, "seconds": round(seconds, 1)}
    stored.write_text(json.dumps(found))
    return found


def _raw_rows(claims: list[FeverClaim], answers: dict[str, list[dict[str, Any]]]) -> list[list[Any]]:
    """[label, then the verdict and its confidence of each run], in the order of the claims and of the runs."""
    short = {str(Verdict.SUPPORTS): "S", str(Verdict.REFUTES): "R", str(Verdict.NOT_ENOUGH_INFO): "N"}
    return [
        [
            short[claim.label],
            *((short[found[i]["verdict"]], round(found[i]["confidence"], 3)) for found in answers.values()),
        ]
        for i, claim in enumerate(claims)
    ]


if __name__ == "__main__":
    main()
