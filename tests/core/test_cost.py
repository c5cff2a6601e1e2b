"""The cost model of a device: what is fitted, corrected, and chosen."""

from __future__ import annotations

import pytest

from tierd.core.cost import (
    CHUNKS,
    DEPTHS,
    MIB,
    Curve,
    DeviceCost,
    Sample,
    Setting,
    fit,
    lookahead_bytes,
    reads_in_flight,
    typical_layer,
)

FLASH = Curve(latency_ns=100_000, stream_bytes_per_s=2_000_000_000, ceiling_bytes_per_s=6 * 10**9)
GRID = [(256 << 10, 1), (MIB, 1), (4 * MIB, 1), (MIB, 4), (4 * MIB, 4), (4 * MIB, 8)]


def samples(curve: Curve, noise: float = 0.0) -> list[Sample]:
    """What a device with this curve measures, every second point `noise` too fast."""
    return [
        Sample(chunk, depth, int(curve.bandwidth(chunk, depth) * (1 + noise * (number % 2))))
        for number, (chunk, depth) in enumerate(GRID)
    ]


def test_bandwidth_grows_with_chunk_and_depth_and_ends_at_the_ceiling() -> None:
    for depth in DEPTHS:
        rates = [FLASH.bandwidth(chunk, depth) for chunk in CHUNKS]
        assert rates == sorted(rates)
    for chunk in CHUNKS:
        rates = [FLASH.bandwidth(chunk, depth) for depth in range(1, 65)]
        assert rates == sorted(rates)
        assert rates[-1] == FLASH.ceiling_bytes_per_s


def test_a_read_takes_its_latency_and_then_flows() -> None:
    assert FLASH.bandwidth(2_000_000, 1) == pytest.approx(2_000_000 / (0.0001 + 0.001))


def test_the_fit_finds_the_curve_that_the_points_lie_on() -> None:
    found = fit(samples(FLASH))
    assert found.latency_ns == pytest.approx(FLASH.latency_ns, rel=0.01)
    assert found.stream_bytes_per_s == pytest.approx(FLASH.stream_bytes_per_s, rel=0.01)
    assert found.ceiling_bytes_per_s == FLASH.ceiling_bytes_per_s


def test_the_fit_of_noisy_points_is_within_the_noise() -> None:
    found = fit(samples(FLASH, noise=0.1))
    for chunk, depth in GRID:
        assert found.bandwidth(chunk, depth) == pytest.approx(
            FLASH.bandwidth(chunk, depth), rel=0.15
        )


def test_one_chunk_size_alone_gives_a_line_through_its_point() -> None:
    found = fit([Sample(4 * MIB, 1, 10**9)])
    assert found.bandwidth(4 * MIB, 1) == pytest.approx(10**9, rel=0.001)
    assert found.bandwidth(MIB, 1) < found.bandwidth(4 * MIB, 1)


def test_times_that_do_not_grow_with_the_chunk_still_give_a_curve() -> None:
    found = fit([Sample(MIB, 1, 10**9), Sample(4 * MIB, 1, 4 * 10**9)])  # both take 1.05 ms
    assert found.stream_bytes_per_s > 0
    assert found.bandwidth(4 * MIB, 1) > found.bandwidth(MIB, 1)


def test_saturated_points_alone_give_the_ceiling() -> None:
    found = fit([Sample(MIB, 8, 3 * 10**9), Sample(4 * MIB, 8, 3 * 10**9)])
    assert found.bandwidth(4 * MIB, 16) == 3 * 10**9


def test_no_point_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        fit([])


def test_a_measured_point_is_predicted_exactly_and_its_neighbours_follow_it() -> None:
    points = [*samples(FLASH), Sample(16 * MIB, 2, 2_000_000_000)]  # slower than the curve says
    cost = DeviceCost(points)
    assert cost.bandwidth(Setting(16 * MIB, 2)) == pytest.approx(2_000_000_000, rel=0.001)
    assert cost.bandwidth(Setting(32 * MIB, 2)) < 0.7 * cost.curve.bandwidth(32 * MIB, 2)


def test_real_reads_move_the_figures_to_what_they_get() -> None:
    cost = DeviceCost(samples(FLASH))
    point = Setting(4 * MIB, 4)
    before = cost.bandwidth(Setting(MIB, 2))
    for _ in range(30):
        cost.observe(Sample(4 * MIB, 4, 3 * 10**9))
    assert cost.bandwidth(point) == pytest.approx(3 * 10**9, rel=0.01)
    assert 0.5 * before < cost.bandwidth(Setting(MIB, 2)) < before  # half of it for all points


def test_the_first_real_reads_replace_what_the_probe_found() -> None:
    cost = DeviceCost(samples(FLASH))
    cost.observe(Sample(4 * MIB, 4, 10**9))
    assert cost.bandwidth(Setting(4 * MIB, 4)) == pytest.approx(10**9, rel=0.01)


