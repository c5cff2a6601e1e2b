"""What plans ask of the devices, and what a measured device changes."""

from __future__ import annotations

import pytest

from tests.core.by_hand import G, tell
from tierd.core.errors import IllegalEvent
from tierd.core.machine import TierMachine
from tierd.core.model import (
    Acquire,
    ArenaAdded,
    ClientJoined,
    CoreConfig,
    DeviceMeasured,
    Event,
    Grant,
    LayerKey,
    ModelAdded,
    Plan,
    Read,
    ReadDone,
    Release,
)
from tierd.core.outlook import loads_of
from tierd.core.prediction import predict

LAYERS = 8
MS = 1_000_000


def machine_of(granules: int) -> TierMachine:
    """Model 0 of eight layers of one granule on device 5, clients 1 and 2."""
    machine = TierMachine(CoreConfig(granules * G, reads_in_flight=1))
    machine.handle(ArenaAdded(0, 0, 1024 * G, granules * G))
    machine.handle(ModelAdded(0, 0, "m", 0, (G,) * LAYERS, device=5))
    for client in (1, 2):
        machine.handle(ClientJoined(0, client, weight=100 * client))
    return machine


def run_passes(
    machine: TierMachine, passes: int, compute_ns: int, read_ns: int, tokens_per_pass: int = 1
) -> None:
    """Client 1 goes through the model; nothing is asked for ahead, and a read takes `read_ns` from
    when the client waits for it (what is read while it computes is there by then)."""
    now = 0
    reading: list[int] = []

    def granted_by(event: Event) -> list[Grant]:
        actions = tell(machine, event)
        reading.extend(action.slot for action in actions if isinstance(action, Read))
        return [action for action in actions if isinstance(action, Grant)]

    granted_by(Plan(0, 1, 1, 0, tuple(range(LAYERS)), tokens_per_pass=tokens_per_pass))
    for number in range(passes * LAYERS):
        granted = granted_by(Acquire(now, 1, number + 2, LayerKey(0, number % LAYERS)))
        while not granted:
            now += read_ns
            granted = granted_by(ReadDone(now, reading.pop(0)))
        now += compute_ns
        granted_by(Release(now, 1, granted[0].lease))


def test_a_plan_asks_for_what_is_not_kept_and_for_its_own_compute() -> None:
    machine = machine_of(4)
    run_passes(machine, 10, compute_ns=2 * MS, read_ns=20 * MS, tokens_per_pass=3)
    [load] = loads_of(machine.books)
    assert (load.client, load.model, load.device, load.weight) == (1, 0, 5, 100)
    assert load.tokens_per_pass == 3
    # Two pass through the memory of four at a time, two stay.
    assert load.ssd_bytes == 6 * G
    assert load.compute_ns == pytest.approx(LAYERS * 2 * MS, rel=0.1)
    [found] = predict([load], {5: G * 50})  # 20 ms a layer
    assert found.binds == "ssd"
    assert found.stall_ns == pytest.approx(6 * 20 * MS - LAYERS * 2 * MS, rel=0.1)


def test_the_compute_of_a_pass_is_right_where_its_steps_differ() -> None:
    """A mean of the last steps would depend on where in the pass the client is."""
    machine = machine_of(LAYERS)
    head_ns, now = 10 * MS, 0
    tell(machine, Plan(0, 1, 1, 0, tuple(range(LAYERS))))
    slots = [0]
    for number in range(4 * LAYERS):
        actions = tell(machine, Acquire(now, 1, number + 2, LayerKey(0, number % LAYERS)))
        while not any(isinstance(action, Grant) for action in actions):
            actions = tell(machine, ReadDone(now, slots[0]))
            slots[0] += 1
        [lease] = [action.lease for action in actions if isinstance(action, Grant)]
        now += head_ns if number % LAYERS == LAYERS - 1 else MS
        tell(machine, Release(now, 1, lease))
    [load] = loads_of(machine.books)
    assert load.compute_ns == pytest.approx(head_ns + (LAYERS - 1) * MS, rel=0.05)


def test_a_model_that_fits_asks_for_nothing() -> None:
    machine = machine_of(LAYERS)
    run_passes(machine, 2, compute_ns=MS, read_ns=MS)
    [load] = loads_of(machine.books)
    assert load.ssd_bytes == 0


def test_nothing_is_said_of_clients_that_did_not_step_or_have_no_cycle() -> None:
    machine = machine_of(4)
    tell(
        machine,
        Plan(0, 1, 1, 0, tuple(range(LAYERS))),
        Plan(0, 2, 1, 0, tuple(range(LAYERS)), kind="once"),
        Acquire(1, 2, 2, LayerKey(0, 0)),
    )
    assert loads_of(machine.books) == []


def test_a_measured_device_takes_as_many_reads_as_it_was_said_to() -> None:
    machine = machine_of(4)
    asked = [Acquire(1, 1, 1, LayerKey(0, 0)), Acquire(1, 1, 2, LayerKey(0, 1), ahead=True)]
    first = tell(machine, *asked)
    assert len([action for action in first if isinstance(action, Read)]) == 1
    more = tell(machine, DeviceMeasured(2, 5, 10**9, 100_000, 2))
    assert len([action for action in more if isinstance(action, Read)]) == 1


def test_a_limit_that_falls_lets_what_runs_run_on() -> None:
    machine = machine_of(6)
    tell(
        machine,
        DeviceMeasured(0, 5, 10**9, 100_000, 3),
        *(Acquire(1, 1, number, LayerKey(0, number), ahead=True) for number in range(1, 4)),
        DeviceMeasured(2, 5, 10**9, 100_000, 1),  # the invariants hold
        Acquire(3, 2, 1, LayerKey(0, 7), ahead=True),
    )
    done = tell(machine, ReadDone(4, 0))
    assert not [action for action in done if isinstance(action, Read)]


@pytest.mark.parametrize("figures", [(0, 0, 1), (1, 0, 0), (1, -1, 1)])
def test_figures_that_no_device_has_are_illegal(figures: tuple[int, int, int]) -> None:
    with pytest.raises(IllegalEvent, match="no device has these figures"):
        machine_of(4).handle(DeviceMeasured(0, 5, *figures))
