"""Policies that see frames, playing in this process: what the cameras of their environment show, stacked as they see
it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cvlctl.checkpoints import Saved
from cvlctl.errors import CvlctlError
from cvlctl.play.cameras import Camera, Renderer, cameras_of
from cvlctl.play.env import Act, Env
from cvlctl.play.policies import Policy
from cvlctl.play.rollout import PolicyAct
from cvlctl.play.sights import VECTOR, SeeingPolicy, seen_by


def playing(policy: Policy, env: Env, cameras: Sequence[Camera], sampling: np.ndarray | None, noise: np.ndarray) -> Act:
    """What plays one episode of `env` of at most H steps.

    Args:
        cameras: what the policy sees, as `cameras_seen` has it; none where it sees a vector.
        sampling: (H, A) standard normal; None: greedy.
        noise: (H, A), added to the action.
    """
    if isinstance(policy, SeeingPolicy):
        return SeeingAct(policy, renderer_of(env, cameras), sampling, noise)
    return PolicyAct(policy, sampling, noise)


class SeeingAct:
    """A checkpoint that sees frames, playing one episode: (observation (O,), step) -> action (A,)."""

    def __init__(
        self, policy: SeeingPolicy, renderer: Renderer, sampling: np.ndarray | None, noise: np.ndarray
    ) -> None:
        self._policy, self._renderer, self._sampling, self._noise = policy, renderer, sampling, noise
        self.stacks: dict[str, np.ndarray] = {}  # that were seen last, of each camera (1, S, H, W, C)

    def __call__(self, observation: np.ndarray, step: int) -> np.ndarray:
        for name, frame in self._renderer.frames().items():
            before = self.stacks.get(name)
            now = frame[None, None]
            stack = self._policy.observe.stack
            self.stacks[name] = now.repeat(stack, 1) if before is None else np.concatenate([before[:, 1:], now], 1)
        drawn = None if self._sampling is None else self._sampling[step][None]
        action = self._policy({**self.stacks, VECTOR: observation[None]}, drawn)[0]
        return np.clip(action + self._noise[step], -1.0, 1.0)


def renderer_of(env: Env, cameras: Sequence[Camera]) -> Renderer:
    """Of an environment's cameras: the same for all who ask, closed with it.

    Raises:
        CvlctlError: as `Renderer` does.
    """
    key = tuple(cameras)
    if key not in env.renderers:
        env.renderers[key] = Renderer(env, key)
    return env.renderers[key]


def stand(saved: Saved) -> dict[str, Any]:
    """Where the cameras of a checkpoint's data stand, by name, as far as it says so."""
    said = saved.metadata.get("cameras")
    return said if isinstance(said, dict) else {}


def cameras_seen(run: Path, saved: Saved, known: Mapping[str, Mapping[str, Any]]) -> tuple[Camera, ...]:
    """The cameras that a checkpoint's policy sees; none where it sees a vector.

    Args:
        run: what messages call it.
        known: where cameras stand, by name.

    Raises:
        CvlctlError: a camera is not among them, or gives frames of another size.
    """
    try:
        spec, observe = seen_by(saved.metadata)
    except (ValueError, KeyError, TypeError) as error:
        what = f"{saved.path} cannot be read as a checkpoint: {type(error).__name__}: {error}"
        raise CvlctlError(what, "it is damaged, or not of cvlctl: train it again, or leave its run out") from error
    if observe is None:
        return ()
    what = f"{run}: its policy sees cameras {', '.join(observe.cameras)}"
    if lacking := [name for name in observe.cameras if name not in known]:
        example = f"cameras: {{{lacking[0]}: {{size: {spec.cameras[lacking[0]][0]}}}}}"
        raise CvlctlError(f"{what}; its data do not say where {lacking[0]} stands", f"say it, such as {example}")
    found = cameras_of({name: known[name] for name in observe.cameras})
    for camera in found:
        if (camera.height, camera.width, 3) != spec.cameras[camera.name]:
            size = "x".join(map(str, spec.cameras[camera.name]))
            got = f"{camera.height}x{camera.width}x3"
            raise CvlctlError(f"{what}; frames of {camera.name} were {size}, and here are {got}", "give that size")
    return found
