"""Policy folders made by hand: which action is best depends on one feature."""

import numpy as np

from fuel_ray.codec import ActionGrid, Codec
from fuel_ray.policies.learned import Manifest, save_policy
from fuel_ray.types import Slo

GRID = ActionGrid((4, 16, 32), (990, 1500, 1980))
SLO = Slo(ttft_s=1.0, tpot_s=0.05)


def write_policy(
    folder, *, sizes=(16,), grid=GRID, best=None, features=("running", "arrival_rate_ewma"), **facts
):
    """A policy that always takes the action ``best``, by default the lowest limit and clock."""
    best = 0 if best is None else grid.encode(best)
    n = len(features)
    arrays = {
        "value.weight": np.zeros((1, n), np.float32),
        "value.bias": np.zeros(1, np.float32),
        "advantage.weight": np.zeros((len(grid), n), np.float32),
        "advantage.bias": np.eye(1, len(grid), best, dtype=np.float32)[0],
    }
    manifest = {
        **{"kv_block_sizes": sizes, "model": "tiny", "gpu_name": "NVIDIA H100 80GB HBM3"},
        **{"engine": "vLLM 0.32.0", "pack": "p", "pack_sha256": "0", "reward": "energy", "workload": "w"},
        **{"workload_digest": "d", "head": "joint", "fuel_ray_version": "0"},
    }
    save_policy(folder, arrays, Codec(features, grid, SLO), Manifest(**{**manifest, **facts}))
    return folder
