"""Simulated nodes for tests; imports nothing of a live one."""

from fuel_ray.sim.node import SimulatedNode
from fuel_ray.sim.pack import load_pack
from fuel_ray.workload.spec import parse_workload


def simulated():
    workload = parse_workload("steady:rate_rps=6")
    return SimulatedNode(
        load_pack("h100-qwen3-8b"), workload, kv_block_size=16, horizon_s=40.0, kv_tokens=26_000
    )


def simulated_with_a_crowded_pool():
    workload = parse_workload("steady:rate_rps=8")
    return SimulatedNode(
        load_pack("h100-qwen3-8b"), workload, kv_block_size=16, horizon_s=40.0, kv_tokens=9_000
    )
