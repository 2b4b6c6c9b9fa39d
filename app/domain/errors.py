"""The error tree: what can go wrong, in words a user can act on. Knows nothing of HTTP; `app.api.errors` maps it.

VerituneError
├── InvalidError        the request cannot be understood or is not allowed as written
│   ├── NotYetSupportedError
│   └── TooLargeError
├── NotFoundError
├── ConflictError       the request is fine, the present state forbids it
├── BusyError           try again after `retry_after` seconds: a bounded queue is full
├── UnavailableError    try again after `retry_after` seconds: a part is away
│   └── StorageError    the blob store or a disk failed; code `disk`: it is full or refuses, so somebody must act first
├── CutOffError         whoever asked has gone: nobody waits for the answer
└── LeaseLostError      internal: an attempt that no longer owns its job tried to write
"""

from dataclasses import dataclass

Loc = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong at one place. `loc` is a path into the input, such as ("trainer", "epochs")."""

    loc: Loc
    message: str
    hint: str | None = None


class VerituneError(Exception):
    """Base of every error that a user may see. `code` is stable and machine-readable."""

    default_code = "error"

    def __init__(
        self,
        detail: str,
        *,
        code: str | None = None,
        problems: tuple[Problem, ...] = (),
        retry_after: float | None = None,
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.code = code or self.default_code
        self.problems = problems
        self.retry_after = retry_after


class InvalidError(VerituneError):
    default_code = "invalid_request"


class NotYetSupportedError(InvalidError):
    default_code = "not_yet_supported"


class TooLargeError(InvalidError):
    default_code = "too_large"


class NotFoundError(VerituneError):
    default_code = "not_found"


class ConflictError(VerituneError):
    default_code = "conflict"


class BusyError(VerituneError):
    default_code = "busy"


class UnavailableError(VerituneError):
    default_code = "unavailable"


class StorageError(UnavailableError):
    default_code = "storage_away"


class ClientDisconnectedError(VerituneError):
    default_code = "cut_off"


class LeaseLostError(VerituneError):
    default_code = "lease_lost"
