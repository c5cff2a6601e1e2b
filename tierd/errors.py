"""What can go wrong in the daemon.

TierdError                      code internal
    ConfigError        ValueError       never leaves the process: exit 2
    BudgetTooLarge     MemoryError      bad_request; at start exit 1, before the first page
    BudgetTooSmall     ValueError       at start, exit 1
    ArenaError         OSError          no memory could be obtained
    SocketInUse        OSError          another daemon answers on the socket
    SocketUnusable     OSError          no socket can be made at the path
    ReadError          OSError          read_failed
        ChecksumMismatch                checksum_mismatch
        ReadCancelled                   shutting_down
    PackInvalid        ValueError       pack_invalid
    ModelNotFound      KeyError         not_found
    LayerNotFound      KeyError         not_found
    NotAdmitted        RuntimeError     not_admitted
    AccessDenied       PermissionError  access_denied
    BadRequest         ValueError       bad_request
    UnknownOp          ValueError       unknown_op
    VersionMismatch    ValueError       version_mismatch
    TooManyClients     RuntimeError     too_many_clients
    ShuttingDown       RuntimeError     shutting_down
    ModelGone          RuntimeError     model_removed
    LeaseLimit         RuntimeError     lease_limit
    TierUnavailable    LookupError      tier_unavailable
    GpuError                            see tierd/gpu/errors.py

`code` is what a client sees (`tierd_layouts.wire.ErrorCode`); `text` names the thing, the limit and
the value.
"""

from __future__ import annotations

from typing import ClassVar


class TierdError(Exception):
    """The base of all. `str()` is always the plain text (KeyError alone would quote it)."""

    code: ClassVar[str] = "internal"

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return self.text


class ConfigError(TierdError, ValueError):
    """A setting that cannot be used. Names the key, the value and where it was given."""


class BudgetTooLarge(TierdError, MemoryError):
    """A budget does not fit into what the machine, a memory cgroup or a GPU has left."""

    code = "bad_request"


class BudgetTooSmall(TierdError, ValueError):
    """A budget that does not hold one unit in which memory is taken."""


class ArenaError(TierdError, OSError):
    """The system refused memory, a descriptor or a mapping for an arena."""


class SocketInUse(TierdError, OSError):
    """Another process answers on the socket that this daemon was told to use."""


class SocketUnusable(TierdError, OSError):
    """No socket can be made at the path that was chosen. Names it and what the system says."""


class ReadError(TierdError, OSError):
    """A layer could not be read. Names pack, layer, file and offset."""

    code = "read_failed"


class ChecksumMismatch(ReadError):
    """What was read is not what was packed. Names pack, layer, block and both hashes."""

    code = "checksum_mismatch"


class ReadCancelled(ReadError):
    """The readers were closed before the layer was read."""

    code = "shutting_down"


class PackInvalid(TierdError, ValueError):
    code = "pack_invalid"


class ModelNotFound(TierdError, KeyError):
    code = "not_found"


class LayerNotFound(TierdError, KeyError):
    code = "not_found"


class NotAdmitted(TierdError, RuntimeError):
    code = "not_admitted"


class AccessDenied(TierdError, PermissionError):
    code = "access_denied"


class BadRequest(TierdError, ValueError):
    code = "bad_request"


class UnknownOp(TierdError, ValueError):
    code = "unknown_op"


class VersionMismatch(TierdError, ValueError):
    code = "version_mismatch"


class TooManyClients(TierdError, RuntimeError):
    code = "too_many_clients"


class ShuttingDown(TierdError, RuntimeError):
    code = "shutting_down"


class ModelGone(TierdError, RuntimeError):
    """A model that this client opened was removed while tierd runs."""

    code = "model_removed"


class LeaseLimit(TierdError, RuntimeError):
    """A client holds as many leases as one may."""

    code = "lease_limit"


class TierUnavailable(TierdError, LookupError):
    """There is no such tier here, or its device does not work. Says which there are, or why."""

    code = "tier_unavailable"
