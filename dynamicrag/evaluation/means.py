"""The mean of any number of values, in memory that does not grow with them."""

import math


class Mean:
    """A mean, exact but for one rounding at the end, so that it equals statistics.fmean and depends on no order.

    The sum is kept as floats that do not overlap (Shewchuk 1997), of which few are needed.
    """

    def __init__(self):
        self.count = 0
        self._parts: list[float] = []

    def add(self, value: float) -> None:
        """Add a finite value."""
        self.count += 1
        if not value:
            return
        parts = []
        for part in self._parts:
            total = value + part
            large, small = (value, part) if abs(value) >= abs(part) else (part, value)
            if lost := small - (total - large):
                parts.append(lost)
            value = total
        self._parts = [*parts, float(value)]

    def value(self) -> float | None:
        """Return the mean; None without a value."""
        return math.fsum(self._parts) / self.count if self.count else None
