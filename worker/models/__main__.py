"""`python -m worker.models fetch | add | ensure | export`: one JSON line on stdout, progress on stderr.

The line is a `BaseModelDescription`, of `export` an `ExportedBase`, or `{"error": {code, message, hint}}` with exit
status 1.
"""

import argparse
import contextlib
import json
import sys
import traceback
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from app.domain.base_models import (
    MODEL_SOURCE,
    BaseModelDescription,
    DirectorySource,
    ExportedBase,
    GgufSource,
    HubSource,
    ModelSource,
)
from app.domain.model_catalogue import FETCHABLE_MODELS
from app.domain.spec_base import Name
from app.domain.tuning_methods import Quantization
from worker.models.describe import sha256_of
from worker.models.errors import BaseModelError
from worker.models.store import ModelStore

GGUF_MAGIC = b"GGUF"


def main(arguments: list[str] | None = None) -> int:
    asked = _parser().parse_args(arguments)
    out = sys.stdout
    try:
        # A library that prints must not break the one line that the caller reads.
        with contextlib.redirect_stdout(sys.stderr):
            answer = _run(asked)
    except Exception as raised:
        error = raised if isinstance(raised, BaseModelError) else _unexpected(raised)
        told = {"code": error.code, "message": error.message, "hint": error.hint}
        print(json.dumps({"error": told}, ensure_ascii=False), file=out)
        return 1
    print(answer.model_dump_json(), file=out)
    return 0


def _unexpected(raised: Exception) -> BaseModelError:
    traceback.print_exception(raised)
    return BaseModelError("unexpected", f"{type(raised).__name__}: {raised}", "see the log for where it happened")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m worker.models", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    fetch = verbs.add_parser("fetch", help="a model of the catalogue")
    fetch.add_argument("name")
    add = verbs.add_parser("add", help="a directory, a GGUF file, or ORG/NAME@REVISION of the Hugging Face hub")
    add.add_argument("name")
    add.add_argument("source")
    ensure = verbs.add_parser("ensure", help="a model that is known by its digest")
    export = verbs.add_parser("export", help="such a model as plain weights at one quantisation")
    export.add_argument("--quantization", required=True, help="as JSON; null: none")
    export.add_argument("--to", type=Path, required=True)
    for verb in (ensure, export):
        verb.add_argument("source", help="its source, as JSON")
        verb.add_argument("--name", required=True)
        verb.add_argument("--digest", required=True)
    for verb in (fetch, add, ensure, export):
        verb.add_argument("--cache", type=Path, required=True)
    return parser


def _run(asked: argparse.Namespace) -> BaseModelDescription | ExportedBase:
    store = ModelStore(asked.cache)
    try:
        TypeAdapter(Name).validate_python(asked.name)
        if asked.verb == "fetch":
            return store.obtain(asked.name, _catalogued(asked.name))
        if asked.verb == "add":
            return store.obtain(asked.name, _source(asked.source))
        described = store.ensure(asked.name, MODEL_SOURCE.validate_json(asked.source), asked.digest)
        if asked.verb == "ensure":
            return described
        held = TypeAdapter(Quantization | None).validate_json(asked.quantization)
        from worker.models.export import export_base  # torch takes seconds to import

        return export_base(described, held, asked.to)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise BaseModelError(
            "bad_request", f"{place}: {first['msg']}", "a name is letters, digits, dot, dash and underscore"
        ) from error
    except OSError as error:
        raise BaseModelError(
            "cache_unusable",
            f"{error.filename or asked.cache}: {error.strerror or error}",
            "check its free space and permissions",
        ) from error


def _catalogued(name: str) -> ModelSource:
    if name not in FETCHABLE_MODELS:
        raise BaseModelError(
            "unknown_model",
            f"{name!r} is not in the catalogue",
            f"known: {', '.join(sorted(FETCHABLE_MODELS))}; add others from a directory or from the hub",
        )
    return FETCHABLE_MODELS[name]


def _source(text: str) -> ModelSource:
    if Path(text).is_dir():
        return DirectorySource(path=Path(text).resolve())
    if Path(text).is_file():
        return _gguf(Path(text).resolve())
    repository, at, revision = text.partition("@")
    if at and revision and repository.count("/") == 1 and not repository.startswith((".", "/", "~")):
        return HubSource(repository=repository, revision=revision)
    raise BaseModelError(
        "bad_source",
        f"{text!r} is neither a directory or GGUF file here nor ORG/NAME@REVISION",
        "name an existing directory or file, or a hub repository with the revision to pin, such as ORG/NAME@main",
    )


def _gguf(path: Path) -> GgufSource:
    with path.open("rb") as file:
        is_gguf = file.read(len(GGUF_MAGIC)) == GGUF_MAGIC
    if not is_gguf:
        raise BaseModelError(
            "bad_source",
            f"{path.name} is no GGUF file",
            "name a GGUF file, or a directory with config.json, tokenizer.json and safetensors",
        )
    digest = sha256_of(path)
    return GgufSource(sha256=digest, path=path, revision=digest[:12])


if __name__ == "__main__":
    sys.exit(main())
