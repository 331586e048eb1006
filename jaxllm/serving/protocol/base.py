"""What all bodies are made of: strict models, and fields refused by name."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError


class Refusal:
    """Why a field that clients know is not honoured, and the values that ask for nothing and pass; null always does."""

    def __init__(self, why: str, *neutral: Any):
        self.why, self.neutral = why, neutral


class Strict(BaseModel):
    """A JSON object whose fields have JSON's own types; a field that is not declared is refused by name.

    REFUSED: fields that are known but not honoured.
    """

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())
    REFUSED: ClassVar[Mapping[str, Refusal]] = {}
    _known: ClassVar[Mapping[str, Refusal]] = {}  # REFUSED with the base classes' own

    @classmethod
    def __pydantic_init_subclass__(cls, **options: Any) -> None:
        super().__pydantic_init_subclass__(**options)
        cls._known = {name: entry for owner in reversed(cls.__mro__) for name, entry in _refused(owner).items()}

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, data: Any) -> Any:
        if not isinstance(data, dict) or cls._known.keys().isdisjoint(data):
            return data
        left = dict(data)
        for name, entry in cls._known.items():
            if name in left:
                value = left.pop(name)
                if value is not None and not any(type(value) is type(item) and value == item for item in entry.neutral):
                    raise PydanticCustomError("unsupported", "{why}", {"why": entry.why, "field": name, "value": value})
        return left


def _refused(owner: type) -> Mapping[str, Refusal]:
    """A class's own REFUSED."""
    return owner.__dict__.get("REFUSED", {})


def text_of(value: Any) -> str:
    """A string that can be encoded; pydantic's own check lets half surrogate pairs pass in some places."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("unicode", "must be valid Unicode") from None
    return value


Text = Annotated[str, AfterValidator(text_of)]
