"""What a model process can be told: load, generate, hold leases, compute.

Imports torch and the rest only when a command needs them.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import time
from typing import TYPE_CHECKING, Any, Final

from tierd_tools.demo import ssd_counter

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

PROMPT: Final = (1, 17, 42, 99, 7, 23, 5, 61)
HOLD_SECONDS: Final = 1.0
_IO: Final = "/proc/self/io"


class Commands:
    """Each is a command of `ModelProcess`; what it returns travels as a pickle."""

    def __init__(self) -> None:
        self.model: Any = None
        self.device = "cpu"

    def warm(self) -> None:
        """The imports."""
        for name in ("torch", "transformers", "tierd_client"):
            importlib.import_module(name)

    def load(
        self, name: str, socket: str, where: dict[str, str], compute: str | None = "dense"
    ) -> None:
        """From a daemon. where: device and tier. compute: None is what a user gets."""
        import tierd_client

        self.device = where["device"]
        self.model = tierd_client.load_model(name, compute, socket, **where)  # type: ignore[arg-type]

    def load_in_memory(self, folder: Path, device: str) -> None:
        from transformers import AutoModelForCausalLM

        self.device = device
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        self.model = model.to(device).eval()

    def load_offloaded(self, how: str, *arguments: Any) -> None:
        """By Accelerate: one of the functions of `offload_peers`."""
        from tierd_tools import offload_peers

        self.model = getattr(offload_peers, how)(*arguments)
        self.device = str(arguments[1])

    def close(self) -> None:
        self.model.tierd.close()
        self.model = None

    def generate(self, tokens: int) -> tuple[list[int], float, float]:
        """(the tokens, seconds for each, of these expanding)."""
        import torch

        ids = torch.tensor([PROMPT], device=self.device)
        before = self._expand_ns()
        begin = time.perf_counter()
        with torch.no_grad():
            out = self.model.generate(
                ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0
            )
        self._wait()
        seconds = time.perf_counter() - begin
        expanding = (self._expand_ns() - before) / 1e9
        return out[0, len(PROMPT) :].tolist(), seconds / tokens, expanding / tokens

    def steps(self, tokens: int, forget: Sequence[Path] = ()) -> tuple[list[float], int]:
        """(seconds of each step of one token, bytes that this process read from disks for them).

        forget: folders whose files leave the page cache before every step, out of the clock.
        """
        import torch

        watch = _Steps(self._wait, forget)
        ids = torch.tensor([PROMPT], device=self.device)
        with torch.no_grad():
            self.model.generate(
                ids, max_new_tokens=tokens + 1, min_new_tokens=tokens + 1, do_sample=False,
                pad_token_id=0, streamer=watch,
            )  # fmt: skip
        return watch.seconds, watch.read_bytes

    def logits(self, times: int) -> list[str]:
        """The different logits that a prompt gave, as hashes, over so many passes."""
        import torch

        ids = torch.tensor([PROMPT], device=self.device)
        found = set()
        for _ in range(times):
            with torch.no_grad():
                values = self.model(ids).logits.float().cpu().numpy()
            found.add(hashlib.sha256(values.tobytes()).hexdigest())
        return sorted(found)

    def hold(self, name: str, socket: str, where: dict[str, str]) -> list[int]:
        """Lease layer after layer of a model until the daemon has refused for HOLD_SECONDS: others
        give back meanwhile what they only keep. Returns where they are in the arena; `compute`
        goes on with them."""
        import tierd_client

        self.device = where["device"]
        self.client = tierd_client.Client(socket, tier="gpu:0", name="holding")
        opened = self.client.open(name)
        self.leases: list[tierd_client.Lease] = []
        refused_s: float | None = None
        while len(self.leases) < len(opened.index.layers):
            try:
                self.leases.append(opened.acquire(len(self.leases)))
                refused_s = None
            except (tierd_client.LeaseLimit, tierd_client.BudgetTooSmall):
                now_s = time.monotonic()
                refused_s = refused_s or now_s
                if now_s - refused_s > HOLD_SECONDS:
                    break
                time.sleep(0.05)
        return [lease.offset for lease in self.leases]

    def compute(self) -> None:
        """Read what is held, for ever. The layers are those of `random_pack`: one tensor each."""
        while True:
            for number, lease in enumerate(self.leases):
                float(lease[f"model.layers.{number}.weight"].view().float().sum())

    def _expand_ns(self) -> int:
        served = getattr(self.model, "tierd", None)
        return 0 if served is None else int(served.statistics().expand_ns)

    def _wait(self) -> None:
        if self.device != "cpu":
            import torch

            torch.cuda.synchronize()


class _Steps:
    """A streamer of `generate`: the time of each step but the first, which is the prompt's."""

    def __init__(self, wait: Callable[[], None], forget: Sequence[Path]) -> None:
        self._wait = wait
        self._forget = forget
        self._calls = 0
        self._begin_s = 0.0
        self._begin_bytes = 0
        self.seconds: list[float] = []
        self.read_bytes = 0

    def put(self, value: Any) -> None:
        """Called with the prompt, then with every token."""
        self._wait()
        if self._calls > 1:
            self.seconds.append(time.perf_counter() - self._begin_s)
            self.read_bytes += _read_bytes() - self._begin_bytes
        if self._forget and not self._calls:
            os.sync()
        self._calls += 1
        for folder in self._forget:
            ssd_counter.forget_pages(folder)
        self._begin_bytes = _read_bytes()
        self._begin_s = time.perf_counter()

    def end(self) -> None:
        pass


def _read_bytes() -> int:
    """That this process made disks read, page faults and read-ahead included."""
    with open(_IO) as file:
        fields = dict(line.split(": ") for line in file)
    return int(fields["read_bytes"])
