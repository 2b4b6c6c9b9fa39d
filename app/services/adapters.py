"""Adapters: publish, list, download, promote, delete, and cache on a host's disk by digest."""

import io
import json
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy.exc import IntegrityError

from app.atomic_dirs import locked, publish
from app.db import Database, Unit
from app.db.tables import AdapterRow, JobRow
from app.domain.adapters import (
    CONFIG_FILE,
    MANIFEST_FILE,
    MODEL_CARD_FILE,
    WEIGHTS_FILE,
    Adapter,
    Manifest,
    adapter_digest,
    render_model_card,
)
from app.domain.errors import InvalidError, NotFoundError, VerituneError
from app.domain.identity import new_id
from app.domain.jobs import JobStatus, Lease
from app.services.naming import free_name
from app.services.staged_blobs import discard_unreferenced, staged
from app.services.submission import add_job
from app.storage import Blobs, stale, sweep

RESOURCE = "adapter"
DEFAULT = "default"
DELETED = ".deleted-"
"""Prefix of an empty marker file. Its time says when the adapter of the sibling directory was deleted."""

S = JobStatus
BuildJob = Callable[[Adapter], JobRow]
log = structlog.get_logger(__name__)


class Adapters:
    def __init__(self, database: Database, blobs: Blobs, cache: Path) -> None:
        self._database = database
        self._blobs = blobs
        self._directory = cache / "adapters"

    def sweep(self) -> None:
        """Delete partial directories of killed processes, and directories of adapters deleted long ago."""
        sweep(self._directory, ".partial-*")
        for mark in stale(self._directory, f"{DELETED}*"):
            digest = mark.name.removeprefix(DELETED)
            with self._database.read() as unit:
                published = unit.adapters.by_digest(digest) is not None  # published again
            if not published:
                shutil.rmtree(self._directory / digest, ignore_errors=True)
            mark.unlink(missing_ok=True)

    def publish(
        self,
        lease: Lease,
        name: str,
        directory: Path,
        manifest: Manifest,
        evaluation: BuildJob | None = None,
        *,
        gated: bool = False,
    ) -> str | None:
        """Store what was trained and end its job as succeeded, in one transaction.

        Its name is `name`, or one made from it where another adapter has that. Returns the adapter's id; None when the
        user asked to cancel before the transaction began (the job is cancelled then, and nothing is published).

        `evaluation`: builds the job that evaluates the adapter, which is queued in the same transaction. `gated`: that
        job decides on the promotion. Otherwise the first adapter of a deployment becomes the default one.
        """
        with staged(self._database, self._blobs) as blobs:
            row = self._store(self._free_name(name), directory, manifest, blobs)
            published = self._commit(lease, row, name, evaluation, gated=gated)
        if published is None:
            discard_unreferenced(self._database, self._blobs, blobs.created)
        else:
            self._warm_cache(row.digest)
        return published

    def _store(self, named: str, directory: Path, manifest: Manifest, blobs: Blobs) -> AdapterRow:
        weights, config = WEIGHTS_FILE[manifest.kind], CONFIG_FILE[manifest.kind]
        stored = {path.name: blobs.put_file(path) for path in sorted(directory.iterdir())}
        document = json.dumps(manifest.model_dump(mode="json"), indent=2, sort_keys=True)
        stored[MANIFEST_FILE] = blobs.put_bytes(document.encode())
        stored[MODEL_CARD_FILE] = blobs.put_bytes(render_model_card(named, manifest).encode())
        return AdapterRow(
            id=new_id("adp"),
            name=named,
            digest=adapter_digest(stored[weights].digest, (directory / config).read_bytes()),
            kind=manifest.kind,
            job_id=manifest.job_id,
            base_model=manifest.base.name,
            files={file: blob.digest for file, blob in stored.items()},
            manifest=manifest.model_dump(mode="json"),
            bytes=sum(blob.size for blob in stored.values()),
            created_at=datetime.now(UTC),
        )

    def _warm_cache(self, digest: str) -> None:
        """Copy the files to this host before the first prediction needs them.

        If this fails, that prediction copies them.
        """
        try:
            self.on_disk(digest)
        except (VerituneError, OSError) as error:
            log.warning("adapter_not_cached", digest=digest, reason=str(error))

    def _free_name(self, name: str) -> str:
        with self._database.read() as unit:
            return free_name(name, lambda taken: unit.adapters.find(taken) is not None)

    def _commit(
        self, lease: Lease, row: AdapterRow, asked: str, evaluation: BuildJob | None, *, gated: bool
    ) -> str | None:
        job, reason = _build_job(row, evaluation)
        with self._database.write() as unit:
            if unit.jobs.end(lease, (S.CANCELLING,), S.CANCELLED):
                unit.jobs.add_event(lease.job_id, "cancelled", "cancelled before it was published", "info", {})
                return None
            unit.adapters.add(row)
            unit.jobs.end(lease, (S.RUNNING, S.PAUSING), S.SUCCEEDED, adapter_id=row.id)
            if row.name != asked:
                message = f"another adapter is named {asked!r}; this one is published as {row.name!r}"
                unit.jobs.add_event(lease.job_id, "name_taken", message, "warning", {"name": row.name})
            data = {"adapter_id": row.id, "digest": row.digest}
            unit.jobs.add_event(lease.job_id, "succeeded", f"published as {row.id}", "info", data)
            if evaluation is not None:
                _queue_evaluation(unit, lease, row, job, reason)
            if not gated and unit.aliases.find_target(RESOURCE, DEFAULT) is None:
                unit.aliases.point(RESOURCE, DEFAULT, row.id)
        return row.id

    def get(self, reference: str) -> Adapter:
        with self._database.read() as unit:
            row = _get_row(unit, reference)
            return _to_adapter(row, unit.aliases.names_by_target(RESOURCE))

    def config(self, reference: str) -> dict[str, Any]:
        """The adapter's adapter_config.json, or the config.json of a full model."""
        with self._database.read() as unit:
            row = _get_row(unit, reference)
        name = CONFIG_FILE["full" if row.kind == "full" else "peft"]
        document: dict[str, Any] = json.loads(self._blobs.get_bytes(row.files[name]))
        return document

    def default(self) -> Adapter | None:
        """The promoted adapter, if any."""
        with self._database.read() as unit:
            target = unit.aliases.find_target(RESOURCE, DEFAULT)
            row = unit.adapters.find(target) if target else None
            return _to_adapter(row, unit.aliases.names_by_target(RESOURCE)) if row else None

    def list_adapters(self, after: str | None, limit: int) -> tuple[list[Adapter], bool]:
        with self._database.read() as unit:
            rows, more = unit.adapters.list_adapters(after, limit)
            aliases = unit.aliases.names_by_target(RESOURCE)
        return [_to_adapter(row, aliases) for row in rows], more

    def promote(self, reference: str) -> Adapter:
        """Make this the adapter that predictions use when they name none."""
        with self._database.write() as unit:
            unit.aliases.point(RESOURCE, DEFAULT, _get_row(unit, reference).id)
        return self.get(reference)

    def delete(self, reference: str) -> None:
        """Unpublish an adapter. Blobs that another row refers to remain: adapter_config.json is often the same.

        Running predictions still end well: `sweep` deletes the directory on this host later.
        """
        with self._database.write() as unit:
            row = _get_row(unit, reference)
            unit.aliases.drop(RESOURCE, row.id)
            unit.adapters.remove(row)
            unit.session.flush()
            shared = unit.adapters.by_digest(row.digest) is not None
        if not shared and (self._directory / row.digest).exists():
            (self._directory / f"{DELETED}{row.digest}").touch()
        discard_unreferenced(self._database, self._blobs, set(row.files.values()))
        self.sweep()

    def archive(self, reference: str) -> tuple[str, Iterator[bytes]]:
        """(file name, zip stream) of the adapter's files, in constant memory."""
        with self._database.read() as unit:
            row = _get_row(unit, reference)
        for name, digest in row.files.items():  # check before the first byte: a truncated stream looks like a zip
            if not self._blobs.exists(digest):
                raise NotFoundError(f"the stored bytes of {name} are gone", code="blob_lost")
        return f"{row.name}.zip", self._zip(row)

    def by_digest(self, digest: str) -> AdapterRow:
        with self._database.read() as unit:
            row = unit.adapters.by_digest(digest)
        if row is None:
            raise NotFoundError(f"no adapter has the digest {digest[:12]}…", code="unknown_adapter")
        return row

    def on_disk(self, digest: str) -> Path:
        """The adapter's directory on this host, `<cache>/adapters/<digest>`. It is created if it is missing.

        Its adapter_config.json names the base by its served digest, as vLLM's resolver asks for. The stored file, which
        the adapter's digest covers, names the base by name and revision.
        """
        row = self.by_digest(digest)
        target = self._directory / digest
        if not target.exists():
            with locked(self._directory.parent / f".lock-adapter-{digest[:16]}"):  # not in the folder that vLLM reads
                self._write(row, target)
        _name_served_base(target, row)  # an older version may have created it without this
        return target

    def _write(self, row: AdapterRow, target: Path) -> None:
        if target.exists():  # another process created it first
            return
        self._directory.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=self._directory, prefix=".partial-"))
        try:
            for name, blob in row.files.items():
                self._blobs.fetch(blob, partial / name)
            _name_served_base(partial, row)
            publish(partial, target)  # with rights for a server that shares the folder and runs as another user
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def put_on_disk(self, served_base: str) -> None:
        """Copy the adapters of one served base to this host's disk, for a server that reads only the disk."""
        self._directory.mkdir(parents=True, exist_ok=True)
        with self._database.read() as unit:
            rows = unit.adapters.list_all_adapters()
        for row in rows:
            manifest = Manifest.model_validate(row.manifest)
            if manifest.served_base == served_base and manifest.kind == "peft" and "vllm" in manifest.servable_by:
                self.on_disk(row.digest)

    def _zip(self, row: AdapterRow) -> Iterator[bytes]:
        sink = _Forward()
        with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED) as archive:  # weights do not compress
            for name, blob in sorted(row.files.items()):
                entry = zipfile.ZipInfo(name, date_time=row.created_at.timetuple()[:6])
                with archive.open(entry, "w") as file:
                    for chunk in self._blobs.stream(blob):
                        file.write(chunk)
                        yield sink.drain()
        yield sink.drain()


