"""What recipes say of the data that they read: stores, and states that show success."""

from __future__ import annotations

from typing import Any, Literal, Self

import numpy as np
from pydantic import (
    Field,
    model_validator,
)

from cvlctl.recipes.values import Count, Name, Place, Share, Strict

# --- pretrain and finetune

LEARNED_LABELS = ("oril", "purl")  # from success examples: what learn.labellers can learn


class StoreUse(Strict):
    """A store and what is used of it; a plain path stands for {path: ...}.

    `rewards`: the label to learn from ("given" is the environment's own); "zeros" (UDS); "oril" or "purl", learned from
    success examples; or "none". Pretraining looks at none of them.
    """

    path: Place  # of a Zarr store
    rewards: Name = "given"  # a label of the store, zeros, none, oril or purl
    fraction: Share = 1.0  # of the episodes, which keep their label
    rest: Literal["none", "zeros"] = "none"  # what stands for the label of the others
    top: Share = 1.0  # of the episodes, by return under the label: the others are left out altogether

    @property
    def from_store(self) -> bool:
        """Whether the label is one that the store holds."""
        return self.rewards not in ("none", "zeros") and not self.learned

    @property
    def learned(self) -> bool:
        """Whether the label is learned from success examples."""
        return self.rewards in LEARNED_LABELS

    def kept(self, episodes: int) -> np.ndarray:
        """(episodes,) bool: which keep their label; the first of a fixed permutation, whatever the seed."""
        flags = np.zeros(episodes, dtype=bool)
        flags[np.random.default_rng(0).permutation(episodes)[: max(1, round(self.fraction * episodes))]] = True
        return flags

    def labelled(self, episodes: int) -> np.ndarray:
        """(episodes,) bool: whose rewards may be learned from, be they those of a label or zeros."""
        if self.rewards == "none":
            return np.zeros(episodes, dtype=bool)
        return self.kept(episodes) | (self.rest == "zeros")

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if self.top < 1 and not self.from_store:
            raise ValueError(f"top: {self.top} ranks episodes by their return, and rewards: {self.rewards} has none")
        return self

    @model_validator(mode="before")
    @classmethod
    def _plain_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: Any) -> dict[str, Any]:
        found: dict[str, Any] = handler.resolve_ref_schema(handler(core))
        found["type"] = ["object", "string"]
        return found


class SuccessExamples(Strict):
    """States (X, O) that show success: taken `from` a store by rule, or read from a `file` (.npy, .npz of one array).

    `rule`: "successes" takes the states that the store marks as successful, "last" the last `k` states of each episode.
    Where cameras are seen, they come with their frames: a `file` is then a .npz as `cvlctl data examples` makes it, or
    a folder of photographs (PNG, JPEG), where there are several cameras with a folder of each in it.
    """

    from_: Place | None = Field(None, alias="from")  # a store
    file: Place | None = None  # .npy, or .npz of one array: (X, O); with images a .npz, or a folder of photographs
    rule: Literal["successes", "last"] = "successes"  # states marked as successful, or the last k of each episode
    num: Count = 200  # how many are drawn, the same for every seed; all of them where there are fewer
    k: Count = 1  # of rule: last
    label: Name = "given"  # whose successes
    fit: Literal["crop", "stretch"] = "crop"  # a photograph of another shape: its middle, or all of it, squeezed

    @model_validator(mode="after")
    def _one_origin(self) -> SuccessExamples:
        if (self.from_ is None) == (self.file is None):
            raise ValueError("needs exactly one of from (a store) and file (.npy or .npz)")
        return self
