"""Where users have had ``KVCacheMonitor`` from since before there were rooms; it lives in ``live.vllm``."""

from fuel_ray.live.vllm.kv_monitor import KVCacheMonitor, MetricsClient

__all__ = ["KVCacheMonitor", "MetricsClient"]
