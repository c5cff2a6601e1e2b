"""A process that runs one model, told what to do over a pipe: from a daemon, or in memory.

Each has a CUDA context of its own, and can be killed: they are spawned, as imports may start CUDA,
which no fork survives. Where shared memory plays the GPU, they are forked from a server that has
imported what they need, once for all of them. What they can do: `gpu_commands`.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.context
import os
from typing import TYPE_CHECKING, Any, Final, Literal

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

ANSWER_SECONDS: Final = 120.0
_IMPORTED: Final = (
    *("torch", "transformers", "transformers.generation.utils", "accelerate"),
    *("transformers.models.llama.modeling_llama", "tierd_client.load", "tierd_tools.gpu_commands"),
)


def _context() -> multiprocessing.context.SpawnContext | multiprocessing.context.ForkServerContext:
    if os.environ.get("TIERD_BENCH_DEVICE") != "memfd":
        return multiprocessing.get_context("spawn")
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([*_IMPORTED])
    return server


class ModelProcess:
    """Commands are sent with `begin` and their answer taken with `end`, or both with `call`."""

    def __init__(self) -> None:
        context = _context()
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


def _serve(pipe: Connection) -> None:
    from tierd_tools.gpu_commands import Commands

    commands = Commands()
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
