"""What a fork does to the objects of this package: in the child they are all poisoned.

A child shares the parent's socket and leases. Were it to use them, two processes would read one
stream of replies and end one lease twice. So every object remembers the life (the process since its
last fork) that it was made in and refuses to work in another, and the hooks registered here close
the child's copies of descriptors and mappings. The parent notices nothing.
"""

import os
import weakref
from collections.abc import Callable
from typing import Any

from tierd_client.errors import ForkedClient


class Life:
    """Identity of one process life; compared with `is`."""

    __slots__ = ()


_life = Life()
#: By id, because not all that must be poisoned can be hashed.
_hooks: dict[int, tuple[weakref.ref[Any], Callable[[Any], None]]] = {}


def current() -> Life:
    """The life this process is in now."""
    return _life


def check(life: Life, what: str) -> None:
    """Raise ForkedClient unless `life` is the current one."""
    if life is not _life:
        raise ForkedClient(
            f"{what} was made before this process (pid {os.getpid()}) was forked and belongs to "
            "its parent: open a Client in the child"
        )


def in_child(thing: Any, hook: Callable[[Any], None]) -> None:
    """Call `hook(thing)` once in a forked child if `thing` still lives. The hook takes no locks:
    a thread that the child does not have may hold them."""
    key = id(thing)
    _hooks[key] = weakref.ref(thing, lambda _: _hooks.pop(key, None)), hook


def _after_fork_in_child() -> None:
    global _life
    _life = Life()
    inherited = list(_hooks.values())
    _hooks.clear()
    for reference, hook in inherited:
        thing = reference()
        if thing is not None:
            hook(thing)


os.register_at_fork(after_in_child=_after_fork_in_child)
