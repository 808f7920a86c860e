"""What recipes say of an environment of one's own, beside the task that names it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from cvlctl.errors import CvlctlError
from cvlctl.play import envs
from cvlctl.play.cameras import LARGEST, SMALLEST, cameras_of
from cvlctl.play.settings import Settings
from cvlctl.recipes.values import Name, Rate, Strict, not_bool

Angle = Annotated[float, BeforeValidator(not_bool), Field(allow_inf_nan=False)]
Pixels = Annotated[int, BeforeValidator(not_bool), Field(ge=SMALLEST, le=LARGEST)]
Side = Annotated[float, BeforeValidator(not_bool)] | tuple[Annotated[float, BeforeValidator(not_bool)], ...]


class EnvRecipe(Strict):
    """How it is made, and what of it is read; see docs/environments.md."""

    kwargs: dict[str, Any] = {}  # handed to whatever makes it
    success: Name | None = None  # key of `info`; None: success or is_success, where there is one
    keys: tuple[Name, ...] = ()  # of a Dict of observations, in this order; (): all but images
    action_bounds: tuple[Side, Side] | None = None  # low and high; None: those of its action space


def settings_of(task: str, env: EnvRecipe | None) -> Settings | None:
    """For `envs.make`, of a task that a recipe names: its code may be imported from here on."""
    return envs.named(task, None if env is None else env.model_dump())


class CameraRecipe(Strict):
    """How large a camera's frames are; of a free one, where it stands: all four."""

    size: Pixels | tuple[Pixels, Pixels] = 64  # of a frame's sides, or [height, width]
    lookat: tuple[Angle, Angle, Angle] | None = None  # the point that it looks at; None: the simulator has it by name
    distance: Rate | None = None  # from that point, in the simulator's units: metres
    azimuth: Angle | None = None  # degrees
    elevation: Angle | None = None  # degrees; below 0: it looks down


def _sound(cameras: dict[str, CameraRecipe]) -> dict[str, CameraRecipe]:
    try:
        cameras_of({name: camera.model_dump() for name, camera in cameras.items()})
    except CvlctlError as error:
        raise PydanticCustomError("cvlctl", "{what}", {"what": error.what, "hint": error.hint}) from error
    return cameras


Cameras = Annotated[dict[str, CameraRecipe], AfterValidator(_sound)]  # by name: the simulator's, or one's own
