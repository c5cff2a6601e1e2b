"""The library inside model processes: leases of layers from tierd, and models that run on them.

    with tierd_client.Client() as client, client.lease("llama", "model.layers.3") as layer:
        y = layer["model.layers.3.mlp.up_proj.weight"].linear(x)

Importing it imports no torch and starts no thread.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tierd_client.client import Client
from tierd_client.errors import (
    AccessDenied,
    BadTensorArgument,
    BudgetTooSmall,
    ChecksumMismatch,
    ClientClosed,
    CopyFailed,
    DaemonGone,
    DaemonNotRunning,
    DaemonTimeout,
    DeviceFailed,
    ForkedClient,
    LayerNotFound,
    LeaseEnded,
    LeaseLimit,
    LeaseLost,
    ModelNotFound,
    ModelRemoved,
    PackedView,
    PackInvalid,
    PrivateDaemonFailed,
    ProtocolBroken,
    ReadFailed,
    Refused,
    TensorCorrupt,
    TensorNotFound,
    TierdError,
    TierUnavailable,
    UnsupportedDevice,
    UnsupportedModel,
    UnsupportedOperation,
    ViewStillAlive,
)
from tierd_client.lease import Lease, PendingLease
from tierd_client.opened import OpenedModel
from tierd_client.statistics import ClientStatistics
from tierd_client.tensors import PackedTensor

if TYPE_CHECKING:
    from tierd_client.load import load_model, load_tokenizer

__all__ = [
    "AccessDenied",
    "BadTensorArgument",
    "BudgetTooSmall",
    "ChecksumMismatch",
    "Client",
    "ClientClosed",
    "ClientStatistics",
    "CopyFailed",
    "DaemonGone",
    "DaemonNotRunning",
    "DaemonTimeout",
    "DeviceFailed",
    "ForkedClient",
    "LayerNotFound",
    "Lease",
    "LeaseEnded",
    "LeaseLimit",
    "LeaseLost",
    "ModelNotFound",
    "ModelRemoved",
    "OpenedModel",
    "PackInvalid",
    "PackedTensor",
    "PackedView",
    "PendingLease",
    "PrivateDaemonFailed",
    "ProtocolBroken",
    "ReadFailed",
    "Refused",
    "TensorCorrupt",
    "TensorNotFound",
    "TierUnavailable",
    "TierdError",
    "UnsupportedDevice",
    "UnsupportedModel",
    "UnsupportedOperation",
    "ViewStillAlive",
    "load_model",
    "load_tokenizer",
]


def __getattr__(name: str) -> Any:
    if name in ("load_model", "load_tokenizer"):
        from tierd_client import load  # imports torch and transformers

        return getattr(load, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
