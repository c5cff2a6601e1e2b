"""Everything the client library raises.

TierdError
    DaemonGone(ConnectionError)             the connection is over; this and every later call
        DaemonNotRunning                    nobody answers at the socket
        ProtocolBroken                      the peer does not speak the protocol
    DaemonTimeout(TimeoutError)             no reply in time; the connection is still good
    PrivateDaemonFailed(RuntimeError)       a daemon of our own did not come up
    ClientClosed(RuntimeError)
    ForkedClient(RuntimeError)              made before a fork, used in the child
    LeaseEnded(RuntimeError)
    LeaseLost(RuntimeError)                 the slot holds another generation
    ViewStillAlive(RuntimeError)
    PackedView(TypeError)                   a zero-copy view of a compressed tensor
    TensorNotFound(KeyError)
    TensorCorrupt(ValueError)               the bytes do not decode
    BadTensorArgument(ValueError)           shape, dtype, device or strides of an argument
    UnsupportedModel(NotImplementedError)
    UnsupportedOperation(NotImplementedError)
    UnsupportedDevice(ValueError)           device, tier and compute do not go together
    DeviceFailed(RuntimeError)              the GPU's driver refused a call
    Refused(RuntimeError)                   the daemon said no; .code is the wire's code
        ModelNotFound(KeyError), LayerNotFound(KeyError), ModelRemoved(KeyError)
        BudgetTooSmall(MemoryError), LeaseLimit(MemoryError)
        PackInvalid(ValueError), ChecksumMismatch(PackInvalid)
        ReadFailed(OSError), AccessDenied(PermissionError)
        CopyFailed(OSError), TierUnavailable(LookupError)
        VersionMismatch, NotAdmitted, TooManyClients
        ShuttingDown(DaemonGone)
"""

from tierd_layouts.wire import ErrorCode


class TierdError(Exception):
    """Base of all errors of the client library."""

    def __str__(self) -> str:
        # KeyError would show the repr of the text, OSError may show a pair.
        return " ".join(str(argument) for argument in self.args)


class DaemonGone(TierdError, ConnectionError):
    """The connection to the daemon is over; every later call raises this too."""


class DaemonNotRunning(DaemonGone):
    """Nobody answers at the socket."""


class ProtocolBroken(DaemonGone):
    """The peer sent what the protocol does not allow; the connection was closed."""


class DaemonTimeout(TierdError, TimeoutError):
    """The daemon did not answer in time. A late grant is given back when it arrives."""


class PrivateDaemonFailed(TierdError, RuntimeError):
    """A private daemon did not come up; the text carries what it wrote to stderr."""


class ClientClosed(TierdError, RuntimeError):
    """The client was closed."""


class ForkedClient(TierdError, RuntimeError):
    """The object was made before a fork and belongs to the parent: open a Client of your own."""


class LeaseEnded(TierdError, RuntimeError):
    """The lease was released; its handles lead nowhere."""


class LeaseLost(TierdError, RuntimeError):
    """The slot holds another generation than the one that was granted: the bytes read are void."""


class ViewStillAlive(TierdError, RuntimeError):
    """A zero-copy view outlived its lease. The slot stays leased until the view is gone."""


class PackedView(TierdError, TypeError):
    """A zero-copy view was asked of a compressed tensor, which has no dense bytes."""


class TensorNotFound(TierdError, KeyError):
    """The layer has no tensor of that name."""


class TensorCorrupt(TierdError, ValueError):
    """The stored arrays of a tensor do not decode; the text names pack, layer and tensor."""


class BadTensorArgument(TierdError, ValueError):
    """A tensor that was passed in has the wrong shape, dtype, device or strides."""


class UnsupportedModel(TierdError, NotImplementedError):
    """The model cannot run through tierd; the text lists the parts that stand in the way."""


class UnsupportedOperation(TierdError, NotImplementedError):
    """The operation would copy, move or change weights that only tierd owns."""


class UnsupportedDevice(TierdError, ValueError):
    """The device cannot compute from that tier, or not in that way."""


class DeviceFailed(TierdError, RuntimeError):
    """A call to the GPU's driver failed; the text names the call, what it was for and its error."""


class Refused(TierdError, RuntimeError):
    """The daemon refused a request. `code` is stable, the text names the limit and the value."""

    code: str = ErrorCode.INTERNAL

    def __init__(self, text: str, code: str | None = None) -> None:
        super().__init__(text)
        if code is not None:
            self.code = code


class VersionMismatch(Refused):
    """Client and daemon speak different protocol versions."""


class ModelNotFound(Refused, KeyError):
    """The daemon serves no model of that name."""


class LayerNotFound(Refused, KeyError):
    """The model has no layer of that name or index."""


class ModelRemoved(Refused, KeyError):
    """The model was removed or replaced while it was in use."""


class NotAdmitted(Refused):
    """The client has no share of the budget yet."""


class BudgetTooSmall(Refused, MemoryError):
    """The daemon's budget cannot hold what the plan needs at once."""


class LeaseLimit(Refused, MemoryError):
    """The client holds leases that leave no room for one more: release first."""


class PackInvalid(Refused, ValueError):
    """The pack breaks the format."""


class ChecksumMismatch(PackInvalid):
    """The bytes on the disk are not those that were packed."""


class ReadFailed(Refused, OSError):
    """Reading the layer failed."""


class CopyFailed(Refused, OSError):
    """Copying the layer from DRAM to the GPU failed."""


class TierUnavailable(Refused, LookupError):
    """The daemon has no such tier, or its device does not work; the text says why."""


class AccessDenied(Refused, PermissionError):
    """This user may not read the model."""


class TooManyClients(Refused):
    """The daemon takes no more connections."""


class ShuttingDown(Refused, DaemonGone):
    """The daemon is stopping and grants nothing more."""


_BY_CODE: dict[str, type[Refused]] = {
    ErrorCode.VERSION_MISMATCH: VersionMismatch,
    ErrorCode.NOT_FOUND: ModelNotFound,
    ErrorCode.NOT_ADMITTED: NotAdmitted,
    ErrorCode.BUDGET_TOO_SMALL: BudgetTooSmall,
    ErrorCode.LEASE_LIMIT: LeaseLimit,
    ErrorCode.PACK_INVALID: PackInvalid,
    ErrorCode.CHECKSUM_MISMATCH: ChecksumMismatch,
    ErrorCode.READ_FAILED: ReadFailed,
    ErrorCode.COPY_FAILED: CopyFailed,
    ErrorCode.TIER_UNAVAILABLE: TierUnavailable,
    ErrorCode.ACCESS_DENIED: AccessDenied,
    ErrorCode.MODEL_REMOVED: ModelRemoved,
    ErrorCode.SHUTTING_DOWN: ShuttingDown,
    ErrorCode.TOO_MANY_CLIENTS: TooManyClients,
}


def refusal(op: str, code: str, text: str) -> Refused:
    """The exception for an error reply to `op`. An unknown code keeps its name in `.code`."""
    if code == ErrorCode.NOT_FOUND and op in ("acquire", "plan"):
        return LayerNotFound(text, code)
    return _BY_CODE.get(code, Refused)(text, code)
