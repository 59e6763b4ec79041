"""fuel_ray: learn the batch limit and GPU clock that serve an LLM for the least energy within its SLO."""

__version__ = "0.2.0"
