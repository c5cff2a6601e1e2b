"""llama.cpp as a model process of the demo: loads, says `ready`, waits for `go`, prints JSON.

python -m tierd_tools.peers.llama_worker --model FILE.gguf --prompt 5,17,900 ...

The file is mapped, not locked: the page cache holds what the cap has room for. Imports no torch.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from pathlib import Path

from tierd_tools.demo import ssd_counter

#: Tokens of the context beyond the prompt and the new ones.
_SPARE = 8


def generate(args: argparse.Namespace) -> dict[str, object]:
    """Greedy tokens, and for each when it came and what the device had read by then."""
    import llama_cpp

    prompt = [int(token) for token in args.prompt.split(",")]
    llama = llama_cpp.Llama(
        model_path=args.model,
        n_ctx=len(prompt) + args.new_tokens + _SPARE,
        n_batch=len(prompt),
        n_threads=args.threads,
        n_threads_batch=args.threads,
        n_gpu_layers=0,
        use_mmap=True,
        use_mlock=False,
        verbose=False,
    )
    print("ready", flush=True)
    if sys.stdin.readline().strip() != "go":
        sys.exit("the benchmark went away before it said go")
    stat = Path(args.stat) if args.stat else None
    result: dict[str, list[int]] = {"tokens": [], "at_ns": [], "ssd_bytes": []}
    # top_k and the penalty are off: at temperature 0 the largest logit is taken.
    tokens = llama.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0)
    for token in itertools.islice(tokens, args.new_tokens):
        result["at_ns"].append(time.monotonic_ns())
        result["ssd_bytes"].append(ssd_counter.read_bytes(stat) if stat else 0)
        result["tokens"].append(int(token))
    return {**result, "waited_ns": None}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompt", required=True, help="token ids, with commas")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--new-tokens", type=int, required=True)
    parser.add_argument("--stat")
    print(json.dumps(generate(parser.parse_args())), flush=True)


if __name__ == "__main__":
    main()
