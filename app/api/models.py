"""/base-models and /devices: the models that this deployment trains and serves, and its machines."""

from fastapi import APIRouter

from app.api.dependencies import Page, ServicesDep
from app.api.routing import StrictRoute
from app.domain.devices import Device
from app.services.base_models import BaseModelView

router = APIRouter(tags=["deployment"], route_class=StrictRoute)


@router.get("/base-models", summary="Base models on this deployment's list")
def list_base_models(services: ServicesDep) -> Page[BaseModelView]:
    """The operator adds to it with `veritune models add` and `veritune models fetch`."""
    return Page(data=services.base_models.list_base_models(), has_more=False)


@router.get("/devices", summary="Machines that workers run on")
def list_devices(services: ServicesDep) -> Page[Device]:
    """Workers report them. `online` means that the last report is less than a minute old. `reservations` are the bytes
    that jobs and inference have reserved on a device now."""
    return Page(data=services.devices.list_devices_with_reservations(), has_more=False)
