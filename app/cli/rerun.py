"""`veritune rerun JOB`: submits a job again with everything pinned, so that its adapter can be bit-identical."""

from typing import Any

import httpx

from app.cli.client import get, ok
from app.cli.errors import CommandError


def rerun(client: httpx.Client, reference: str) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return (the new job, the manifest of the old job's adapter, if it has one).

    Raises CommandError, also if the base model or the dataset has changed since the manifest was written.
    """
    job = get(client, f"/jobs/{reference}")
    if job["kind"] != "train":
        raise CommandError(f"{job['name']} trained nothing; only a training job can be run again")
    manifest = get(client, f"/adapters/{job['adapter_id']}")["manifest"] if job["adapter_id"] else None
    if manifest is not None:
        _check_unchanged(client, job, manifest)
    return ok(client.post("/jobs", json=pinned(job))), manifest


def pinned(job: dict[str, Any]) -> dict[str, Any]:
    """The job's spec without its name, which is taken, and with the sequence length of its plan."""
    spec: dict[str, Any] = job["spec"]
    length = {"global_max_sequence_length": job["plan"]["max_sequence_length"]}
    return spec | {"name": None, "preprocessing": spec["preprocessing"] | length}


def _check_unchanged(client: httpx.Client, job: dict[str, Any], manifest: dict[str, Any]) -> None:
    base = manifest["base"]
    listed = {model["name"]: model["digest"] for model in get(client, "/base-models")["data"]}
    if listed.get(base["name"]) != base["digest"]:
        raise CommandError(f"{base['name']} is no longer the base model that {job['name']} was trained over")
    if get(client, f"/datasets/{job['spec']['dataset']}")["digest"] != manifest["dataset_digest"]:
        raise CommandError(f"the dataset is no longer the one that {job['name']} was trained on")