class _Forward(io.RawIOBase):
    """A write-only stream that cannot seek. `drain` empties its buffer, so zips stream in constant memory."""

    def __init__(self) -> None:
        self._taken = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: "bytes | bytearray | memoryview") -> int:  # type: ignore[override]
        self._taken += data
        return len(data)

    def drain(self) -> bytes:
        taken, self._taken = bytes(self._taken), bytearray()
        return taken


def _name_served_base(directory: Path, row: AdapterRow) -> None:
    if row.kind == "full":
        return
    path = directory / CONFIG_FILE["peft"]
    document: dict[str, Any] = json.loads(path.read_bytes())
    served_base = Manifest.model_validate(row.manifest).served_base
    if document.get("base_model_name_or_path") == served_base:
        return
    with tempfile.NamedTemporaryFile("w", dir=directory, prefix=f".{path.name}.", delete=False) as file:
        file.write(json.dumps(document | {"base_model_name_or_path": served_base}, indent=2, sort_keys=True))
    changed = Path(file.name)
    changed.chmod(path.stat().st_mode)  # a server that shares the folder may run as another user
    changed.replace(path)


def _get_row(unit: Unit, reference: str) -> AdapterRow:
    row = unit.adapters.find(reference)
    if row is None:
        raise NotFoundError(f"there is no adapter {reference!r}; GET /adapters lists them", code="unknown_adapter")
    return row


