"""fuel_ray: learn the batch limit and GPU clock that serve an LLM for the least energy within its SLO."""

import contextlib

__version__ = "0.1.0"

# Gymnasium finds an environment only if its package registered it on import. Inside vLLM, where fuel_ray is
# only a plug-in, there need not be a Gymnasium.
with contextlib.suppress(ImportError):
    import gymnasium

    gymnasium.register(id="fuel_ray/Serving-v0", entry_point="fuel_ray.build:serving_env")
