"""One environment: actions in [-1, 1], flat float32 observations, episodes by number. `envs.make` makes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from cvlctl.errors import CvlctlError
from cvlctl.types import Spec

Act = Callable[[np.ndarray, int], np.ndarray]  # (observation (O,), step of the episode) -> action (A,) in [-1, 1]


class Film(Protocol):
    """Who looks at an environment at every instant of an episode: `filming.Film`."""

    latest: dict[str, np.ndarray]

    def look(self) -> None: ...

    def episode(self) -> dict[str, Any]: ...


class Env:
    """One environment of one task. Made by `make`.

    Attributes:
        task: full name, such as "metaworld/drawer-close-v3".
        seed: with the episode's number, decides how an episode begins.
        spec: observation shape (O,), action dimensions A, and the time limit in steps.
        action_bounds: low and high, (A,) each: what actions in [-1, 1] are scaled to.
        raw: the simulator behind it.
        own: whether it is one of one's own, and no built-in task.
        columns: names of the observation's columns, () where they have none.
        bounds_given: whether the recipe says what actions are scaled to, rather than the simulator.
        begin: what starts episode number n, and returns its first observation; to be replaced where another start is
            wanted (the parity check's).
        steps: taken in the episode so far.
        seen: the latest observation (O,), float32.
        film: who is shown every instant of an episode, and adds to what is kept of it; or None.
    """

    def __init__(
        self,
        task: str,
        seed: int,
        raw: Any,
        begin: Callable[[int], np.ndarray],
        horizon: int,
        has_success: bool,
        versions: dict[str, str],
        own: bool = False,
        columns: tuple[str, ...] = (),
        bounds_given: bool = False,
    ) -> None:
        space = raw.action_space
        self.task = task
        self.seed = seed
        self.spec = Spec(tuple(raw.observation_space.shape), int(space.shape[0]), horizon)
        self.action_bounds = space.low, space.high
        self.raw = raw
        self.begin = begin
        self.columns, self.bounds_given = columns, bounds_given
        self._has_success = has_success
        self.own = own  # the simulator may cut an episode off, and says of each step whether it knows of success
        self._versions = versions
        self._scale = None if np.all(space.high == 1) and np.all(space.low == -1) else (space.high - space.low) / 2
        self._centre = (space.high + space.low) / 2
        self.tells: bool | None = None  # whether the episodes collected so far tell of success
        self.steps, self._over = 0, True  # of the episode under way, if one is
        self.seen = np.zeros(self.spec.observation_shape, dtype=np.float32)
        self.film: Film | None = None
        self.renderers: dict[Any, Any] = {}  # `cameras.Renderer`s by what they draw, closed with it

    def reset(self, episode: int) -> np.ndarray:
        """Begin episode number `episode` (>= 0); returns its first observation (O,), float32."""
        self.at(0, np.array(self.begin(episode), dtype=np.float32))
        return self.seen

    def at(self, steps: int, seen: np.ndarray) -> None:
        """The simulator is `steps` into an episode, and this is what is seen of it, (O,)."""
        self.steps, self.seen, self._over = steps, seen, steps >= self.spec.horizon
        if self.film is not None:
            self.film.look()

    def filmed(self) -> dict[str, Any]:
        """What was filmed of the episode so far, as arguments of `types.Episode`: images, sim_state."""
        return {} if self.film is None else self.film.episode()

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, bool | None]:
        """One step.

        Args:
            action: (A,), clipped to [-1, 1], then scaled to the environment's own bounds.

        Returns:
            observation (O,) float32, reward, terminated, truncated (the time limit, and not terminated), success
            (None where the task has no notion of it).

        Raises:
            CvlctlError: where the action is not finite or of another shape: a policy gone wrong.
            RuntimeError: after the end of an episode, before the next `reset`.
        """
        if self._over:
            raise RuntimeError(f"{self.task}: the episode is over; call reset(episode) before step")
        action = np.minimum(np.maximum(np.asarray(action, dtype=np.float32), -1.0), 1.0)
        if action.shape != (self.spec.action_dim,) or not np.isfinite(action).all():
            raise CvlctlError(
                f"{self.task}: action {action} at step {self.steps}; expected {self.spec.action_dim} finite numbers",
                "the policy may have diverged: look at its training metrics",
            )
        if self._scale is not None:
            action = self._centre + self._scale * action
        observation, reward, terminated, cut, info = self.raw.step(action)
        self.at(self.steps + 1, np.array(observation, dtype=np.float32))
        truncated = (self._over or (self.own and bool(cut))) and not terminated
        self._over = bool(terminated) or truncated
        success = bool(info["success"] > 0) if self._has_success else info["success"] if self.own else None
        return self.seen, float(reward), bool(terminated), truncated, success

    def told(self, episode: int, success: bool) -> None:
        """Hold an episode of a store to those before it: all of them tell of success, or none does.

        Raises:
            CvlctlError: another way than before.
        """
        if self.tells is None:
            self.tells = success
        if success != self.tells:
            unlike = "tells" if success else "tells nothing"
            what = f"{self.task}: episode {episode} {unlike} of success, unlike those before it"
            raise CvlctlError(what, "name the key, env: {success: KEY}: where it is missing, a step is no success")

    def close(self) -> None:
        """Free what the simulator holds."""
        for renderer in self.renderers.values():
            renderer.close()
        self.raw.close()

    def versions(self) -> dict[str, str]:
        """What decides the numbers: package versions and the environment's settings, for provenance."""
        return dict(self._versions)
