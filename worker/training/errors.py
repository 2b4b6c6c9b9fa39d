"""What ends a training attempt badly, in words for the user."""


class TrainingError(Exception):
    """`code` is stable and machine-readable; `hint` names the way out."""

    def __init__(self, code: str, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint
