"""What of a store goes into a file that has one array of observations."""

from __future__ import annotations

from cvlctl.data.layout import PIXELS
from cvlctl.data.store import Store
from cvlctl.errors import CvlctlError


def only_array(store: Store) -> str:
    """Name of the array that is all a policy sees: the vector, or the frames of an only camera "pixels".

    Raises:
        CvlctlError: there are more: the format has no place for them.
    """
    if not store.spec.cameras:
        return "data/observation"
    if list(store.spec.cameras) == ["pixels"] and store.spec.observation_shape == (0,):
        return PIXELS
    what = f"{store.path} has cameras ({', '.join(store.spec.cameras)}), for which this format has no place"
    raise CvlctlError(what, "export it as lerobot, or as npz")
