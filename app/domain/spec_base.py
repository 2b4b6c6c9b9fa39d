"""What every part of a spec is made of: a model that takes no field it does not know, references, names, numbers."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from app.domain.claims import fold, forbidden_character

SPEC_CODES = frozenset({"base_would_change"})
"""Codes of their own, for what the vocabulary allows and this combination forbids."""


def disagree(message: str, *place: str, code: str = "disagreement") -> PydanticCustomError:
    """What a validator of several fields raises: the message, and the place of the field to change."""
    return PydanticCustomError(code, "{message}", {"message": message, "place": place})


class Spec(BaseModel):
    """Frozen; an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _reference(text: str) -> str:
    if bad := forbidden_character(text):
        raise ValueError(f"the reference holds {bad}")
    if not text or text != fold(text) or len(text) > 200:
        raise ValueError("a reference is an id or a name of 1 to 200 characters")
    if "://" in text or text.startswith(("/", "./", "../", "~", "\\")):
        raise ValueError("this is a path or a URL; name something that this deployment lists")
    return text


Reference = Annotated[str, AfterValidator(_reference)]
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
