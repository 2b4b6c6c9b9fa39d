"""The commands, with their options."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
import uvicorn
from typer.core import TyperGroup

from app.cli import corpora, demo, evaluation, models, synthesis, up
from app.cli.client import client_of
from app.cli.errors import CommandError
from app.cli.rerun import rerun
from app.composition import Services, compose
from app.db.migrating import migrate
from app.domain.base_models import QUANTIZATION_BY_NAME
from app.domain.errors import VerituneError
from app.logs import configure_logs
from app.settings import Settings, read_settings


class _Commands(TyperGroup):
    """All commands. An error that the operator can fix ends a command with one line and status 1."""

    def invoke(self, ctx: Any) -> Any:  # typer does not export the type of its context
        try:
            return super().invoke(ctx)
        except (CommandError, VerituneError) as error:
            message = str(error)
        except OSError as error:
            if error.filename is None:
                raise
            message = f"{error.filename}: {error.strerror}"
        typer.secho(f"veritune: {message}", err=True, fg=typer.colors.RED)
        raise typer.Exit(1)


application = typer.Typer(
    name="veritune",
    cls=_Commands,
    help="Self-hosted fine-tuning as a service for ReAct fact-checking adapters.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
models_application = typer.Typer(help="Base models of this deployment.", no_args_is_help=True)
corpora_application = typer.Typer(help="Corpora: sets of pages that predictions search.", no_args_is_help=True)
application.add_typer(models_application, name="models")
application.add_typer(corpora_application, name="corpora")


Home = Annotated[Path | None, typer.Option(help="Directory of all embedded state; overrides VERITUNE_HOME.")]
Host = Annotated[str | None, typer.Option(help="Address that the API listens on; overrides VERITUNE_HOST.")]
Port = Annotated[int | None, typer.Option(min=1, max=65535, help="The API's port; overrides VERITUNE_PORT.")]


def _settings(**options: Path | str | int | None) -> Settings:
    """Read the settings. Options override the environment, also for the processes that the command starts."""
    given = {f"VERITUNE_{name.upper()}": str(value) for name, value in options.items() if value is not None}
    os.environ.update(given)
    return read_settings()


def _services(home: Path | None) -> Services:
    settings = _settings(home=home)
    migrate(settings.database)
    return compose(settings)


@application.command("up")
def up_command(port: Port = None, host: Host = None, home: Home = None) -> None:
    """Run everything on this machine until Ctrl-C: broker, API, trainer, runner, inference."""
    up.up(_settings(port=port, host=host, home=home))


@application.command("api")
def api_command(port: Port = None, host: Host = None, home: Home = None) -> None:
    """Run only the API process (for a scaled deployment)."""
    settings = _settings(port=port, host=host, home=home)
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
    """Check that workers of this host have lately reported for every queue; otherwise end with status 1."""
    services = compose(read_settings())
    settings = services.settings
    try:
        served = services.devices.served_on(settings.host_name)
    finally:
        services.close()
    if idle := [queue for queue in settings.queues if queue not in served]:
        raise CommandError(f"no worker on {settings.host_name} has lately reported for the queues {', '.join(idle)}")


@application.command("migrate")
def migrate_command(home: Home = None) -> None:
    """Migrate the database to this version."""
    migrate(_settings(home=home).database)


@application.command("demo")
def demo_command(
    examples: Annotated[Path, typer.Option(help="Directory with the demo's data.")] = Path("examples"),
    keep: Annotated[bool, typer.Option(help="Keep the service running afterwards.")] = False,
    port: Port = None,
    host: Host = None,
    home: Home = None,
) -> None:
    """Upload, train, publish, then judge held-out claims with the base and with the adapter."""
    demo.demo(_settings(port=port, host=host, home=home), examples, keep=keep)


@application.command("evaluate")
def evaluate_command(
    dataset: str,
    adapter: Annotated[list[str] | None, typer.Option(help="An adapter to judge with; may be repeated.")] = None,
    corpus: Annotated[str | None, typer.Option(help="Corpus to search; default is the promoted one.")] = None,
    base_model: Annotated[str | None, typer.Option(help="Base model to judge with beside the adapters.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the job.")] = None,
    max_claims: Annotated[int | None, typer.Option(min=1, help="Only the dataset's first claims.")] = None,
    fit_calibration: Annotated[bool, typer.Option(help="Fit the adapters' probabilities to the labels.")] = False,
    controls: Annotated[bool, typer.Option(help="Repeat the run with empty and with other pages.")] = True,
    page: Annotated[Path, typer.Option(help="Where the report is written, as HTML.")] = Path("report.html"),
    port: Port = None,
    host: Host = None,
) -> None:
    """Judge a dataset's claims with base and adapters, and report how well."""
    asked = {"corpus": corpus, "base_model": base_model, "name": name, "max_claims": max_claims}
    spec = {"dataset": dataset, "adapters": adapter or []} | {key: value for key, value in asked.items() if value}
    if fit_calibration:
        spec["fit_calibration"] = True
    if not controls:
        spec["controls"] = []
    with client_of(_settings(port=port, host=host)) as client:
        evaluation.evaluate(client, spec, page)


