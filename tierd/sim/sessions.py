"""The clients of a run as a server sees them: who is connected, what each holds and is owed.

Every answer of the core comes through here to its client, and is refused when it breaks a promise:

- it answers something, and not late (`owed`)
- nothing that was announced is put off or refused while everything fits
- nobody is refused a layer for want of memory who holds nothing else
- whoever waits for room presses those who keep leases
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tierd.core.model import (
    Acquire,
    Admit,
    ClientGone,
    ClientJoined,
    Grant,
    Hint,
    Later,
    Plan,
    Refuse,
    Release,
)
from tierd.sim.errors import BrokenPromise
from tierd.sim.owed import Owed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from tierd.core.model import Event
    from tierd.sim.agenda import Agenda
    from tierd.sim.virtual_client import VirtualClient

FromClient = ClientJoined | Plan | Acquire | Release | Hint | ClientGone
Answer = Grant | Later | Admit | Refuse


class Sessions:
    """Of all tiers of one run. A tier is the number of a GPU, or None for DRAM."""

    def __init__(
        self,
        agenda: Agenda,
        tiers: Iterable[int | None],
        is_pressed: Callable[[int | None], bool],
        *,
        whole_spans: bool = True,
    ) -> None:
        """is_pressed: whether clients of a tier are to give back what they keep.

        whole_spans: arenas are so large that no layer lacks a place in one piece.
        """
        self.clients: dict[int, VirtualClient] = {}
        self.leases: dict[int, dict[int, None]] = {}  #: by connected client
        self.owed = Owed()
        self.pressed = dict.fromkeys(tiers, False)  #: as of the last `press`
        self._agenda = agenda
        self._is_pressed = is_pressed
        self._whole_spans = whole_spans
        self._admitted: set[int] = set()  #: clients that have a plan

    # ------------------------------------------------------------------------------- what they send

    def takes(self, event: FromClient, bound: Callable[[Plan | Acquire], int]) -> bool:
        """Notes what the event changes and makes owed, by when `bound` says. False: it came too
        late and is dropped, as a server does."""
        client = event.client
        if isinstance(event, ClientJoined):
            self.leases[client] = {}
            return True
        if client not in self.leases:
            return False
        match event:
            case Plan() | Acquire():
                self.owed.asked(event, bound(event))
            case Release():
                if event.lease not in self.leases[client]:
                    return False
                del self.leases[client][event.lease]
            case _:
                pass
        return True

    def gone(self, client: int) -> Iterable[int]:
        """The client is no longer connected; the leases that it had."""
        self.owed.forget(client)
        self._admitted.discard(client)
        return self.leases.pop(client)

    # ------------------------------------------------------------------------------ what they get

    def answer(self, action: Answer) -> None:
        """Delivers what the core answers. Raises BrokenPromise."""
        owed = self.owed.answered(action)
        client = self.clients[action.client]
        match action:
            case Grant():
                self.leases[action.client][action.lease] = None
                client.granted(action)
            case Later():
                if not isinstance(owed, Acquire) or not owed.ahead:
                    raise BrokenPromise(f"{owed} was answered with {action}")
                self._check_room(action, owed)
                client.told_later(action)
            case Admit():
                self._admitted.add(action.client)
                client.admitted(action)
            case Refuse():
                self._check_refusal(action, owed)
                client.refused(action)

    def press(self) -> None:
        """Clients that keep leases give them back within their time after they are pressed to."""
        for tier, before in self.pressed.items():
            pressed = self.pressed[tier] = self._is_pressed(tier)
            if pressed and not before:
                for client in self.clients.values():
                    if client.profile.keeps and client.profile.gpu == tier:
                        self._agenda.after(client.profile.answer_ns, client.give_back)
        for waits in self.owed.plans:
            if not (self.pressed[self.clients[waits].profile.gpu] or self.pressed[None]):
                raise BrokenPromise(f"the plan of client {waits} waits, and nobody is pressed")

    # ----------------------------------------------------------------------------------- promises

    def _check_room(self, action: Later | Refuse, owed: Event) -> None:
        """What was announced is not put off while everything fits."""
        if isinstance(owed, Acquire) and owed.client in self._admitted:
            profile = self.clients[owed.client].profile
            if owed.key.layer in profile.order and not self._is_pressed(profile.gpu):
                raise BrokenPromise(f"{action} for {owed}, though everything fits")

    def _check_refusal(self, action: Refuse, owed: Event) -> None:
        """Refusals that a promise forbids: of a layer within a reserve, for want of memory."""
        if action.code == "internal" and self._whole_spans:
            raise BrokenPromise(f"{action}, though the arena is large enough")
        client = self.clients[action.client]
        if action.code == "lease_limit":
            self._check_room(action, owed)
        if isinstance(owed, Acquire) and not client.profile.planless and not client.leases:
            held = [key for key, _ in client.asked.values()]
            if action.code in ("lease_limit", "budget_too_small") and held == [owed.key]:
                raise BrokenPromise(f"{action}, though the client holds nothing else: {owed}")
