"""What every block of the recipe has in common: strictness, and rules that join keys, which yield what they find."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveInt = Annotated[int, Field(ge=1, le=2**31 - 1)]
NonNegativeInt = Annotated[int, Field(ge=0, le=2**31 - 1)]


@dataclass(frozen=True, slots=True)
class Conflict:
    """A rule that joins keys and is broken: `key` is the one complained about, `reads` the others it depends on.

    Keys are full paths (`train.warmup`). The rule is not reported when one of its keys has a fault of its own.
    """

    key: str
    message: str
    reads: tuple[str, ...] = ()


class Section(BaseModel):
    """Base of every block: unknown keys refused, no silent type conversion; texts of fields: `field_texts.py`."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        validate_default=True,
    )

    def conflicts(self) -> Iterator[Conflict]:
        """Yield every broken rule that joins keys of this block."""
        yield from ()

    @model_validator(mode="after")
    def _no_conflicts(self, info: ValidationInfo) -> Self:
        found = list(self.conflicts())
        if isinstance(info.context, list):  # the loader collects them, to report all in one pass
            info.context.extend(found)
        elif found:
            text = "; ".join(f"{conflict.key}: {conflict.message}" for conflict in found)
            raise PydanticCustomError("conflict", "{text}", {"text": text})
        return self


def regex_fault(pattern: str) -> str | None:
    """Return what is wrong with a regular expression, or None."""
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        return f"{pattern!r} is not a regular expression: {error}"
    return None
