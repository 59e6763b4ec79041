"""fuel_ray: learn the batch limit and GPU clock that serve an LLM for the least energy within its SLO."""

__version__ = "0.1.0"


def register_envs() -> None:
    """Make ``gymnasium.make("fuel_ray/Serving-v0")`` work; Gymnasium calls this on import, by entry point.

    Deploying a policy and the plug-in inside vLLM need no Gymnasium, so that importing fuel_ray does not.
    """
    from gymnasium.envs.registration import register, registry  # noqa: PLC0415

    if "fuel_ray/Serving-v0" not in registry:
        register(id="fuel_ray/Serving-v0", entry_point="fuel_ray.build:serving_env")
