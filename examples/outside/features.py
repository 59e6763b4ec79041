"""Features from outside: --extra-features examples.outside.features:FEATURES."""

from fuel_ray.codec import Context, Feature
from fuel_ray.types import WindowMetrics


def tokens_per_joule(window: WindowMetrics, context: Context) -> float | None:
    """Output tokens per joule; None, which is seen as 0, while no energy was used."""
    return window.output_tokens / window.energy_j if window.energy_j else None


def full_batch(window: WindowMetrics, context: Context) -> float:
    """Share of the batch limit in use."""
    return window.running / window.knobs.batch_limit


FEATURES = {
    "tokens_per_joule": Feature(10.0, tokens_per_joule),
    "full_batch": Feature(1.0, full_batch),
}
