"""The commands and their options."""

from pathlib import Path
from typing import Annotated, Literal

import httpx
import typer
import uvicorn
from pydantic import ValidationError

from app.cli import corpora, demo, models, up
from app.cli.client import RequestError, client_of
from app.cli.rerun import rerun
from app.composition import Services, compose
from app.db.migrating import migrate
from app.domain.base_models import SERVED_AS
from app.domain.errors import VerituneError
from app.logs import configure_logs
from app.settings import Settings

application = typer.Typer(
    name="veritune",
    help="Self-hosted fine-tuning as a service for ReAct fact-checking adapters.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
models_application = typer.Typer(help="Base models of this deployment.", no_args_is_help=True)
corpora_application = typer.Typer(help="Pages to search in.", no_args_is_help=True)
application.add_typer(models_application, name="models")
application.add_typer(corpora_application, name="corpora")


def _settings() -> Settings:
    try:
        return Settings()
    except (ValidationError, ValueError) as error:
        told = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise _ended(told.removeprefix("Value error, ")) from None


def _services() -> Services:
    settings = _settings()
    migrate(settings.database)
    return compose(settings)


def _ended(message: str) -> typer.Exit:
    typer.secho(f"veritune: {message}", err=True, fg=typer.colors.RED)
    return typer.Exit(1)


@application.command("up")
def up_command() -> None:
    """Run everything on this machine until Ctrl-C: broker, API, trainer, runner, inference."""
    try:
        up.up(_settings())
    except (up.CannotStartError, models.ModelCommandError, RuntimeError) as error:
        raise _ended(str(error)) from None


@application.command("api")
def api_command() -> None:
    """Run the API process alone (a scaled deployment)."""
    settings = _settings()
    configure_logs(settings.log_format)
    uvicorn.run(
        "app.main:create_app",
        factory=True,
        host=settings.host,
        port=settings.port,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=5,
    )


@application.command("worker-health")
def worker_health_command() -> None:
    """Whether the worker of this host and these queues reports to the database; status 1 when it does not."""
    services = compose(_settings())
    name = services.settings.worker_name
    try:
        alive = any(device.name == name and device.online for device in services.devices.all())
    except VerituneError as error:
        raise _ended(error.detail) from None
    finally:
        services.close()
    if not alive:
        raise _ended(f"the worker {name} has not reported of late")


@application.command("migrate")
def migrate_command() -> None:
    """Bring the database's tables to this version."""
    migrate(_settings().database)


@application.command("demo")
def demo_command(
    examples: Annotated[Path, typer.Option(help="Directory of the demo's data.")] = Path("examples"),
    keep: Annotated[bool, typer.Option(help="Leave the service running afterwards.")] = False,
) -> None:
    """Upload, train, publish, and judge held-out claims with base and adapter, side by side."""
    try:
        demo.demo(_settings(), examples, keep=keep)
    except (demo.DemoError, RequestError) as error:
        raise _ended(str(error)) from None


@application.command("rerun")
def rerun_command(job: str) -> None:
    """Submit a job of the running service once more, with everything pinned: the same adapter on the same machine."""
    with client_of(_settings()) as client:
        try:
            again, manifest = rerun(client, job)
        except RequestError as error:
            raise _ended(str(error)) from None
        except httpx.TransportError:
            raise _ended(f"no service answers at {client.base_url}; start it with `veritune up`") from None
    typer.echo(f"{again['id']}  {again['name']}  queued")
    if manifest and (where := manifest["environment"]):
        typer.echo(f"to the bit the same with {where['precision']} on {where['device']}, {where['threads']} threads")


@models_application.command("fetch")
def models_fetch(name: str) -> None:
    """Get a model of the catalogue (smollm2-135m) and list it."""
    services = _services()
    try:
        described = models.fetch(services, name)
    except models.ModelCommandError as error:
        raise _ended(str(error)) from None
    typer.echo(f"{described.name}  {described.parameters:,} parameters  digest {described.digest[:12]}")


@models_application.command("add")
def models_add(name: str, source: str) -> None:
    """List a model: SOURCE is a directory, or ORG/NAME@REVISION of the Hugging Face hub."""
    services = _services()
    try:
        described = models.add(services, name, source)
    except models.ModelCommandError as error:
        raise _ended(str(error)) from None
    typer.echo(f"{described.name}  {described.parameters:,} parameters  digest {described.digest[:12]}")


@models_application.command("export")
def models_export(
    name: str,
    to: Annotated[Path, typer.Option(help="A directory; the model's own is made in it, named by its digest.")],
    quantization: Annotated[
        Literal["nf4", "fp4", "int8", "none"], typer.Option(help="What adapters over it were trained on.")
    ] = "nf4",
) -> None:
    """Write a listed model as it is served, as plain weights that vLLM reads; the last word is its directory."""
    services = _services()
    try:
        exported = models.export(services, name, SERVED_AS[quantization], to)
    except (models.ModelCommandError, VerituneError) as error:
        raise _ended(str(error)) from None
    typer.echo(f"{exported.name}  {quantization}  {exported.path}")


@models_application.command("list")
def models_list() -> None:
    """The models that jobs may name."""
    for view in _services().base_models.all():
        mark = "*" if view.default else " "
        typer.echo(f"{mark} {view.name}  {view.parameters:,} parameters  context {view.context_length}")


@corpora_application.command("fetch")
def corpora_fetch(name: str) -> None:
    """Get a corpus of the catalogue (wiki-leads: 10,033 leads of Wikipedia articles, CC BY-SA)."""
    services = _services()
    try:
        corpus = corpora.fetch(services, name)
    except (corpora.CorpusCommandError, VerituneError) as error:
        raise _ended(str(error)) from None
    typer.echo(f"{corpus.name}  {corpus.pages:,} pages  {corpus.id}{'  (default)' if corpus.default else ''}")


@corpora_application.command("add")
def corpora_add(file: Path, name: Annotated[str | None, typer.Option()] = None) -> None:
    """Import pages from a JSONL file: {title, text} or {title, sentences} a line."""
    services = _services()
    try:
        corpus, _new = services.corpora.create(file, file.name, name)
    except (VerituneError, OSError) as error:
        raise _ended(str(error)) from None
    typer.echo(f"{corpus.name}  {corpus.pages:,} pages  {corpus.id}{'  (default)' if corpus.default else ''}")
