"""What all sections of the configuration share: the base class, and the kinds of numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer

from bgen.passwords import without_passwords

Address = Annotated[str, PlainSerializer(without_passwords)]
"""A path or an address; a password in it is used and never written."""
PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A section of the configuration: unknown keys and numbers that are not finite are errors, and defaults are
    validated like given values.
    """

    model_config = ConfigDict(extra="forbid", validate_default=True, frozen=True, allow_inf_nan=False)

    @classmethod
    def component_sections(cls) -> Mapping[str, type[Section]]:
        """Return the sections that it has beside its fields, by key: those of components that a registry lists."""
        return {}


def named_files(section: BaseModel | None) -> list[Path]:
    """Return the paths that a section and those within it name, in their order."""
    found: list[Path] = []
    for value in () if section is None else dict(section).values():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, Path):
                found.append(item)
            elif isinstance(item, BaseModel):
                found += named_files(item)
    return found