def _to_adapter(row: AdapterRow, aliases: dict[str, list[str]]) -> Adapter:
    return Adapter.model_validate(
        {
            "id": row.id,
            "name": row.name,
            "digest": row.digest,
            "kind": row.kind,
            "job_id": row.manifest["job_id"],
            "base_model": row.base_model,
            "aliases": tuple(sorted(aliases.get(row.id, []))),
            "bytes": row.bytes,
            "manifest": row.manifest,
            "calibration": row.calibration,
            "created_at": row.created_at,
        }
    )


def _build_job(row: AdapterRow, build: BuildJob | None) -> tuple[JobRow | None, str]:
    """(the job that evaluates the adapter, why there is none). A trained adapter is published without it, too."""
    if build is None:
        return None, ""
    try:
        return build(_to_adapter(row, {})), ""
    except (NotFoundError, InvalidError) as error:
        return None, error.detail


def _queue_evaluation(unit: Unit, lease: Lease, row: AdapterRow, job: JobRow | None, reason: str) -> None:
    """Add the job, or an event that says why the adapter is not evaluated."""
    if job is not None:
        try:
            with unit.session.begin_nested():
                add_job(unit, job, {"adapter_id": row.id})
            message = f"{job.name} evaluates the adapter"
            unit.jobs.add_event(lease.job_id, "evaluation", message, "info", {"job_id": job.id})
            return
        except IntegrityError:
            reason = "its dataset was deleted meanwhile"
    unit.jobs.add_event(lease.job_id, "warning", f"the adapter is not evaluated: {reason}", "warning", {})
