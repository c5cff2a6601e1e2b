"""One model process of the demo: loads, says `ready`, waits for `go`, generates, prints JSON.

python -m tierd_tools.demo.worker accelerate --model DIR --offload DIR ...
python -m tierd_tools.demo.worker transformers --model DIR --offload DIR ...
python -m tierd_tools.demo.worker tierd --model NAME --socket PATH --compute fused ...
python -m tierd_tools.demo.worker memory --model DIR ...
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tierd_tools.demo import ssd_counter

if TYPE_CHECKING:
    import torch


class TokenClock:
    """A `generate` streamer that notes when each token came, what the device had read, and how long
    the model had waited for layers."""

    def __init__(self, stat: Path | None, model: Any) -> None:
        self._stat = stat
        self._model = model
        self._prompt_seen = False
        self.tokens: list[int] = []
        self.at_ns: list[int] = []
        self.ssd_bytes: list[int] = []
        self.waited_ns: list[int] | None = [] if hasattr(model, "tierd") else None

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt_seen:  # transformers hands over the prompt first
            self._prompt_seen = True
            return
        self.at_ns.append(time.monotonic_ns())
        self.ssd_bytes.append(ssd_counter.read_bytes(self._stat) if self._stat else 0)
        if self.waited_ns is not None:
            self.waited_ns.append(int(self._model.tierd.statistics().stall_ns))
        self.tokens.extend(int(token) for token in value.flatten())

    def end(self) -> None:
        pass


def prompt_ids(vocabulary: int, tokens: int) -> torch.Tensor:
    """The same prompt for every row: [1, tokens] token ids from a fixed seed."""
    import torch

    generator = torch.Generator().manual_seed(1234)
    return torch.randint(3, vocabulary, (1, tokens), generator=generator)


def load_accelerate(args: argparse.Namespace) -> Any:
    """Accelerate's disk offload: what fits the same DRAM budget stays, the rest is loaded from
    disk before each module's forward and dropped after it."""
    from accelerate import infer_auto_device_map, init_empty_weights, load_checkpoint_and_dispatch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(args.model)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    model.tie_weights()
    device_map = infer_auto_device_map(
        model,
        max_memory={"cpu": args.dram_bytes, "disk": 1 << 50},
        no_split_module_classes=list(model._no_split_modules or []),
        dtype=config.dtype,
    )
    return load_checkpoint_and_dispatch(
        model,
        args.model,
        device_map=device_map,
        offload_folder=args.offload,
        offload_buffers=False,
        dtype=config.dtype,
        force_hooks=True,
    )


def load_transformers(args: argparse.Namespace) -> Any:
    """transformers' device map with the same budget: reads what does not fit from the checkpoint's
    own files, which it maps."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        args.model,
        dtype="auto",
        device_map="auto",
        max_memory={"cpu": args.dram_bytes, "disk": 1 << 50},
        offload_folder=args.offload,
    )


def load_memory(args: argparse.Namespace) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")


def load_tierd(args: argparse.Namespace) -> Any:
    import tierd_client

    return tierd_client.load_model(args.model, compute=args.compute, socket=args.socket)


LOADERS = {
    "accelerate": load_accelerate,
    "memory": load_memory,
    "tierd": load_tierd,
    "transformers": load_transformers,
}


def generate(model: Any, args: argparse.Namespace) -> dict[str, object]:
    """Greedy tokens; with `--gaps` also the distance of the two best logits at each of them."""
    import torch

    clock = TokenClock(Path(args.stat) if args.stat else None, model)
    ids = prompt_ids(model.config.vocab_size, args.prompt_tokens)
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=args.new_tokens,
            min_new_tokens=args.new_tokens,
            do_sample=False,
            pad_token_id=0,
            streamer=clock,
            return_dict_in_generate=True,
            output_logits=args.gaps,
        )
    result: dict[str, object] = {
        "tokens": clock.tokens,
        "at_ns": clock.at_ns,
        "ssd_bytes": clock.ssd_bytes,
        "waited_ns": clock.waited_ns,
    }
    if args.gaps:
        best = [torch.topk(step[0].float(), 2).values for step in out.logits]
        result["gaps"] = [float(two[0] - two[1]) for two in best]
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=sorted(LOADERS))
    parser.add_argument("--model", required=True)
    parser.add_argument("--offload")
    parser.add_argument("--dram-bytes", type=int)
    parser.add_argument("--socket")
    parser.add_argument("--compute", default="fused")
    parser.add_argument("--stat")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--gaps", action="store_true")
    args = parser.parse_args()

    import torch

    torch.set_num_threads(args.threads)
    model = LOADERS[args.kind](args)
    print("ready", flush=True)
    if sys.stdin.readline().strip() != "go":
        sys.exit("the demo went away before it said go")
    print(json.dumps(generate(model, args)), flush=True)


if __name__ == "__main__":
    main()
