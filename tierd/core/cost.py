"""What storage costs: a device's bandwidth against chunk size and queue depth, and what follows.

A read of `chunk` bytes takes a latency and then flows; `depth` of them at once share the device up
to what it can give (LLM in a flash, section 4.1: large chunks, many at once):

    bandwidth(chunk, depth) = min(ceiling, depth * chunk / (latency + chunk / stream))

The curve is fitted to a few measured points, and corrected by real reads (`DeviceCost.observe`).
Bytes, nanoseconds, bytes per second everywhere. Pure: what it is told is all that it knows.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, log, log2
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

SECOND_NS = 1_000_000_000
MIB = 1 << 20

CHUNKS = tuple(MIB << power for power in range(5))  #: 1 MiB to 16 MiB: what may be chosen
DEPTHS = (2, 4, 8, 16)  #: reads at once; one alone would leave the device idle while it is verified
NEAR_BEST = 0.95  #: of the best bandwidth is as good as the best
WORTH_A_CHANGE = 1.10  #: times the bandwidth, to leave a setting that works
LIMIT_HEADROOM = 2  #: times the limit is as fast as a device need be
LONGEST_WINDOW_NS = 50_000_000  #: for which what is needed now may wait behind reads at work
LARGEST_READS_IN_FLIGHT = 64
USUAL_LATENCY_NS = 100_000  #: of a flash device, where a single chunk size was measured
_CORRECTION = 1 / 8  #: how much one observation of many counts, for the device and for the point


@dataclass(frozen=True, slots=True)
class Sample:
    """One measured point."""

    chunk_bytes: int
    depth: int
    bytes_per_s: int


@dataclass(frozen=True, slots=True)
class Curve:
    """Grows with the chunk and with the depth, and never beyond the ceiling."""

    latency_ns: int  #: until the first byte
    stream_bytes_per_s: int  #: of one read, once it flows
    ceiling_bytes_per_s: int  #: of any number of reads

    def bandwidth(self, chunk_bytes: int, depth: int) -> int:
        read_ns = self.latency_ns + chunk_bytes * SECOND_NS / self.stream_bytes_per_s
        return min(self.ceiling_bytes_per_s, int(depth * chunk_bytes * SECOND_NS / read_ns))


@dataclass(frozen=True, slots=True)
class Setting:
    """How a device is read."""

    chunk_bytes: int
    depth: int


def fit(samples: Sequence[Sample]) -> Curve:
    """The curve through measured points: a straight line of time against chunk size where the
    device is not saturated, by least squares of the relative error, below the fastest point.

    Raises ValueError without a point.
    """
    if not samples:
        raise ValueError("a curve needs at least one measured point")
    ceiling = max(sample.bytes_per_s for sample in samples)
    free = [sample for sample in samples if sample.depth == 1] or [
        sample for sample in samples if sample.bytes_per_s < 0.8 * ceiling
    ]
    points = [
        (sample.chunk_bytes, sample.depth * sample.chunk_bytes * SECOND_NS / sample.bytes_per_s)
        for sample in free or samples
    ]
    latency_ns, ns_per_byte = _line(points)
    return Curve(int(latency_ns), max(int(SECOND_NS / ns_per_byte), 1), ceiling)


def _line(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """(at zero, slope) of a line through (bytes, ns), neither of them negative."""
    weight = sum(1 / ns**2 for _, ns in points)
    x = sum(nbytes / ns**2 for nbytes, ns in points) / weight
    y = sum(1 / ns for _, ns in points) / weight
    spread = sum((nbytes - x) ** 2 / ns**2 for nbytes, ns in points)
    slope = 0.0
    if spread > 0:
        slope = sum((nbytes - x) * (ns - y) / ns**2 for nbytes, ns in points) / spread
    else:
        slope = max(y - USUAL_LATENCY_NS, y / 2) / x
    if slope <= 0:  # noise: all the same time, whatever the size
        slope = y / (2 * max(nbytes for nbytes, _ in points))
    if y - slope * x < 0:
        return 0.0, y / x
    return y - slope * x, slope


class DeviceCost:
    """What is known of one device. A factor for the whole curve follows real reads, and one for
    each point that was measured; a point that was not has the factor of its nearest neighbour."""

    def __init__(self, samples: Sequence[Sample], limit_bytes_per_s: int | None = None) -> None:
        """limit_bytes_per_s: what the operator allows. Raises ValueError without a sample."""
        self.curve = fit(samples)
        self.limit = limit_bytes_per_s
        self.observations = 0
        self._level = 0.0  # log of the factor for the whole curve
        self._points: dict[Setting, float] = {}  # log of the factor
        self._nearest: dict[Setting, Setting] = {}  # the point of a setting, while points are these
        for sample in samples:
            expected = self.curve.bandwidth(sample.chunk_bytes, sample.depth)
            point = Setting(sample.chunk_bytes, sample.depth)
            self._points[point] = log(sample.bytes_per_s / expected)

    def device_bandwidth(self, setting: Setting) -> int:
        """What the device gives, whatever is allowed."""
        factor = exp(self._level + self._points[self._point_of(setting)])
        return max(int(self.curve.bandwidth(setting.chunk_bytes, setting.depth) * factor), 1)

    def bandwidth(self, setting: Setting) -> int:
        """What reads in this way get."""
        found = self.device_bandwidth(setting)
        return found if self.limit is None else min(found, self.limit)

    def observe(self, sample: Sample) -> None:
        """Real reads had this bandwidth, without the time for which a limit held them back."""
        point = Setting(sample.chunk_bytes, sample.depth)
        ratio = log(sample.bytes_per_s / self.device_bandwidth(point))
        if point not in self._points:
            self._points[point] = self._points[self._point_of(point)]
            self._nearest.clear()
        # Half is blamed on the device as a whole, e.g. others read it too, half on this point. The
        # first ones count more: the probe was short, and a start is a busy time.
        step = ratio * max(_CORRECTION, 0.5 / (self.observations + 1))
        self._level += step
        self._points[point] += step
        self.observations += 1

    def choose(
        self,
        now: Setting | None = None,
        *,
        layer_bytes: int = 64 * MIB,
        chunks: Sequence[int] = CHUNKS,
        depths: Sequence[int] = DEPTHS,
    ) -> Setting:
        """How to read: of what is near the best bandwidth, the fewest reads at once, in the largest
        chunks (which cost the least CPU). `now`: the setting in effect, kept while it is good.

        layer_bytes: of a typical layer; two of them are what is asked for at a time.
        chunks, depths: what may be chosen; a single one where the user has said which.
        """
        smallest = min(chunks)
        settings = [
            setting
            for setting in (Setting(chunk, depth) for chunk in chunks for depth in depths)
            if setting.chunk_bytes == smallest or self._suits(setting, 2 * layer_bytes)
        ]
        worth = {setting: self._worth(setting) for setting in settings}
        best = max(worth.values())
        if now in worth and best < WORTH_A_CHANGE * worth[now]:
            return now
        good = [setting for setting in settings if worth[setting] >= NEAR_BEST * best]
        return min(good, key=lambda setting: (setting.depth, -setting.chunk_bytes))

    def _worth(self, setting: Setting) -> int:
        """The bandwidth, as far as it is of use: threads that wait for the limit and then read
        reach it only when the device is a good deal faster."""
        found = self.device_bandwidth(setting)
        return found if self.limit is None else min(found, LIMIT_HEADROOM * self.limit)

    def _suits(self, setting: Setting, window_bytes: int) -> bool:
        """Whether so much is asked for at once, and is no burden for what is needed now."""
        nbytes = setting.chunk_bytes * setting.depth
        if nbytes > window_bytes:
            return False
        return nbytes <= self.bandwidth(setting) * LONGEST_WINDOW_NS // SECOND_NS

    def _point_of(self, setting: Setting) -> Setting:
        """The measured point that is nearest."""
        found = self._nearest.get(setting)
        if found is None:

            def far(point: Setting) -> tuple[float, int, int]:
                steps = abs(log2(point.chunk_bytes / setting.chunk_bytes))
                steps += abs(log2(point.depth / setting.depth))
                return steps, point.chunk_bytes, point.depth

            found = self._nearest[setting] = min(self._points, key=far)
        return found


def typical_layer(layer_bytes: Sequence[int]) -> int:
    """The layer size up to which half of all bytes lie: a few tiny norms do not matter."""
    half = sum(layer_bytes) / 2
    size = 1
    for size in sorted(layer_bytes):
        half -= size
        if half <= 0:
            break
    return size


def reads_in_flight(setting: Setting, layer_bytes: int) -> int:
    """Typical layers to read at once, so that `depth` chunks are outstanding, also while one of
    the layers ends."""
    window = setting.chunk_bytes * setting.depth
    return min(1 + max(-(-window // layer_bytes), 1), LARGEST_READS_IN_FLIGHT)


def lookahead_bytes(setting: Setting, bytes_per_s: int, step_ns: int, largest_layer: int) -> int:
    """How far to stage ahead of a client: what the device reads while one layer is computed with,
    beside the chunks that are under way, and never less than the layer that comes next."""
    meanwhile = bytes_per_s * step_ns // SECOND_NS
    return max(meanwhile, largest_layer) + setting.chunk_bytes * setting.depth
