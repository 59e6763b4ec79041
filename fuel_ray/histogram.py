"""Latencies as a server counts them: how many up to each bound, and their sum."""

import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass

_SLACK = 1e-6  # of a request, and of a sum: what differences of large sums are off by

Bounds = tuple[float, float]  # lowest and highest that is possible


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts up to each bound; of a whole server life, or of a window after ``-``."""

    upper_bounds_s: tuple[float, ...]  # ascending, the last is inf; empty before the first request
    cumulative_counts: tuple[int, ...]  # as many
    count: int
    sum_s: float | None = None  # of all latencies; None if the server does not say

    def __sub__(self, before: "Histogram") -> "Histogram | None":
        """The requests since ``before``; None if the bounds changed, or counts fell."""
        if not before.upper_bounds_s:
            return self
        if self.upper_bounds_s != before.upper_bounds_s:
            return None
        counts = tuple(map(int.__sub__, self.cumulative_counts, before.cumulative_counts))
        if min(counts) < 0:
            return None
        sums = (self.sum_s, before.sum_s)
        sum_s = None if sums[0] is None or sums[1] is None else sums[0] - sums[1]
        return Histogram(self.upper_bounds_s, counts, self.count - before.count, sum_s)

    def __add__(self, other: "Histogram") -> "Histogram":
        """The requests of both, at the bounds that both have."""
        if not self.upper_bounds_s or not other.upper_bounds_s:
            return self if self.upper_bounds_s else other
        counts, others = (
            dict(zip(x.upper_bounds_s, x.cumulative_counts, strict=True)) for x in (self, other)
        )
        bounds_s = tuple(bound_s for bound_s in self.upper_bounds_s if bound_s in others)
        sum_s = None if self.sum_s is None or other.sum_s is None else self.sum_s + other.sum_s
        summed = tuple(counts[bound_s] + others[bound_s] for bound_s in bounds_s)
        return Histogram(bounds_s, summed, self.count + other.count, sum_s)

    @property
    def mean_s(self) -> float | None:
        """Exact; None without requests, or without a sum that fits the counts."""
        sum_s = self._known_sum_s()
        return None if sum_s is None or not self.count else sum_s / self.count

    def mean_bounds_s(self) -> Bounds:
        """Lowest and highest mean that is possible: equal where the sum is known, 0 without requests."""
        if not self.count:
            return 0.0, 0.0
        if (mean_s := self.mean_s) is not None:
            return mean_s, mean_s
        low_s, high_s = self._sum_bounds_s()
        return low_s / self.count, high_s / self.count

    def misses(self, limit_s: float) -> tuple[int, int]:
        """Fewest and most requests that can have been above a limit: equal where it is a bound.

        Within the bucket that the limit is in, the sum of all latencies says how many there must be, and how
        many there can be.
        """
        place = bisect_left(self.upper_bounds_s, limit_s)
        if place == len(self.upper_bounds_s):
            return 0, 0
        within, above = self.cumulative_counts[place], self.count - self.cumulative_counts[place]
        low_s, high_s, n = list(self._buckets())[place]
        if high_s == limit_s or not n:
            return self.count - within, self.count - within
        fewest, most = 0.0, float(n)
        if (sum_s := self._known_sum_s()) is not None:
            below_s, above_s = self._sum_bounds_s(but=place)
            least_s, largest_s = sum_s - above_s - limit_s * n, sum_s - below_s - low_s * n
            if least_s > _SLACK * limit_s:
                fewest = 1.0 if math.isinf(high_s) else least_s / (high_s - limit_s)
            most = largest_s / (limit_s - low_s)
        at_least = min(n, max(0, math.ceil(fewest - _SLACK)))
        return above + at_least, above + min(n, max(at_least, math.floor(most + _SLACK)))

    def quantile_s(self, share: float) -> tuple[float, float, float] | None:
        """A quantile interpolated within its bucket, and the bucket's bounds; None without requests."""
        rank = max(1, math.ceil(share * self.count - 1e-9))
        below = 0
        for low_s, high_s, n in self._buckets():
            if n and below + n >= rank:
                return self._interpolated(low_s, high_s, (rank - below - 0.5) / n), low_s, high_s
            below += n
        return None

    def samples_s(self) -> tuple[float, ...]:
        """As many values as were counted, exact to the bucket, and of the same mean where that is known.

        With a sum those of a bucket are taken to be alike, as they nearly are within one window; without it,
        to be evenly spread. What lies above the last finite bound is just above it, or where the sum says.
        """
        found: list[float] = []
        shift = self._shift()
        for low_s, high_s, n in self._buckets():
            if shift is None:
                found.extend(self._interpolated(low_s, high_s, (i + 0.5) / n) for i in range(n))
            elif math.isinf(high_s):
                found.extend([math.nextafter(low_s + self._beyond_s(n), math.inf)] * n)
            else:
                value_s = low_s + (high_s - low_s) * (1.0 + shift) / 2
                found.extend([min(high_s, max(value_s, math.nextafter(low_s, math.inf)))] * n)
        return tuple(found)

    def _shift(self) -> float | None:
        """How far from the middle of each bucket, -1 to its begin and 1 to its end, so that the sum fits."""
        if (sum_s := self._known_sum_s()) is None:
            return None
        finite = [bucket for bucket in self._buckets() if math.isfinite(bucket[1])]
        beyond = sum(n * low_s for low_s, high_s, n in self._buckets() if math.isinf(high_s))
        middle_s = sum(n * (low_s + high_s) / 2 for low_s, high_s, n in finite)
        room_s = sum(n * (high_s - low_s) / 2 for low_s, high_s, n in finite)
        return max(-1.0, min(1.0, (sum_s - beyond - middle_s) / room_s)) if room_s else 0.0

    def _beyond_s(self, n: int) -> float:
        """How far above the last finite bound its ``n`` requests are at least, by the sum."""
        sum_s = self._known_sum_s()
        finite = [(low_s, high_s, m) for low_s, high_s, m in self._buckets() if math.isfinite(high_s)]
        most_s = sum(m * high_s for _, high_s, m in finite)
        last_s = finite[-1][1] if finite else 0.0
        return 0.0 if sum_s is None or not n else max(0.0, (sum_s - most_s) / n - last_s)

    def _known_sum_s(self) -> float | None:
        """The sum, if these counts can have it: one that was read between two updates is not believed."""
        if self.sum_s is None:
            return None
        low_s, high_s = self._sum_bounds_s()
        slack_s = _SLACK * max(1.0, low_s)
        return self.sum_s if low_s - slack_s <= self.sum_s <= high_s + slack_s else None

    def _sum_bounds_s(self, *, but: int | None = None) -> Bounds:
        """Of all buckets, or of all but one."""
        buckets = [bucket for place, bucket in enumerate(self._buckets()) if bucket[2] and place != but]
        return sum(n * low_s for low_s, _, n in buckets), sum(n * high_s for _, high_s, n in buckets)

    def _buckets(self) -> Iterator[tuple[float, float, int]]:
        """Bounds and number of requests of each; below the first is 0."""
        low_s, below = 0.0, 0
        for high_s, counted in zip(self.upper_bounds_s, self.cumulative_counts, strict=True):
            yield low_s, high_s, counted - below
            low_s, below = high_s, counted

    @staticmethod
    def _interpolated(low_s: float, high_s: float, share: float) -> float:
        return low_s + (high_s - low_s) * share if math.isfinite(high_s) else math.nextafter(low_s, math.inf)
