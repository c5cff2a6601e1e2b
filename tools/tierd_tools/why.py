"""One sentence on why a layer is where it is, from the daemon's answer to `why`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from tierd_tools.diagnostics import ask
from tierd_tools.quantities import duration, size

if TYPE_CHECKING:
    from collections.abc import Sequence

Reply = dict[str, Any]

_NUMBER = re.compile("[0-9]{1,18}", re.ASCII)  # what is longer does not fit into a request

ARRIVED = ("resident", "adopt")
LEFT = ("evict", "failed")


def why(socket_path: str | None, model: str, layer: str, tier: str = "dram") -> Reply:
    """The daemon's answer with the `sentence` in it. `layer`: its name, or its number."""
    number: str | int = int(layer) if _NUMBER.fullmatch(layer) else layer
    reply = ask(socket_path, "why", model=model, layer=number, tier=tier)
    return {"sentence": sentence(reply), **reply}


def sentence(reply: Reply) -> str:
    """Where the layer is, since when, why, and who needs it next."""
    about = f"{reply['name']} of {reply['model']} ({size(reply['bytes'])})"
    on_gpu = reply["tier"] != "dram"
    if on_gpu:
        about = f"On {reply['tier']}, {about}"
    match reply["state"]:
        case "resident":
            said = _resident(reply)
        case "reading":
            said = f"is being {'copied' if on_gpu else 'read'}, {_for_whom(reply)}"
        case "making room":
            said = f"waits for memory that is being given back, to be read {_for_whom(reply)}"
        case _:
            said = _absent(reply)
    if not on_gpu:
        said += "".join(
            f"; it is on {gpu} too" if reply["state"] == "resident" else f"; it is on {gpu}"
            for gpu, state in reply["gpus"].items()
            if state == "resident"
        )
    return f"{about} {said}."


def _resident(reply: Reply) -> str:
    parts = [f"is resident since {_arrival(reply)}"]
    if reply.get("pinned"):
        parts.append("pinned by the operator")
    if reply["leased_by"]:
        parts.append(f"leased by {_clients(reply['leased_by'])}")
    if reply["quarantined"]:
        parts.append("still read by clients of an earlier daemon")
    if reply["kept"] and reply["planned_by"]:
        parts.append("one of those that stay while others of its model pass through")
    stays = reply.get("pinned") or reply["leased_by"] or reply["quarantined"]
    goes = "" if stays else ": it goes when room is needed"
    parts.append(_need(reply) or f"no plan uses it{goes}")
    return "; ".join(parts)


def _arrival(reply: Reply) -> str:
    told = _last(reply, ARRIVED)
    if told is None:
        reaches = reply["record"]["reaches_ns"]
        return f"before the record begins, {duration(reaches or 0)} ago"
    if told["what"] == "adopt":
        return f"{duration(told['ago_ns'])} ago, when this daemon took it over from an earlier one"
    read = _last(reply, ("read",))
    reason = ", read"
    if read is not None:
        reason = ", read ahead of any request" if "ahead" in read["text"] else ", read on demand"
    return f"{duration(told['ago_ns'])} ago{reason}"


def _for_whom(reply: Reply) -> str:
    if reply["waiting"]:
        return f"demanded by {_clients(reply['waiting'])}"
    if reply["next_use"]:
        need = reply["next_use"]
        return f"ahead for {_client(need['client'])}, who {_needs_it(need)}"
    return "demanded by a client that is gone" if reply["demanded"] else "ahead of any request"


def _absent(reply: Reply) -> str:
    told = _last(reply, LEFT)
    if told is None:
        if reply["history"] or reply["record"]["forgotten_events"]:
            said = "is not in memory, and the record does not reach back to when it last was"
        else:
            said = "is not in memory: it was never asked for"
    elif reply["failed"]:
        failed = _last(reply, ("failed",)) or told
        said = f"is not in memory: its read failed {duration(failed['ago_ns'])} ago"
        said += f" ({failed['text']}); it is read again when somebody asks for it"
    else:
        said = f"was evicted {duration(told['ago_ns'])} ago, {told['text']}"
    parts = [said]
    if reply["waiting"]:
        parts.append(f"{_clients(reply['waiting'])} waits for it, behind other reads")
    if (need := _need(reply)) is not None:
        parts.append(need)
    return "; ".join(parts)


def _need(reply: Reply) -> str | None:
    need = reply["next_use"]
    return None if not need else f"{_client(need['client'])} {_needs_it(need)}"


def _needs_it(need: Reply) -> str:
    steps = f"{need['steps']} step{'s' if need['steps'] != 1 else ''}"
    if need["in_ns"]:
        said = f"needs it in {duration(need['in_ns'])} ({steps})"
    else:  # it is slower than it was, or pauses
        said = f"was expected to need it by now ({steps} away)"
    if need["probability_ppm"] < 1_000_000:
        said += f" with a probability of {need['probability_ppm'] / 1e6:.0%}"
    return said


def _clients(clients: Sequence[Reply]) -> str:
    return " and ".join(_client(client) for client in clients)


def _client(client: Reply) -> str:
    name = f" ({client['name']})" if client["name"] else ""
    return client["name"] if client["client"] < 0 else f"client {client['client']}{name}"


def _last(reply: Reply, kinds: Sequence[str]) -> Reply | None:
    """The newest decision of one of these kinds."""
    found: list[Reply] = [told for told in reply["history"] if told["what"] in kinds]
    return found[-1] if found else None
