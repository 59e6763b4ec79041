"""fuel-ray onboard: from a server to a policy for it, in one command and one folder."""

from fuel_ray.onboarding.config import OnboardConfig, parse
from fuel_ray.onboarding.stages import onboard

__all__ = ["parse", "run"]


def run(config: OnboardConfig) -> int:
    """Go through all stages, or those that are left."""
    return onboard(config)
