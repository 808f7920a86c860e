"""What pyproject.toml cannot say: recipes, and the replay of the quickstart, travel inside the wheel."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ALONG = ("recipes", "data/README.md", "data/door-close-replay.zarr")


class WithRecipes(build_py):
    """Copies them into `cvlctl/shipped`. An editable installation finds them in the checkout."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for place in ALONG:
            target = Path(self.build_lib, "cvlctl", "shipped", place)
            target.parent.mkdir(parents=True, exist_ok=True)
            if Path(place).is_dir():
                shutil.copytree(place, target, dirs_exist_ok=True)
            else:
                shutil.copy2(place, target)


setup(cmdclass={"build_py": WithRecipes})
