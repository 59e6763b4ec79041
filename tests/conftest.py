import logging
import os
import signal

import pytest

from tests.real_vllm import model, real_server  # noqa: F401  (fixtures)

TWO_HOSTS = ("test_cluster.py", "test_doctor.py", "test_node_contract.py")
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


def pytest_xdist_auto_num_workers(config):
    """Three processes for all of the fast tests, half of whose time is waiting; one for some of them, and for
    servers, clusters, trainings."""
    option = config.option
    some = option.file_or_dir or option.keyword or option.lf or not option.markexpr.startswith("not slow")
    return 0 if some else 3


def pytest_xdist_make_scheduler(config, log):
    """A process takes whole files, since they share fixtures; those that share ``two_hosts`` are one."""
    from xdist.scheduler import LoadFileScheduling

    class Files(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            return "two_hosts" if file.endswith(TWO_HOSTS) else file

    return Files(config, log)


def pytest_collection_modifyitems(items):
    """What starts real servers, clusters or trainings may take longer than pyproject.toml's timeout."""
    for item in items:
        if any(item.get_closest_marker(name) for name in ("slow", "vllm", "cluster")):
            item.add_marker(pytest.mark.timeout(1800))
