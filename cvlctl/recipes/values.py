"""Values that recipes of all steps share, and how a job computes."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, get_type_hints

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema
from pydantic_core import PydanticCustomError

from cvlctl.errors import CvlctlError
from cvlctl.machine import num_cpus
from cvlctl.paths import expanded
from cvlctl.recipes.estimates import Update
from cvlctl.recipes.explain import explain
from cvlctl.recipes.yamlfile import Source
from cvlctl.recipes.yamltext import Key


def not_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticCustomError("int_type", "")  # pydantic would read true as 1
    return value


def checked(check: Callable[[str], str]) -> Callable[[Any], Any]:
    """A validator of text and paths: what `check` makes of the text. Its CvlctlError becomes a fault of the schema."""

    def validate(value: Any) -> Any:
        if not isinstance(value, str | Path):
            return value  # the schema says what it must be
        try:
            return check(str(value))
        except CvlctlError as error:
            raise PydanticCustomError("cvlctl", "{what}", {"what": error.what, "hint": error.hint}) from error

    return validate


def _no_placeholder(text: str) -> str:
    if "${" in text:
        raise CvlctlError(
            f"{text} holds a placeholder that nothing fills", "${key} belongs into a stage of `cvlctl run`"
        )
    return text


def _own_place(path: Path) -> Path:
    place = os.path.realpath(path)
    if os.path.commonpath((os.getcwd(), place)) == place:
        raise ValueError("is the current directory, or holds it: choose a place of its own")
    return path


def _bool_as_text(value: Any) -> Any:
    return str(value).lower() if isinstance(value, bool) else value


def _distinct(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(seeds)) != len(seeds):
        raise ValueError("holds a seed twice")
    return seeds


Count = Annotated[int, BeforeValidator(not_bool), Field(ge=1)]
Seed = Annotated[int, BeforeValidator(not_bool), Field(ge=0, lt=2**31)]
Seeds = Annotated[tuple[Seed, ...], Field(min_length=1), AfterValidator(_distinct)]
Rate = Annotated[float, BeforeValidator(not_bool), Field(gt=0)]
Share = Annotated[float, BeforeValidator(not_bool), Field(gt=0, le=1)]
PartOf = Annotated[float, BeforeValidator(not_bool), Field(ge=0, le=1)]
Noise = Annotated[float, BeforeValidator(not_bool), Field(ge=0)]
Name = Annotated[str, Field(min_length=1), AfterValidator(checked(_no_placeholder))]
Pattern = Annotated[str, Field(min_length=1), BeforeValidator(checked(expanded))]  # of paths, by * ? [] **
Place = Annotated[Path, BeforeValidator(checked(expanded))]  # a path, with ~ and $NAME
Out = Annotated[Place, AfterValidator(_own_place)]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]
Steps = Annotated[int, BeforeValidator(not_bool), Field(ge=1, le=10**12)]
Threads = Literal["auto"] | Annotated[int, BeforeValidator(not_bool), Field(ge=1, le=1024)]
Precision = Literal["auto", "float32", "medium", "bf16"]
Compile = Annotated[
    Literal["auto", "true", "false"],
    BeforeValidator(_bool_as_text),
    WithJsonSchema({"enum": ["auto", True, False, "true", "false"]}),
]


Others = Mapping[Path, Any]  # recipes of an experiment that write what one reads, by their `out`
NONE: Others = MappingProxyType({})


class Strict(BaseModel):
    """What all models of recipes are: unknown keys are errors, and nothing changes once it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    described_by: ClassVar[tuple[type, ...]] = ()  # Configs whose fields it has: `schema` reads there what they mean

    @classmethod
    def read(cls, data: Any, source: Source, prefix: Key = ()) -> Any:
        """The model of `data`, which lies at `prefix` in the file; a CvlctlError says what is wrong, and where."""
        try:
            return cls.model_validate(data)
        except ValidationError as invalid:
            raise explain(invalid, cls, data, source, prefix) from None

    def reads(self) -> list[str]:
        """Paths, and patterns of them, that other commands of an experiment may write."""
        return []

    def writes(self) -> list[str]:
        """Paths at which it puts its results."""
        return [str(getattr(self, "out", ""))]

    def learning(self, others: Others = NONE) -> tuple[int, Update] | None:
        """How many updates of which kind it makes, or None; `others` are the recipes of an experiment."""
        return None

    def resolved(self) -> dict[str, Any]:
        """The recipe as plain JSON values, all defaults filled in: what goes into stores, runs and checkpoints."""
        return self.model_dump(mode="json", by_alias=True)

    @classmethod
    def with_defaults(cls, plain: dict[str, Any]) -> dict[str, Any]:
        """A resolved recipe of an earlier version, with the defaults of keys that came since; as it is if not legal."""
        extra = {key: value for key, value in plain.items() if key not in cls.model_fields}
        try:
            recipe = cls.model_validate({key: value for key, value in plain.items() if key not in extra})
        except ValidationError:
            return plain
        return recipe.resolved() | extra


def fields_of(config: Any, besides: Container[str] = ()) -> dict[str, Any]:
    """The fields of a Config as those of a model."""
    hints = get_type_hints(config, include_extras=True)
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        factory: Any = field.default_factory
        default = field.default if factory is dataclasses.MISSING else Field(default_factory=factory)
        if field.name not in besides:
            fields[field.name] = (hints[field.name], default)
    return fields


class Computed(Strict):
    """How a job computes: what "auto" becomes is decided when it first starts, and kept with it."""

    few_threads: ClassVar[str | None] = None  # why auto is one thread; None: it is all CPUs

    device: Device = "auto"  # auto: cuda where there is one
    threads: Threads = "auto"  # of the CPU; auto: as the plan says, with its reason
    precision: Precision = "auto"  # of matmuls: docs/computing.md
    compile: Compile = "auto"  # into one program; auto: where that takes less than running as it is
    checkpoint_seconds: Rate = 30.0  # at most so many seconds of work are lost by a kill

    @property
    def num_threads(self) -> int:
        """That it computes with."""
        if self.threads != "auto":
            return self.threads
        return 1 if self.few_threads else num_cpus()

    @property
    def about_threads(self) -> str | None:
        """How many, and why: "1 of 2 (so says the recipe)"; None where that decides nothing."""
        why = "so says the recipe" if self.threads != "auto" else self.few_threads or "auto: all CPUs"
        return f"{self.num_threads} of {num_cpus()} ({why})"
