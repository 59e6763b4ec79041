import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two torch threads are slower than one on small nets
os.environ.setdefault("MPLBACKEND", "Agg")


@pytest.fixture(scope="session", autouse=True)
def state_folder(tmp_path_factory):
    """Leases on fake GPUs stay apart from this machine's real ones."""
    folder = tmp_path_factory.mktemp("state")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUEL_RAY_STATE_DIR", str(folder))
        yield folder
