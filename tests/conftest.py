import logging
import os
import signal

import pytest

RAY_SETTINGS = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_AUTO_CONNECT": "0"}

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two torch threads are slower than one on small nets
os.environ.setdefault("MPLBACKEND", "Agg")
# a script's background job ignores Ctrl-C, and so would every process that a test starts
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def state_folder(tmp_path_factory):
    """Leases on fake GPUs stay apart from this machine's real ones."""
    folder = tmp_path_factory.mktemp("state")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUEL_RAY_STATE_DIR", str(folder))
        yield folder


@pytest.fixture(scope="session")
def two_hosts():
    """A Ray cluster of this machine, joined by this process: a head, and two hosts with one node each."""
    import ray

    from tests.ray_hosts import Hosts

    with pytest.MonkeyPatch.context() as patch:
        for name, value in RAY_SETTINGS.items():
            patch.setenv(name, value)
        with Hosts(2) as hosts:
            patch.setenv("RAY_ADDRESS", hosts.address)
            ray.init(hosts.address, log_to_driver=False, logging_level=logging.ERROR)
            yield hosts
            ray.shutdown()


def pytest_collection_modifyitems(items):
    """What starts real servers, clusters or trainings may take longer than pyproject.toml's timeout."""
    for item in items:
        if any(item.get_closest_marker(name) for name in ("slow", "vllm", "cluster")):
            item.add_marker(pytest.mark.timeout(1800))
