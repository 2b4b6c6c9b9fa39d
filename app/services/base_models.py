"""Base models: the deployment's allow-list. The operator's CLI writes it, and every process reads it."""

import json
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

from app.db import Database
from app.db.tables import BaseModelRow
from app.domain.architectures import Architecture
from app.domain.base_models import BaseModelDescription, served_base_digest
from app.domain.encoding import Encoder, Tokenization
from app.domain.errors import InvalidError, NotFoundError, Problem
from app.domain.frozen import Frozen
from app.domain.react import ReactFormat
from app.domain.tuning_methods import Quantization
from app.storage import Blobs
from app.tokenizers import load_tokenization


class BaseModelView(Frozen):
    """A base model as the API shows it."""

    name: str
    digest: str
    revision: str
    architecture: str
    parameters: int
    bytes: int
    context_length: int
    vocab_size: int
    fp16: str
    licence: str | None
    default: bool


class BaseModels:
    def __init__(self, database: Database, blobs: Blobs, default: str) -> None:
        self._database = database
        self._blobs = blobs
        self._default = default
        self._tokenization = lru_cache(maxsize=8)(self._load_tokenization)
        self._sizes = lru_cache(maxsize=64)(self._load_sizes)

    def register(self, description: BaseModelDescription) -> None:
        """Write the row of a model that `python -m worker.models` stored on this host."""
        directory = Path(description.path)
        tokenizer = self._blobs.put_file(directory / "tokenizer.json").digest
        config = self._blobs.put_file(directory / "config.json").digest
        row = BaseModelRow(
            name=description.name,
            digest=description.digest,
            tokenizer=tokenizer,
            config=config,
            description=description.model_dump(mode="json"),
            created_at=datetime.now(UTC),
        )
        with self._database.write() as unit:
            unit.base_models.put(row)

    def list_base_models(self) -> list[BaseModelView]:
        with self._database.read() as unit:
            return [self._to_response(row) for row in unit.base_models.list_base_models()]

    def get(self, name: str | None) -> BaseModelRow:
        """The row of `name`, or of the deployment's default."""
        wanted = name or self._default
        with self._database.read() as unit:
            row = unit.base_models.get(wanted)
            known = [other.name for other in unit.base_models.list_base_models()]
        if row is not None:
            return row
        hint = f"this deployment lists: {', '.join(known)}" if known else "run: veritune models fetch"
        raise InvalidError(
            f"the base model {wanted!r} is not on this deployment's list; {hint}",
            code="unknown_base_model",
            problems=(Problem(("base_model",), f"{wanted!r} is not listed", hint),),
        )

    def describe(self, row: BaseModelRow) -> BaseModelDescription:
        return BaseModelDescription.model_validate(row.description)

    def sizes(self, row: BaseModelRow) -> Architecture | None:
        """The layer sizes by config.json. None for an architecture that uses other keys."""
        return self._sizes(row.config)

    def served_digest(self, row: BaseModelRow, quantization: Quantization | None) -> str:
        """The model name at inference for the base without an adapter."""
        return served_base_digest(row.digest, quantization)

    def by_digest(self, digest: str) -> BaseModelRow:
        with self._database.read() as unit:
            row = unit.base_models.by_digest(digest)
        if row is None:
            raise NotFoundError(f"no base model has the digest {digest[:12]}…", code="unknown_base_model")
        return row

    def tokenization(self, row: BaseModelRow) -> Tokenization:
        described = self.describe(row)
        return self._tokenization(row.tokenizer, described.bos_id, described.eos_id)

    def encoder(self, row: BaseModelRow, form: ReactFormat) -> Encoder:
        return Encoder(self.tokenization(row), form)

    def _load_tokenization(self, digest: str, bos_id: int | None, eos_id: int) -> Tokenization:
        return load_tokenization(self._blobs.get_bytes(digest), bos_id=bos_id, eos_id=eos_id)

    def _load_sizes(self, digest: str) -> Architecture | None:
        return Architecture.from_config(json.loads(self._blobs.get_bytes(digest)))

    def _to_response(self, row: BaseModelRow) -> BaseModelView:
        known = self.describe(row)
        return BaseModelView(
            name=row.name,
            digest=row.digest,
            revision=known.revision,
            architecture=known.architecture,
            parameters=known.parameters,
            bytes=known.bytes,
            context_length=known.context_length,
            vocab_size=known.vocab_size,
            fp16=known.fp16,
            licence=known.licence,
            default=row.name == self._default,
        )
