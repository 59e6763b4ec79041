"""`ray up`, `exec`, `submit` and `down` for real, on three throw-away hosts of this machine."""

import json
import time
from pathlib import Path

import pytest
import yaml

from tests.netns_hosts import NetnsHosts, missing

ROOT = Path(__file__).parent.parent
RAY = "ray"


def edited(hosts):
    """The shipped cluster.yaml with what a user edits; the hosts have this Python already."""
    settings = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    settings["cluster_name"] = "fuel_ray_test"
    settings["provider"] |= {"head_ip": hosts.ips[0], "worker_ips": hosts.ips[1:]}
    settings["auth"]["ssh_private_key"] = str(hosts.key)
    settings["setup_commands"] = [c for c in settings["setup_commands"] if ".bashrc" in c]
    settings["worker_setup_commands"] = []
    path = hosts.folder / "cluster.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if missing():
        pytest.skip(f"no {', '.join(missing())}")
    with NetnsHosts(tmp_path_factory.mktemp("hosts"), 3) as hosts:

        def ray(*command, timeout_s=300, ok=True):
            variables = {"PATH": f"{hosts.folder}/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
            began_s = time.monotonic()
            done = hosts.operate(RAY, *command, timeout_s=timeout_s, env=variables)
            print(f"ray {command[0]}: {time.monotonic() - began_s:.0f} s, status {done.returncode}")
            assert not ok or done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
            return done.stdout + done.stderr

        hosts.ray = ray
        hosts.path = str(edited(hosts))
        ray("get-auth-token", "--generate")
        yield hosts


SWEEP = ["--node", "ray", "--backend", "sim", "--control-workload", "None"]
SHORT = ["--steps", "1024", "--train.iterations", "2", "--seeds", "1"]


@pytest.mark.cluster
def test_a_sweep_on_a_cluster_that_ray_up_made(cluster):
    cluster.ray("up", "-y", "--no-config-cache", cluster.path)
    try:
        script = str(ROOT / "experiments/sweep_block_size.py")
        said = cluster.ray("submit", cluster.path, script, *SWEEP, *SHORT, timeout_s=600)
        (run_dir,) = cluster.home("fuelt1").glob("results/sweep-*")
        assert {"report.html", "summary.csv"} <= {path.name for path in run_dir.iterdir()}, said
        sizes = [8, 16, 32, 64]
        assert all((run_dir / f"policies/block_{size}/weights.safetensors").is_file() for size in sizes)
        assert json.loads((run_dir / "run.json").read_text())["config"]["node"] == "ray"
        status = cluster.ray("exec", cluster.path, "ray status")
        assert "2.0 fuel_node" in status
    finally:
        cluster.ray("down", "-y", cluster.path)
    left = cluster.ray("exec", cluster.path, "ray status", ok=False)
    assert "fuel_node" not in left
