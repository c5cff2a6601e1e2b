"""A process that runs one model, told what to do over a pipe: from a daemon, or in memory.

Spawned, so that each has a CUDA context of its own, and can be killed.
"""

from __future__ import annotations

import hashlib
import importlib
import multiprocessing
import time
from typing import TYPE_CHECKING, Any, Final, Literal

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from pathlib import Path

PROMPT: Final = (1, 17, 42, 99, 7, 23, 5, 61)
ANSWER_SECONDS: Final = 120.0
HOLD_SECONDS: Final = 1.0


class ModelProcess:
    """Commands are sent with `begin` and their answer taken with `end`, or both with `call`."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def begin(self, command: str, *arguments: Any) -> None:
        self._pipe.send((command, arguments))

    def end(self) -> Any:
        """Raises RuntimeError with what the process says, or that it does not answer."""
        if not self._pipe.poll(ANSWER_SECONDS):
            raise RuntimeError(f"a model process did not answer within {ANSWER_SECONDS:g} s")
        outcome, value = self._pipe.recv()
        if outcome == "failed":
            raise RuntimeError(f"a model process failed: {value}")
        return value

    def call(self, command: str, *arguments: Any) -> Any:
        self.begin(command, *arguments)
        return self.end()

    @property
    def answered(self) -> bool:
        """Whether `end` would return at once."""
        return self._pipe.poll(0)

    def kill(self) -> None:
        """SIGKILL, in the middle of whatever it does."""
        self._process.kill()
        self._process.join()

    def stop(self) -> None:
        self._pipe.close()
        self._process.join(10)
        if self._process.is_alive():
            self.kill()


class _Commands:
    """What the process can do."""

    def __init__(self) -> None:
        self.model: Any = None
        self.device = "cpu"

    def warm(self) -> None:
        """The imports."""
        for name in ("torch", "transformers", "tierd_client"):
            importlib.import_module(name)

    def load(self, name: str, socket: str, where: dict[str, str]) -> None:
        """From a daemon. where: device and tier."""
        import tierd_client

        self.device = where["device"]
        self.model = tierd_client.load_model(name, "dense", socket, **where)  # type: ignore[arg-type]

    def load_in_memory(self, folder: Path, device: str) -> None:
        from transformers import AutoModelForCausalLM

        self.device = device
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        self.model = model.to(device).eval()

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


def _serve(pipe: Connection) -> None:
    commands = _Commands()
    while True:
        try:
            command, arguments = pipe.recv()
        except EOFError:
            return
        outcome: tuple[Literal["done", "failed"], Any]
        try:
            outcome = ("done", getattr(commands, command)(*arguments))
        except Exception as error:  # the boundary of the process: whoever asked waits
            outcome = ("failed", f"{command}: {type(error).__name__}: {error}")
        pipe.send(outcome)
