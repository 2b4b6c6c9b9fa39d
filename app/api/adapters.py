"""/adapters"""

from fastapi import APIRouter
from fastapi.responses import StreamingResponse

from app.api.dependencies import After, Limit, Page, ServicesDep, problems
from app.domain.adapters import Adapter

router = APIRouter(prefix="/adapters", tags=["adapters"])


@router.get("", summary="List adapters")
def listing(services: ServicesDep, after: After = None, limit: Limit = 20) -> Page[Adapter]:
    """Newest first."""
    data, more = services.adapters.page(after, limit)
    return Page(data=data, has_more=more)


@router.get("/{adapter}", summary="An adapter and its manifest", responses=problems(404))
def read(services: ServicesDep, adapter: str) -> Adapter:
    return services.adapters.get(adapter)


@router.get(
    "/{adapter}/download",
    summary="Download an adapter",
    response_class=StreamingResponse,
    responses={200: {"content": {"application/zip": {}}}, **problems(404)},
)
def download(services: ServicesDep, adapter: str) -> StreamingResponse:
    """A zip of a PEFT directory: safetensors, adapter_config.json, manifest.json and the model card."""
    name, content = services.adapters.archive(adapter)
    headers = {"Content-Disposition": f'attachment; filename="{name}"'}
    return StreamingResponse(content, media_type="application/zip", headers=headers)


@router.post("/{adapter}/promote", summary="Make this the default adapter", responses=problems(404))
def promote(services: ServicesDep, adapter: str) -> Adapter:
    """Predictions that name no adapter use it from now on."""
    return services.adapters.promote(adapter)


@router.delete("/{adapter}", status_code=204, summary="Delete an adapter", responses=problems(404))
def delete(services: ServicesDep, adapter: str) -> None:
    services.adapters.delete(adapter)
