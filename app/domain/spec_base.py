"""Building blocks of a spec: the base model, references, names and numbers."""

import json
import re
from collections.abc import Hashable
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, model_validator
from pydantic_core import PydanticCustomError

from app.domain.claims import forbidden_character, to_one_line

SPEC_CODES = frozenset({"base_would_change"})
"""Error codes of forbidden combinations. All other mistakes have the code `invalid_spec`."""

NUMBER = re.compile(r"[+-]?(\d{1,30}(\.\d{0,30})?|\.\d{1,30})([eE][+-]?\d{1,4})?", re.ASCII)


def build_disagreement(message: str, *path: str, code: str = "disagreement") -> PydanticCustomError:
    """The error for fields that contradict each other. `path`: of the field to change."""
    return PydanticCustomError(code, "{message}", {"message": message, "path": path})


class Spec(BaseModel):
    """A frozen model. An unknown key is an error. null means the default, except where null is a value of its own.

    A number may be a string, because YAML reads 2e-4 as one. A boolean is not a number.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _leave_nulls_out(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        known = cls.model_fields
        return {
            key: value
            for key, value in data.items()
            if value is not None or key not in known or type(None) in _members(known[key].annotation)
        }


def _members(annotation: Any) -> set[Any]:
    """The member types of a union; for another type, the type itself."""
    if get_origin(annotation) in (Annotated, Union, UnionType):
        return {member for one in get_args(annotation) for member in _members(one)}
    return {annotation} if isinstance(annotation, Hashable) else set()


def _read_number(value: Any) -> Any:
    """The number that a string spells. Other values, such as `auto`, stay; the field validates them."""
    if isinstance(value, bool):
        raise PydanticCustomError("boolean_number", "true and false are no numbers")
    if not isinstance(value, str) or not NUMBER.fullmatch(value.strip()):
        return value
    number = float(value)
    return int(number) if number.is_integer() and abs(number) < 2**53 else number


Number = BeforeValidator(_read_number)
Integer = Annotated[int, Number]
Real = Annotated[float, Number]


def _reference(text: str) -> str:
    if bad := forbidden_character(text):
        raise ValueError(f"the reference holds {bad}")
    if not text or text != to_one_line(text) or len(text) > 200:
        raise ValueError("a reference is an id or a name of 1 to 200 characters")
    if "://" in text or text.startswith(("/", "./", "../", "~", "\\")):
        raise ValueError("this is a path or a URL; name something that this deployment lists")
    return text


Reference = Annotated[str, AfterValidator(_reference)]
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
Positive = Annotated[Real, Field(gt=0)]
Count = Annotated[Integer, Field(ge=1)]
Fraction = Annotated[Real, Field(ge=0, le=1)]

METADATA_LIMIT = 16_384


def _bounded(metadata: dict[str, JsonValue]) -> dict[str, JsonValue]:
    size = len(json.dumps(metadata, ensure_ascii=False, separators=(",", ":")))
    if size > METADATA_LIMIT:
        raise ValueError(f"metadata has {size:,} characters as JSON; at most {METADATA_LIMIT:,} are kept")
    return metadata


Metadata = Annotated[dict[str, JsonValue], AfterValidator(_bounded)]
