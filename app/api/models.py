"""/base-models and /devices: what this deployment may train and serve, and on what."""

from fastapi import APIRouter

from app.api.dependencies import Page, ServicesDep
from app.api.routing import StrictRoute
from app.domain.devices import Device
from app.services.base_models import BaseModelView

router = APIRouter(tags=["deployment"], route_class=StrictRoute)


@router.get("/base-models", summary="Base models on this deployment's list")
def list_base_models(services: ServicesDep) -> Page[BaseModelView]:
    """Written by the operator: `veritune models add` and `veritune models fetch`."""
    return Page(data=services.base_models.list_base_models(), has_more=False)


@router.get("/devices", summary="Machines that workers run on")
def list_devices(services: ServicesDep) -> Page[Device]:
    """Reported by the workers themselves; `online` means heard of within a minute. `reservations` are the bytes that
    jobs and inference have of a device now."""
    return Page(data=services.devices.list_devices_with_reservations(), has_more=False)