@application.command("synthesize")
def synthesize_command(
    dataset: str,
    corpus: Annotated[str | None, typer.Option(help="Corpus to search; default is the promoted one.")] = None,
    output: Annotated[str | None, typer.Option(help="Name of the new dataset.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the job.")] = None,
    max_claims: Annotated[int | None, typer.Option(min=1, help="Only the dataset's first claims.")] = None,
    contrasts: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the rows beside which a changed claim is made.")
    ] = 0.0,
    report: Annotated[Path, typer.Option(help="Where the report is written, as JSON.")] = Path("synthesis.json"),
    port: Port = None,
    host: Host = None,
) -> None:
    """Make trajectories to train on from a dataset's labelled claims, by running Search and Lookup on a corpus."""
    asked = {"corpus": corpus, "output": output, "name": name, "max_claims": max_claims, "contrasts": contrasts}
    spec = {"dataset": dataset} | {key: value for key, value in asked.items() if value}
    with client_of(_settings(port=port, host=host)) as client:
        synthesis.run(client, "/datasets/synthesize", spec, report)


@application.command("reground")
def reground_command(
    dataset: str,
    corpus: Annotated[str | None, typer.Option(help="Corpus to search; default is the promoted one.")] = None,
    output: Annotated[str | None, typer.Option(help="Name of the new dataset.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the job.")] = None,
    report: Annotated[Path, typer.Option(help="Where the report is written, as JSON.")] = Path("reground.json"),
    port: Port = None,
    host: Host = None,
) -> None:
    """Replay a dataset's Actions on a corpus, and replace its Observations by what that answers."""
    asked = {"corpus": corpus, "output": output, "name": name}
    options = {key: value for key, value in asked.items() if value}
    with client_of(_settings(port=port, host=host)) as client:
        synthesis.run(client, f"/datasets/{dataset}/reground", options, report)


@application.command("rerun")
def rerun_command(job: str, port: Port = None, host: Host = None) -> None:
    """Submit a job again with everything pinned: on the same machine it trains the same adapter."""
    with client_of(_settings(port=port, host=host)) as client:
        again, manifest = rerun(client, job)
    typer.echo(f"{again['id']}  {again['name']}  queued")
    if manifest and (where := manifest["environment"]):
        typer.echo(f"bit-identical with {where['precision']} on {where['device']}, {where['threads']} threads")


@models_application.command("fetch")
def models_fetch(name: str, home: Home = None) -> None:
    """Download a model of the catalogue, convert it, and list it: qwen2.5-coder-0.5b-instruct, smollm2-135m, …"""
    described = models.fetch(_services(home), name)
    typer.echo(f"{described.name}  {described.parameters:,} parameters  digest {described.digest[:12]}")


@models_application.command("add")
def models_add(name: str, source: str, home: Home = None) -> None:
    """List a model: SOURCE is a directory, a GGUF file, or ORG/NAME@REVISION of the Hugging Face hub."""
    described = models.add(_services(home), name, source)
    typer.echo(f"{described.name}  {described.parameters:,} parameters  digest {described.digest[:12]}")


@models_application.command("export")
def models_export(
    name: str,
    to: Annotated[Path, typer.Option(help="Parent directory; the model goes into a subdirectory named by its digest.")],
    quantization: Annotated[
        Literal["nf4", "fp4", "int8", "none"], typer.Option(help="Quantisation that its adapters were trained over.")
    ] = "nf4",
    home: Home = None,
) -> None:
    """Export a listed model as it is served, as plain weights for vLLM. The last word printed is its directory."""
    exported = models.export(_services(home), name, QUANTIZATION_BY_NAME[quantization], to)
    typer.echo(f"{exported.name}  {quantization}  {exported.path}")


@models_application.command("list")
def models_list(home: Home = None) -> None:
    """List the base models that jobs may name."""
    for view in _services(home).base_models.list_base_models():
        mark = "*" if view.default else " "
        typer.echo(f"{mark} {view.name}  {view.parameters:,} parameters  context {view.context_length}")


@corpora_application.command("fetch")
def corpora_fetch(name: str, home: Home = None) -> None:
    """Download a corpus of the catalogue (wiki-leads: 10,033 leads of Wikipedia articles, CC BY-SA), and import it."""
    corpus = corpora.fetch(_services(home), name)
    typer.echo(corpora.describe(corpus))


@corpora_application.command("add")
def corpora_add(file: Path, name: Annotated[str | None, typer.Option()] = None, home: Home = None) -> None:
    """Import pages from a JSONL file. Each line is {title, text} or {title, sentences}."""
    corpus, _new = _services(home).corpora.create(file, file.name, name)
    typer.echo(corpora.describe(corpus))
