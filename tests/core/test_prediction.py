"""What a client has to expect of its passes."""

from __future__ import annotations

import pytest

from tierd.core.prediction import Load, predict

MS = 1_000_000
GB = 10**9


def test_a_pass_takes_as_long_as_its_slowest_stage() -> None:
    [bound] = predict([Load(1, 1, 0, compute_ns=100 * MS, ssd_bytes=GB // 2)], {0: GB})
    assert (bound.ssd_ns, bound.pass_ns, bound.stall_ns) == (500 * MS, 500 * MS, 400 * MS)
    assert bound.binds == "ssd"
    [free] = predict([Load(1, 1, 0, compute_ns=100 * MS, ssd_bytes=GB // 20)], {0: GB})
    assert (free.pass_ns, free.stall_ns, free.binds) == (100 * MS, 0, "compute")


def test_copies_bind_where_they_take_longest() -> None:
    load = Load(1, 1, 0, compute_ns=10 * MS, ssd_bytes=GB // 100, gpu=0, copy_bytes=GB // 10)
    [found] = predict([load], {0: GB}, {0: 2 * GB})
    assert (found.copy_ns, found.pass_ns, found.binds) == (50 * MS, 50 * MS, "copy")


def test_models_share_the_link_of_a_gpu_and_gpus_do_not() -> None:
    loads = [
        Load(1, 1, 0, 0, 0, gpu=0, copy_bytes=GB // 10),
        Load(2, 2, 0, 0, 0, gpu=0, copy_bytes=GB // 10),
        Load(3, 2, 0, 0, 0, gpu=1, copy_bytes=GB // 10),
        Load(4, 2, 0, 7 * MS, 0),
    ]
    found = predict(loads, {}, {0: GB, 1: GB})
    assert [one.copy_ns for one in found] == [200 * MS, 200 * MS, 100 * MS, 0]
    assert [one.binds for one in found] == ["copy", "copy", "copy", "compute"]


def test_clients_of_one_model_share_its_reads() -> None:
    loads = [Load(client, 7, 0, 10 * MS, GB // 10) for client in range(4)]
    assert {found.pass_ns for found in predict(loads, {0: GB})} == {100 * MS}


def test_models_share_the_device_by_weight() -> None:
    loads = [Load(1, 1, 0, 0, GB // 10, weight=300), Load(2, 2, 0, 0, GB // 10)]
    first, second = predict(loads, {0: GB})
    assert first.pass_ns == pytest.approx(100 * MS * 4 / 3, rel=1e-6)
    assert second.pass_ns == pytest.approx(100 * MS * 4, rel=1e-6)


def test_what_a_slow_client_leaves_over_goes_to_the_others() -> None:
    slow = Load(1, 1, 0, compute_ns=1000 * MS, ssd_bytes=GB // 10)  # a tenth of the device
    greedy = Load(2, 2, 0, compute_ns=0, ssd_bytes=GB // 10)
    first, second = predict([slow, greedy], {0: GB})
    assert first.binds == "compute"
    assert second.pass_ns == pytest.approx(100 * MS / 0.9, rel=1e-6)


def test_devices_do_not_share() -> None:
    loads = [Load(1, 1, 0, 0, GB // 10), Load(2, 2, 5, 0, GB // 10)]
    assert [found.pass_ns for found in predict(loads, {0: GB, 5: GB // 2})] == [
        100 * MS,
        200 * MS,
    ]


def test_a_model_that_is_resident_reads_nothing() -> None:
    [found] = predict([Load(1, 1, 0, 5 * MS, 0)], {0: GB})
    assert (found.ssd_ns, found.pass_ns, found.binds) == (0, 5 * MS, "compute")


def test_a_pass_for_several_tokens_costs_each_its_part() -> None:
    [found] = predict([Load(1, 1, 0, 0, GB, tokens_per_pass=4)], {0: GB})
    assert found.ns_per_token == 250 * MS
