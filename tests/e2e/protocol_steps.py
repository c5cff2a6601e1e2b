"""A client of a GPU tier that goes so far and no further: for tests that kill somebody there.

python -m tests.e2e.protocol_steps SOCKET MODEL STEP    goes to STEP and kills itself there.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import TYPE_CHECKING, Any

from tests.daemon.conftest import PATIENCE_S, RawClient
from tests.e2e.gpu_client import GpuClient, GpuModel, Grant
from tierd_layouts.wire import encode

if TYPE_CHECKING:
    from collections.abc import Callable

TIER = "gpu:0"
#: How many layers it has been through, and mapped the chunks of, when it holds nothing again.
LAYERS = 8


class Walk:
    """One client, step after step. `lowered_bytes`: the budget that it asks for."""

    def __init__(self, socket: str, model: str, layers: int, lowered_bytes: int) -> None:
        self._path = socket
        self._model = model
        self._layers = layers
        self._lowered_bytes = lowered_bytes
        self._status = RawClient(socket)  # another connection: it never says hello
        self._request = 0
        self._layer = 0  #: that was asked for last
        self.client: GpuClient
        self.model: GpuModel
        self.grant: Grant | None = None  #: what it holds
        self.wanted: list[int] = []  #: chunks that the daemon asks back

    def to(self, step: str) -> None:
        for name, act in STEPS.items():
            act(self)
            if name == step:
                return
        raise ValueError(f"no step {step!r}: {', '.join(STEPS)}")

    def close(self) -> None:
        self.client.close()
        self._status.close()

    # --------------------------------------------------------------------------------------- steps

    def connect(self) -> None:
        self.client = GpuClient(self._path)

    def send_half_a_hello(self) -> None:
        self._frame = encode({"id": 1, "op": "hello", **HELLO})
        self.client.sock.sendall(self._frame[:9])

    def send_the_other_half(self) -> None:
        self.client.sock.sendall(self._frame[9:])
        self.client.wait_readable()

    def read_hello(self) -> None:
        assert self.client.receive(1)["tier"] == TIER
        self.client.count_on_from(2)

    def send_open(self) -> None:
        self._request = self.client.send("open", model=self._model)
        self.client.wait_readable()

    def read_open(self) -> None:
        self.model = self.client.opened(self._request)

    def send_plan(self) -> None:
        order = list(range(self._layers))
        fields = {"model_id": self.model.model_id, "order": order}
        self._request = self.client.send("plan", **fields, kind="cyclic", lookahead=0)
        self.client.wait_readable()

    def read_plan(self) -> None:
        self.client.receive(self._request)

    def wait_for_ssd(self) -> None:
        self._ask()
        self._meet(lambda status: status["dram"]["in_flight_bytes"], "it is read from the SSD")

    def wait_for_copy(self) -> None:
        # Nobody has a lease in DRAM but who copies from it: this layer, or one ahead of it.
        self._meet(lambda status: status["dram"]["leased_bytes"], "a layer is copied to the GPU")

    def wait_for_grant(self) -> None:
        self.client.wait_readable()

    def read_grant(self) -> None:
        self.grant = self.client.receive(self._request)

    def send_chunks(self) -> None:
        assert self.grant is not None
        self.wanted = self.model.chunks_of(self.grant)
        self._request = self.model.send_chunks(self.wanted)
        self.client.wait_readable()

    def map_chunks(self) -> None:
        self.model.map_received(self._request, self.wanted)

    def compute(self) -> None:
        assert self.grant is not None
        for _ in range(3):
            self.model.bytes_of(self.grant)

    def send_release(self) -> None:
        assert self.grant is not None
        self._request = self.client.send("release", leases=[self.grant["lease"]])
        self.client.wait_readable()
        self.grant = None

    def read_release(self) -> None:
        self.client.receive(self._request)

    def walk_on(self) -> None:
        """Through more layers, whose chunks stay mapped."""
        for layer in range(1, LAYERS):
            self.model.read(layer)

    def send_budget(self) -> None:
        self._attention = self.model.table.attention
        self._request = self._status.send("budget", tier=TIER, bytes=self._lowered_bytes)

    def see_attention(self) -> None:
        assert self._status.receive(self._request)["budget_bytes"] == self._lowered_bytes
        self._until(lambda status: self.model.table.attention != self._attention, "attention")

    def ask_what_to_unmap(self) -> None:
        self._until(self._is_wanted, "some of its chunks are wanted back")

    def unmap(self) -> None:
        self.model.unmap(self.wanted)

    def tell_that_it_unmapped(self) -> None:
        told = [[self.model.arena, self.wanted]]
        self.client.send("attend", unmapped=told, scratch_bytes=1 << 20)
        self.client.wait_readable()

    # ------------------------------------------------------------------------------------- waiting

    def _ask(self) -> None:
        fields = {"model_id": self.model.model_id, "layer": self._layer}
        self._request = self.client.send("acquire", **fields)

    def _meet(self, condition: Callable[[dict[str, Any]], object], what: str) -> None:
        """A layer that was asked for on its way: if one came unseen, the next one."""

        def met(status: dict[str, Any]) -> bool:
            if condition(status):
                return True
            if self.client.replied(self._request, 0):
                self.model.release(self.client.receive(self._request))
                self._layer = (self._layer + 1) % self._layers
                self._ask()
            return False

        self._until(met, what)

    def _is_wanted(self, status: dict[str, Any]) -> bool:
        wanted = self.client.attend()
        self.wanted = [chunk for _, chunks in wanted for chunk in chunks]
        return bool(self.wanted)

    def _until(self, condition: Callable[[dict[str, Any]], object], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition(status := self._status.call("status")):
            assert time.monotonic() < deadline, f"not in {PATIENCE_S:g} s: {what}: {status}"
            time.sleep(0.001)


HELLO = {"version": 1, "client": "walk", "capabilities": [], "held": [], "tier": TIER}
STEPS: dict[str, Callable[[Walk], None]] = {
    "connected": Walk.connect,
    "hello-half-sent": Walk.send_half_a_hello,
    "hello-answered": Walk.send_the_other_half,
    "greeted": Walk.read_hello,
    "open-answered": Walk.send_open,
    "opened": Walk.read_open,
    "plan-answered": Walk.send_plan,
    "planned": Walk.read_plan,
    "acquire-sent": Walk.wait_for_ssd,
    "copying": Walk.wait_for_copy,
    "grant-sent": Walk.wait_for_grant,
    "granted": Walk.read_grant,
    "chunks-answered": Walk.send_chunks,
    "chunks-mapped": Walk.map_chunks,
    "computing": Walk.compute,
    "release-answered": Walk.send_release,
    "released": Walk.read_release,
    "chunks-kept": Walk.walk_on,
    "budget-sent": Walk.send_budget,
    "attention-raised": Walk.see_attention,
    "unmap-asked": Walk.ask_what_to_unmap,
    "unmapped": Walk.unmap,
    "unmap-answered": Walk.tell_that_it_unmapped,
}


def main() -> None:
    socket, model, layers, lowered_bytes, step = sys.argv[1:]
    Walk(socket, model, int(layers), int(lowered_bytes)).to(step)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
