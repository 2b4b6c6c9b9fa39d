"""The message that tells a client why its request failed."""

import logging

from worker.inference.errors import ModelError, RequestError
from worker.inference.ipc import Failed

log = logging.getLogger(__name__)


def failed_message(request_id: str, error: BaseException) -> Failed:
    """400 to the request's own faults, 422 to its model's, 500 to unexpected errors, which are logged."""
    match error:
        case RequestError():
            return Failed(id=request_id, status=error.status, message=error.message, param=error.param)
        case ModelError():
            return Failed(id=request_id, status=422, message=str(error), param="model")
    log.error("a request failed", exc_info=error)
    message = f"the engine failed on this request: {type(error).__name__}"
    return Failed(id=request_id, status=500, message=message)
