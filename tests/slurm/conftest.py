"""A SLURM for the tests of this folder: started once, by `cluster.sh`."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("cluster.sh")


@pytest.fixture(scope="session")
def cluster() -> Iterator[Path]:
    """SLURM's folder; its commands find it by SLURM_CONF."""
    if not all(shutil.which(name) for name in ("munged", "slurmctld", "slurmd", "sbatch")):
        pytest.skip("there is no SLURM here: apt-get install slurm-wlm munge")
    folder = Path(tempfile.mkdtemp(prefix="slurm"))  # short: it holds sockets
    try:
        subprocess.run(["bash", str(SCRIPT), "start", str(folder)], check=True, timeout=60, stdout=subprocess.DEVNULL)
        with pytest.MonkeyPatch.context() as patch:
            for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_", "CVLCTL_"))]:
                patch.delenv(name)
            patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
            yield folder
            pids = [(folder / f"{name}.pid").read_text().strip() for name in ("munged", "slurmctld", "slurmd")]
        subprocess.run(["bash", str(SCRIPT), "stop", str(folder)], check=True, timeout=60)
        assert not any(Path("/proc", pid).exists() for pid in pids)
    finally:
        subprocess.run(["bash", str(SCRIPT), "stop", str(folder)], check=False, timeout=60)
        shutil.rmtree(folder, ignore_errors=True)
