"""/adapters: list, read, download, promote and delete adapters."""

from typing import Annotated

from fastapi import APIRouter
from fastapi.responses import StreamingResponse

from app.api.dependencies import AFTER, IdOf, Limit, Page, ServicesDep, named, problems
from app.api.routing import StrictRoute
from app.domain.adapters import Adapter

router = APIRouter(prefix="/adapters", tags=["adapters"], route_class=StrictRoute)

AdapterReference = Annotated[str, named("adapter")]
After = Annotated[Annotated[str, IdOf("adp", "an adapter")] | None, AFTER]
_ZIP = {"application/zip": {"schema": {"type": "string", "format": "binary"}}}


@router.get("", summary="List adapters")
def list_adapters(services: ServicesDep, after: After = None, limit: Limit = 20) -> Page[Adapter]:
    """Newest first."""
    data, more = services.adapters.list_adapters(after, limit)
    return Page(data=data, has_more=more)


@router.get("/{adapter}", summary="An adapter and its manifest", responses=problems(404))
def get_adapter(services: ServicesDep, adapter: AdapterReference) -> Adapter:
    """The manifest names everything needed to train it again. `aliases` contains `default` when it is promoted."""
    return services.adapters.get(adapter)


@router.get(
    "/{adapter}/download",
    summary="Download an adapter",
    response_class=StreamingResponse,
    responses={200: {"content": _ZIP, "description": "The archive"}, **problems(404)},
)
def download_adapter(services: ServicesDep, adapter: AdapterReference) -> StreamingResponse:
    """A zip of a PEFT directory: safetensors, adapter_config.json, manifest.json and the model card."""
    name, content = services.adapters.archive(adapter)
    headers = {"Content-Disposition": f'attachment; filename="{name}"'}
    return StreamingResponse(content, media_type="application/zip", headers=headers)


@router.post("/{adapter}/promote", summary="Make this the default adapter", responses=problems(404))
def promote_adapter(services: ServicesDep, adapter: AdapterReference) -> Adapter:
    """From now on, predictions that name no adapter use it."""
    return services.adapters.promote(adapter)


@router.delete("/{adapter}", status_code=204, summary="Delete an adapter", responses=problems(404))
def delete_adapter(services: ServicesDep, adapter: AdapterReference) -> None:
    """Unpublish it. Its job stays. Predictions with it that are running already are finished."""
    services.adapters.delete(adapter)
