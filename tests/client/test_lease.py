from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import pytest
import torch

from tierd_client import Client
from tierd_client.errors import (
    BudgetTooSmall,
    DaemonGone,
    LayerNotFound,
    LeaseEnded,
    LeaseLimit,
    LeaseLost,
    ProtocolBroken,
    TensorNotFound,
    ViewStillAlive,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.client.conftest import FakeDaemon

NORM = "blocks.0.norm.weight"


@pytest.fixture
def client(daemon: FakeDaemon) -> Iterator[Client]:
    with Client(daemon.path, timeout=20) as client:
        yield client


# -------------------------------------------------------------------------------- begin and end


def test_leaving_the_context_releases_the_lease(daemon: FakeDaemon, client: Client) -> None:
    with client.lease("tiny", "blocks.0") as lease:
        assert list(daemon.leases.values()) == [1]
        assert not lease.ended
    assert lease.ended
    daemon.wait_until(lambda: not daemon.leases)


def test_every_handle_says_that_the_lease_has_ended(daemon: FakeDaemon, client: Client) -> None:
    with client.lease("tiny", "blocks.0") as lease:
        packed, dense = lease["blocks.0.up.weight"], lease[NORM]
        x = torch.zeros(1, 100, dtype=torch.bfloat16)
    for use in (
        lambda: lease[NORM],
        lambda: lease.tensors[NORM],
        lambda: packed.dense(),
        lambda: packed.linear(x),
        lambda: packed.linear_f32(x),
        lambda: dense.view(),
        lambda: dense.dense(),
        lambda: lease.__enter__(),
    ):
        with pytest.raises(LeaseEnded, match=r"tiny/blocks\.0"):
            use()


def test_releasing_again_does_nothing(daemon: FakeDaemon, client: Client) -> None:
    lease = client.lease("tiny", "blocks.0")
    lease.release()
    lease.release()
    client.ask("status")
    assert len(daemon.asked("release")) == 1


def test_a_lease_that_is_dropped_is_released(daemon: FakeDaemon, client: Client) -> None:
    lease = client.lease("tiny", "blocks.0")
    del lease
    gc.collect()
    daemon.wait_until(lambda: not daemon.leases)
    assert client.statistics().held == 0


def test_the_users_exception_passes_and_the_lease_is_released(
    daemon: FakeDaemon, client: Client
) -> None:
    with pytest.raises(ZeroDivisionError), client.lease("tiny", "blocks.0"):
        raise ZeroDivisionError
    daemon.wait_until(lambda: not daemon.leases)


def test_closing_the_client_ends_its_leases(daemon: FakeDaemon) -> None:
    with Client(daemon.path) as client:
        lease = client.lease("tiny", "blocks.0")
    with pytest.raises(LeaseEnded):
        lease[NORM]
    daemon.wait_until(lambda: not daemon.leases)


# --------------------------------------------------------------------------------------- tensors


def test_tensors_are_named_as_stored_and_by_alias(client: Client) -> None:
    with client.lease("tiny", "embed") as lease:
        assert list(lease.tensors) == ["embed.weight"]
        assert len(lease.tensors) == 1
        assert lease["embed.weight"].shape == (50, 100)
        assert torch.equal(lease["head.weight"].dense(), lease["embed.weight"].dense())


def test_an_unknown_tensor_is_named_with_what_there_is(client: Client) -> None:
    with client.lease("tiny", "blocks.0") as lease:
        with pytest.raises(TensorNotFound, match=r"blocks\.0 has no tensor 'x'; .*norm"):
            lease["x"]
        assert "x" not in lease.tensors


# ----------------------------------------------------------------------------------------- views


def test_a_view_is_the_arena_itself_and_may_be_dropped_in_time(
    daemon: FakeDaemon, client: Client
) -> None:
    with client.lease("tiny", "blocks.0") as lease:
        first, second = lease[NORM].view(), lease[NORM].view()
        assert first.data_ptr() == second.data_ptr()
        assert first.shape == (100,)
        assert torch.equal(first, lease[NORM].dense())
        del first, second
    daemon.wait_until(lambda: not daemon.leases)


def test_leaving_with_a_live_view_raises_and_the_slot_stays_leased_until_it_is_gone(
    daemon: FakeDaemon, client: Client
) -> None:
    def leave() -> torch.Tensor:
        with client.lease("tiny", "blocks.0") as lease:
            kept.append(lease[NORM].view())
        raise AssertionError("left with a live view")

    kept: list[torch.Tensor] = []
    with pytest.raises(ViewStillAlive, match=NORM):
        leave()
    client.ask("status")
    assert list(daemon.leases.values()) == [1]
    kept.clear()
    daemon.wait_until(lambda: not daemon.leases)


@pytest.mark.parametrize(
    "derive",
    [
        lambda view: view[3:],
        lambda view: view.detach().view(torch.int16),
        lambda view: view.unsqueeze(0).expand(3, -1),
        lambda view: view.view(torch.uint16).numpy(),
        lambda view: view.untyped_storage(),
        lambda view: view.as_strided((2, 2), (1, 1)),
        lambda view: torch.nn.Parameter(view, requires_grad=False),
        lambda view: lambda: view,
    ],
    ids=["slice", "reinterpreted", "expanded", "numpy", "storage", "strided", "parameter", "cell"],
)
def test_whatever_shares_a_views_storage_keeps_it_alive(client: Client, derive: object) -> None:
    lease = client.lease("tiny", "blocks.0")
    derived = derive(lease[NORM].view())  # type: ignore[operator]
    with pytest.raises(ViewStillAlive):
        lease.release()
    del derived


def test_copies_of_a_view_are_free_to_stay(client: Client) -> None:
    with client.lease("tiny", "blocks.0") as lease:
        copy = lease[NORM].view().clone()
        result = lease[NORM].view() + 1
    assert result.shape == copy.shape


def test_a_view_that_only_a_reference_cycle_holds_is_gone_for_its_user(
    daemon: FakeDaemon, client: Client
) -> None:
    gc.disable()
    try:
        with client.lease("tiny", "blocks.0") as lease:
            cycle: list[object] = [lease[NORM].view()]
            cycle.append(cycle)
            del cycle
    finally:
        gc.enable()
    daemon.wait_until(lambda: not daemon.leases)


def test_a_live_view_never_hides_the_users_exception_and_is_noted_on_it(
    daemon: FakeDaemon, client: Client
) -> None:
    def fail() -> None:
        with client.lease("tiny", "blocks.0") as lease:
            view = lease[NORM].view()
            raise ZeroDivisionError(view.numel())

    with pytest.raises(ZeroDivisionError) as caught:
        fail()
    assert any("ViewStillAlive" in note for note in caught.value.__notes__)
    client.ask("status")
    assert daemon.leases  # the traceback still holds the view
    caught.value.__traceback__ = None
    del caught
    gc.collect()
    daemon.wait_until(lambda: not daemon.leases)


def test_closing_the_client_with_a_live_view_raises_and_keeps_the_slot(daemon: FakeDaemon) -> None:
    client = Client(daemon.path)
    view = client.lease("tiny", "blocks.0")[NORM].view()
    client.close()  # the lease was dropped, so there is nobody to tell
    assert list(daemon.leases.values()) == [1]
    assert view.shape == (100,)
    del view
    daemon.wait_until(lambda: not daemon.leases)

    client = Client(daemon.path)
    lease = client.lease("tiny", "blocks.0")
    view = lease[NORM].view()
    with pytest.raises(ViewStillAlive):
        client.close()
    assert list(daemon.leases.values()) == [1]
    del view
    daemon.wait_until(lambda: not daemon.leases)


# ----------------------------------------------------------------------------------- generations


def test_a_slot_that_changed_before_the_lease_began_is_lost(
    daemon: FakeDaemon, client: Client
) -> None:
    daemon.grant = {"generation": 55}
    with pytest.raises(LeaseLost, match="granted with generation 55 and holds 2"):
        client.lease("tiny", "blocks.0")
    daemon.wait_until(lambda: not daemon.leases)


def test_a_slot_that_changed_under_the_lease_is_lost_when_it_ends(
    daemon: FakeDaemon, client: Client
) -> None:
    with (
        pytest.raises(LeaseLost, match="from generation 2 to 31"),
        client.lease("tiny", "blocks.0"),
    ):
        daemon.set_generations(30)
    daemon.wait_until(lambda: not daemon.leases)


def test_a_lost_lease_is_noted_on_the_users_exception(daemon: FakeDaemon, client: Client) -> None:
    def fail() -> None:
        with client.lease("tiny", "blocks.0"):
            daemon.set_generations(30)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        fail()
    assert any("LeaseLost" in note for note in caught.value.__notes__)


@pytest.mark.parametrize(
    "wrong",
    [
        {"arena": 4},
        {"bytes": 1},
        {"offset": 1 << 40},
        {"offset": 4},
        {"offset": -8},
        {"offset": None},
        {"slot": "x"},
        {"generation": True},
        {"lease": None},
    ],
    ids=str,
)
def test_a_grant_that_cannot_be_ends_the_connection(
    daemon: FakeDaemon, client: Client, wrong: dict[str, object]
) -> None:
    daemon.grant = wrong
    with pytest.raises(ProtocolBroken):
        client.lease("tiny", "blocks.0")
    daemon.wait_until(lambda: not daemon.leases)
    with pytest.raises(DaemonGone):
        client.ask("status")


# ---------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("code", "error"), [("budget_too_small", BudgetTooSmall), ("lease_limit", LeaseLimit)]
)
def test_a_refused_acquire_raises_its_error(
    daemon: FakeDaemon, client: Client, code: str, error: type[Exception]
) -> None:
    daemon.refusals["acquire"] = (code, "needs 5, has 3")
    with pytest.raises(error, match="needs 5, has 3"):
        client.lease("tiny", "blocks.0")
    with pytest.raises(error, match="needs 5, has 3"):
        client.open("tiny").acquire_ahead(1).resolve()
    daemon.refusals.clear()
    client.lease("tiny", "blocks.0").release()


