"""What can go wrong on the way to a base model, in words for the operator."""


class BaseModelError(Exception):
    """`code` is stable and machine-readable; `hint` names the way out."""

    def __init__(self, code: str, message: str, hint: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint
