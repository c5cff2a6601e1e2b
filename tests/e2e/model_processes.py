"""Processes that run models on a GPU tier: forked off one that has imported everything.

python -m tests.e2e.model_processes    reads jobs from stdin, forks for each, prints its pid.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.daemon.conftest import wait_until

ROOT = Path(__file__).parents[2]
START_S = 60.0


@dataclass(frozen=True)
class ModelProcess:
    """One of them. It generates again and again, a line of `out` for each text."""

    pid: int
    out: Path

    def texts(self) -> list[list[int]]:
        """The tokens of every text that it has finished."""
        lines = self.out.read_text().split("\n") if self.out.exists() else []
        return [json.loads(line) for line in lines[:-1]]

    def wait_texts(self, count: int) -> list[list[int]]:
        def enough() -> list[list[int]]:
            texts = self.texts()
            assert self.lives() or len(texts) >= count, f"it ended after {len(texts)} texts"
            return texts if len(texts) >= count else []

        found: list[list[int]] = wait_until(enough, f"{count} texts", START_S)
        return found

    def lives(self) -> bool:
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        wait_until(lambda: not self.lives(), "the process is dead")

    def leave(self) -> None:
        """It closes its model and ends."""
        os.kill(self.pid, signal.SIGTERM)
        wait_until(lambda: not self.lives(), "the process has ended")


class ModelProcesses:
    """Owns the process that forks them; ends all that is left."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._started: list[ModelProcess] = []
        self._parent = subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.model_processes"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )

    def start(
        self, name: str, socket: str, prompt: list[int], tokens: int, texts: int = 0
    ) -> ModelProcess:
        """texts: after which it waits to be told to leave; 0: it never stops."""
        out = self._folder / f"texts-{len(self._started)}"
        job = {"name": name, "socket": socket, "prompt": prompt, "tokens": tokens, "texts": texts}
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        self._parent.stdin.write(json.dumps({**job, "out": str(out)}) + "\n")
        self._parent.stdin.flush()
        said, _, _ = select.select([self._parent.stdout], [], [], START_S)
        assert said, f"no process was forked within {START_S:g} s"
        process = ModelProcess(int(self._parent.stdout.readline()), out)
        self._started.append(process)
        return process

    def close(self) -> None:
        for process in self._started:
            if process.lives():
                process.kill()
        assert self._parent.stdin is not None
        self._parent.stdin.close()  # then it ends
        try:
            self._parent.wait(START_S)
        finally:
            self._parent.kill()
            self._parent.wait()
            assert self._parent.stdout is not None
            self._parent.stdout.close()


def generate(job: dict[str, Any]) -> None:
    import torch

    from tierd_client.load import load_model

    torch.set_num_threads(1)
    ids = torch.tensor([job["prompt"]])
    model: Any = load_model(job["name"], "dense", job["socket"], tier="gpu:0")
    settings = {"max_new_tokens": job["tokens"], "min_new_tokens": job["tokens"]}
    with model.tierd, torch.no_grad(), open(job["out"], "a") as out:
        done = 0
        while not job["texts"] or done < job["texts"]:
            tokens = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                pad_token_id=0,
                **settings,
            )
            out.write(json.dumps(tokens[0].tolist()) + "\n")
            out.flush()
            done += 1
        signal.sigwait({signal.SIGTERM})


def main() -> None:
    import torch  # noqa: F401
    from transformers import LlamaForCausalLM, OPTForCausalLM  # noqa: F401

    import tierd_client.load  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    for line in sys.stdin:
        child = os.fork()  # before torch has started any thread
        if child == 0:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            status = 1
            try:
                generate(json.loads(line))
                status = 0
            finally:
                os._exit(status)
        print(child, flush=True)


if __name__ == "__main__":
    main()