def test_a_layer_that_is_not_there_is_named_before_anybody_is_asked(
    daemon: FakeDaemon, client: Client
) -> None:
    with pytest.raises(LayerNotFound, match=r"no layer 'blocks\.9'; it has 4, from 'embed'"):
        client.lease("tiny", "blocks.9")
    opened = client.open("tiny")
    for number in (4, -1):
        with pytest.raises(LayerNotFound, match=f"layer number {number}; it has 0 to 3"):
            opened.acquire(number)
        with pytest.raises(LayerNotFound):
            opened.acquire_ahead(number)
    assert daemon.asked("acquire") == []


# ------------------------------------------------------------------------------------------- ahead


def test_a_lease_ahead_is_asked_for_at_once_and_collected_later(
    daemon: FakeDaemon, client: Client
) -> None:
    opened = client.open("tiny")
    daemon.may_grant.clear()
    pending = opened.acquire_ahead(2)
    daemon.wait_until(lambda: len(daemon.asked("acquire")) == 1)
    assert daemon.asked("acquire")[0]["ahead"] is True
    daemon.may_grant.set()
    with pending.resolve() as lease:
        assert lease.layer.name == "blocks.1"
    assert len(daemon.asked("acquire")) == 1


def test_a_request_ahead_that_was_put_off_is_asked_again_without_ahead(
    daemon: FakeDaemon, client: Client
) -> None:
    daemon.later = {2}
    with client.open("tiny").acquire_ahead(2).resolve() as lease:
        assert lease.layer.name == "blocks.1"
    assert [request["ahead"] for request in daemon.asked("acquire")] == [True, False]
    statistics = client.statistics()
    assert (statistics.ahead, statistics.later, statistics.leases) == (1, 1, 1)


