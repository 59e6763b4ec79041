"""Where requests come from: synthetic workloads and replayed traces, pure and seeded."""

from fuel_ray.workload.spec import Workload, parse_workload

__all__ = ["Workload", "parse_workload"]
