"""Settings of components, such as mixers and encoders, which a registry lists by name.

A registry is a dictionary from name to section. To add a component, add its section and one line in the registry;
nothing else knows the names. There are two forms. In the first, the key ``name`` chooses one component, and the keys of
its section stand beside it::

    encoder: {name: state_vector}

In the second, every component has a section under its name, and another key says which of them is used::

    backbone: {name: ssm, time: {mixer: mamba2}, mamba2: {state: 16}, s4d: {state: 8}}
"""

# Annotations are objects here, not strings: pydantic 2.8 would look the names up in the module of a subclass.

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Self, TypeVar

from pydantic import ConfigDict, GetCoreSchemaHandler, PlainValidator, ValidationError, model_validator
from pydantic_core import CoreSchema, PydanticKnownError, core_schema

from bgen.config.section import Section

S = TypeVar("S", bound=Section)


def listed(names: Iterable[str]) -> str:
    """Return ``'a', 'b' or 'c'``, as pydantic lists what it expects."""
    *most, last = (repr(name) for name in names)
    return f"{', '.join(most)} or {last}" if most else last


@dataclass(frozen=True)
class NameIn:
    """Annotation of a string that must be a key of a registry when it is read."""

    registry: Mapping[str, object]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def _check(self, name: str) -> str:
        if name not in self.registry:
            raise PydanticKnownError("literal_error", {"expected": listed(self.registry)})
        return name


class NamedSection(Section):
    """Settings of one component of several; a subclass fixes ``name``."""

    name: str

    def exported(self) -> Self:
        """Return the settings as a model directory has them: without files of whoever trained the model."""
        return self


@dataclass(frozen=True)
class ChosenByName:
    """Annotation of a :class:`NamedSection`: it is read as the section that the registry has for its ``name``."""

    registry: Mapping[str, type[NamedSection]]
    default: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self._read, handler(source))

    def section(self, given: object) -> type[NamedSection] | None:
        """Return the class for ``given``, a value from YAML; None if no component has that name."""
        name = given.get("name", self.default) if isinstance(given, Mapping) else self.default
        return self.registry.get(name) if isinstance(name, str) else None

    def _read(self, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        section = self.section(given)
        if section is None:
            expected = {"expected": listed(self.registry)}
            raise ValidationError.from_exception_data(
                "name", [{"type": "literal_error", "loc": ("name",), "input": given["name"], "ctx": expected}]
            )
        return section.model_validate(given)


@dataclass(frozen=True)
class _Part:
    """A component's section before it is read; ``kind`` None: there is no such component."""

    kind: type[Section] | None
    given: Any


def _read_part(part: _Part) -> Section:
    if part.kind is None:
        raise PydanticKnownError("extra_forbidden")
    return part.kind.model_validate(part.given)


class SectionOfComponents(Section):
    """A section that holds, beside its own keys, a section for every component of its registry, under its name.

    Sections that are not given have their defaults. Unknown keys are errors, as everywhere.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Annotated[Any, PlainValidator(_read_part)]]

    def settings(self, kind: type[S]) -> S:
        """Return the section of the component whose settings are of the class ``kind``."""
        return next(part for part in (self.__pydantic_extra__ or {}).values() if isinstance(part, kind))

    @model_validator(mode="before")
    @classmethod
    def _name_parts(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        kinds = cls.component_sections()
        own = {key: value for key, value in given.items() if key in cls.model_fields}
        names = [*kinds, *(key for key in given if key not in own and key not in kinds)]
        return own | {name: _Part(kinds.get(name), given.get(name, {})) for name in names}