def test_leases_ahead_may_be_collected_in_any_order(client: Client) -> None:
    opened = client.open("tiny")
    pending = [opened.acquire_ahead(number) for number in (0, 1, 2)]
    names = []
    for waiting in reversed(pending):
        with waiting.resolve() as lease:
            names.append(lease.layer.name)
    assert names == ["blocks.1", "blocks.0", "embed"]


def test_a_lease_ahead_is_collected_once(client: Client) -> None:
    pending = client.open("tiny").acquire_ahead(1)
    pending.resolve().release()
    with pytest.raises(LeaseEnded, match=r"tiny/blocks\.0 was resolved or cancelled"):
        pending.resolve()


def test_a_cancelled_lease_ahead_is_given_back_when_its_grant_arrives(
    daemon: FakeDaemon, client: Client
) -> None:
    opened = client.open("tiny")
    daemon.may_grant.clear()
    pending = opened.acquire_ahead(1)
    pending.cancel()
    pending.cancel()
    daemon.may_grant.set()
    daemon.wait_until(lambda: len(daemon.leases) == 1)
    client.ask("status")
    daemon.wait_until(lambda: not daemon.leases)
    with pytest.raises(LeaseEnded):
        pending.resolve()


def test_a_grant_that_came_before_the_cancel_is_given_back_at_once(
    daemon: FakeDaemon, client: Client
) -> None:
    pending = client.open("tiny").acquire_ahead(1)
    client.ask("status")
    assert len(daemon.leases) == 1
    pending.cancel()
    daemon.wait_until(lambda: not daemon.leases)


def test_a_forgotten_lease_ahead_is_given_back_at_the_next_call(
    daemon: FakeDaemon, client: Client
) -> None:
    pending = client.open("tiny").acquire_ahead(1)
    daemon.wait_until(lambda: len(daemon.leases) == 1)
    del pending
    gc.collect()
    client.ask("status")
    daemon.wait_until(lambda: not daemon.leases)


# ------------------------------------------------------------------------------- a daemon that dies


def test_a_daemon_killed_in_the_middle_of_an_acquire_is_noticed_at_once(
    daemon: FakeDaemon, client: Client
) -> None:
    opened = client.open("tiny")
    daemon.may_grant.clear()
    pending = opened.acquire_ahead(1)
    daemon.wait_until(lambda: len(daemon.asked("acquire")) == 1)
    daemon.stop()
    with pytest.raises(DaemonGone):
        pending.resolve()
    with pytest.raises(DaemonGone):
        opened.acquire(0)
    with pytest.raises(DaemonGone):
        opened.acquire_ahead(0)
    with pytest.raises(DaemonGone):
        client.open("tiny")


def test_a_lease_may_be_read_to_its_end_after_the_daemon_died(
    daemon: FakeDaemon, client: Client
) -> None:
    with client.lease("tiny", "blocks.0") as lease:
        daemon.stop()
        assert lease[NORM].dense().shape == (100,)
    with pytest.raises(LeaseEnded):
        lease[NORM]
    with pytest.raises(DaemonGone):
        client.lease("tiny", "blocks.0")
