"""Where a model computes, and from which tier: which of them go together."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tierd_client.errors import ProtocolBroken, UnsupportedDevice
from tierd_client.gpu.kinds import MEMFD
from tierd_layouts.wire import DRAM_TIER, GPU_TIER_PREFIX

if TYPE_CHECKING:
    import torch

_DEVICE = re.compile(r"cpu|cuda(?::(\d+))?")
_TIER = re.compile(rf"{DRAM_TIER}|{GPU_TIER_PREFIX}\d+")


@dataclass(frozen=True, slots=True)
class GpuDevice:
    """The device behind a GPU tier, as the daemon says. kind: cuda_vmm, cuda_ipc or memfd; number:
    N of gpu:N; uuid: the same in all processes, whatever number they know the GPU by."""

    kind: str
    number: int
    uuid: str

    @classmethod
    def parse(cls, fields: Any) -> GpuDevice:
        """Raises ProtocolBroken."""
        match fields:
            case {"kind": str(kind), "number": int(number), "uuid": str(uuid)}:
                return cls(kind, number, uuid)
        raise ProtocolBroken(f"hello reply with device {fields!r}")


def check_tier(tier: str) -> str:
    """The tier. Raises UnsupportedDevice for what is none."""
    if not _TIER.fullmatch(tier):
        raise UnsupportedDevice(f'tier {tier!r} is unknown: "dram" or "gpu:N"')
    return tier


def check_device(device: str) -> str:
    """The kind of device, "cpu" or "cuda". Raises UnsupportedDevice for what is none."""
    if not _DEVICE.fullmatch(device):
        raise UnsupportedDevice(f'device {device!r} is unknown: "cpu", "cuda" or "cuda:N"')
    return device.partition(":")[0]


def choose_tier(device: str, tier: str | None) -> str:
    """The tier to compute from on `device`: `tier`, else "dram" for "cpu", "gpu:N" for "cuda:N".

    Raises UnsupportedDevice for names that are none, a tier that the device cannot read, and a
    CUDA device that this process has not.
    """
    if check_device(device) == "cpu":
        return check_tier(tier or DRAM_TIER)
    if tier is not None and check_tier(tier) == DRAM_TIER:
        raise UnsupportedDevice(
            f'device {device!r} reads no tier "dram": give tier="gpu:N", or device="cpu"'
        )
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise UnsupportedDevice(f"device {device!r}: torch {torch.__version__} finds no CUDA GPU")
    text = device.partition(":")[2]
    number = int(text) if text else torch.cuda.current_device()
    if number >= count:
        raise UnsupportedDevice(
            f"device {device!r}: torch finds {count} CUDA GPU(s), cuda:0 to cuda:{count - 1}"
        )
    return tier or f"{GPU_TIER_PREFIX}{number}"


def place(gpu: GpuDevice | None, tier: str, device: str | None) -> torch.device:
    """Where tensors over `tier` are: the CPU, or the CUDA device that has the daemon's UUID.

    gpu: of the tier, None for DRAM. device: as the user asked for it, None for wherever it is.
    Raises UnsupportedDevice when it is not there.
    """
    import torch

    if gpu is None or gpu.kind == MEMFD:
        if device not in (None, "cpu"):
            raise UnsupportedDevice(
                f"tier {tier!r} is a memfd device, memory of the host that plays a GPU: device "
                f'{device!r} cannot read it, device="cpu" can'
            )
        return torch.device("cpu")
    if device == "cpu":
        raise UnsupportedDevice(
            f'tier {tier!r} is a {gpu.kind} device: the CPU cannot read it, device="cuda" can'
        )
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    uuids = {number: _uuid(number) for number in range(count)}
    numbers = [number for number, uuid in uuids.items() if uuid == _normal(gpu.uuid)]
    if not numbers:
        raise UnsupportedDevice(
            f"tier {tier!r} is GPU {gpu.uuid}, which torch {torch.__version__} in this process "
            f"does not see among its {count} CUDA GPU(s) (CUDA_VISIBLE_DEVICES?)"
        )
    wanted = (device or "").partition(":")[2]
    if wanted and int(wanted) not in numbers:
        raise UnsupportedDevice(
            f"device {device!r} is another GPU than tier {tier!r}, which is cuda:{numbers[0]} in "
            f'this process: give device="cuda:{numbers[0]}", or the tier of {device!r}'
        )
    return torch.device("cuda", numbers[0])


def _uuid(number: int) -> str:
    import torch

    return _normal(str(torch.cuda.get_device_properties(number).uuid))


def _normal(uuid: str) -> str:
    """Drivers and tools write it with and without a prefix and dashes."""
    return uuid.lower().removeprefix("gpu-").replace("-", "")
