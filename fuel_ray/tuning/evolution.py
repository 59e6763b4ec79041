"""A search over a few numbers whose cost is noisy."""

from collections.abc import Callable

import numpy as np

_OFFSPRING, _PARENTS = 10, 4
_NARROWEST = 1 / 15  # of the spread at the start


def evolved(
    cost: Callable[[np.ndarray], float], start: np.ndarray, *, spread: float, evaluations: int, seed: int = 0
) -> np.ndarray:
    """The middle of what an evolution strategy comes to; the best that it saw would be the luckiest.

    Each number has a spread of its own, learned from the best of each generation: Ros and Hansen, A simple
    modification in CMA-ES achieving linear time and space complexity (PPSN 2008), without its paths.
    """
    rng, middle, spreads = np.random.default_rng(seed), start, np.full(len(start), spread)
    weights = np.log(_PARENTS + 0.5) - np.log(np.arange(1, _PARENTS + 1))
    weights /= weights.sum()
    for _ in range(evaluations // _OFFSPRING):
        steps = rng.standard_normal((_OFFSPRING, len(start)))
        costs = [cost(middle + step * spreads) for step in steps]
        best = steps[np.argsort(costs)[:_PARENTS]]
        middle = middle + spreads * (weights @ best)
        spreads = np.maximum(spreads * np.exp(0.25 * (weights @ best**2 - 1.0)), spread * _NARROWEST)
    return middle