def test_a_single_odd_read_among_many_moves_the_figures_by_a_quarter_at_most() -> None:
    cost = DeviceCost(samples(FLASH))
    before = cost.bandwidth(Setting(4 * MIB, 4))
    for _ in range(10):
        cost.observe(Sample(4 * MIB, 4, before))
    cost.observe(Sample(4 * MIB, 4, before // 2))
    assert cost.bandwidth(Setting(4 * MIB, 4)) > 0.8 * before


def test_the_limit_caps_what_is_predicted_but_not_what_is_learned() -> None:
    cost = DeviceCost(samples(FLASH), limit_bytes_per_s=10**8)
    assert cost.bandwidth(Setting(4 * MIB, 8)) == 10**8
    assert cost.device_bandwidth(Setting(4 * MIB, 8)) > 10**9


def test_below_a_limit_the_device_has_headroom() -> None:
    """Two reads would just reach the limit, if nobody ever waited for it."""
    limit = FLASH.bandwidth(16 * MIB, 2)
    assert DeviceCost(samples(FLASH)).choose(depths=(2,)).depth == 2
    assert DeviceCost(samples(FLASH), limit).choose().depth == 4


def test_the_choice_is_the_fewest_reads_that_come_near_the_best() -> None:
    chosen = DeviceCost(samples(FLASH)).choose()
    assert chosen == Setting(16 * MIB, 4)
    one_is_enough = Curve(100_000, 6 * 10**9, 6 * 10**9)
    assert DeviceCost(samples(one_is_enough)).choose().depth == 2
    needs_many = Curve(1_000_000, 10**9, 6 * 10**9)
    assert DeviceCost(samples(needs_many)).choose().depth >= 8


def test_chunks_are_no_larger_than_two_layers_can_fill() -> None:
    cost = DeviceCost(samples(FLASH))
    assert cost.choose(layer_bytes=24 * MIB) == Setting(8 * MIB, 4)
    assert cost.choose(layer_bytes=4096).chunk_bytes == MIB


def test_a_setting_that_works_is_not_left_for_a_few_percent() -> None:
    cost = DeviceCost(samples(FLASH))
    assert cost.choose(Setting(4 * MIB, 8)) == Setting(4 * MIB, 8)
    assert cost.choose(Setting(MIB, 2)) != Setting(MIB, 2)


def test_what_the_user_said_is_chosen() -> None:
    cost = DeviceCost(samples(FLASH))
    assert cost.choose(chunks=(64 * MIB,)).chunk_bytes == 64 * MIB
    assert cost.choose(depths=(1,)).depth == 1


def test_a_slow_device_is_read_in_small_chunks_so_that_nothing_waits_long_behind_one() -> None:
    disk = Curve(10_000_000, 150_000_000, 150_000_000)
    chosen = DeviceCost(samples(disk)).choose()
    assert chosen.chunk_bytes * chosen.depth <= 8 * MIB


def test_an_adaptive_choice_comes_to_rest_where_more_reads_do_not_help() -> None:
    """The probe promised more from many reads than the readers get: four are as good as eight."""
    cost = DeviceCost(samples(Curve(1_000_000, 10**9, 6 * 10**9)))
    setting = cost.choose()
    changes = 0
    for _ in range(400):
        real = min(1_500_000_000, cost.curve.bandwidth(setting.chunk_bytes, setting.depth))
        cost.observe(Sample(setting.chunk_bytes, setting.depth, real))
        now = cost.choose(setting)
        changes += now != setting
        setting = now
    assert changes <= 12
    assert cost.bandwidth(setting) == pytest.approx(1_500_000_000, rel=0.1)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([64 * MIB] * 10, 2),  # 16 MiB under way: the layer that is read and the next one
        ([3 * MIB] * 64, 7),  # experts: six for the window, and one that ends
        ([4096] * 30 + [64 * MIB] * 10, 2),  # norms do not matter
        ([130 * MIB, *[8 * MIB] * 40], 3),  # nor does an embedding
        ([4096] * 3, 64),
    ],
)
def test_enough_layers_are_read_at_once_to_keep_the_chunks_outstanding(
    sizes: list[int], expected: int
) -> None:
    assert reads_in_flight(Setting(4 * MIB, 4), typical_layer(sizes)) == expected


def test_lookahead_covers_what_is_read_while_a_layer_is_computed_with() -> None:
    setting = Setting(4 * MIB, 4)
    window = 16 * MIB
    assert lookahead_bytes(setting, 10**9, 0, 50 * MIB) == 50 * MIB + window
    assert lookahead_bytes(setting, 10**9, 10**8, 50 * MIB) == 10**8 + window
