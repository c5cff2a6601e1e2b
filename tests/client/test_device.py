from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from tierd_client.device import GpuDevice, check_device, check_tier, choose_tier, place
from tierd_client.errors import ProtocolBroken, UnsupportedDevice

UUIDS = ("GPU-aaaaaaaa-0000-0000-0000-000000000000", "GPU-bbbbbbbb-0000-0000-0000-000000000000")
VMM = GpuDevice("cuda_vmm", 0, UUIDS[1])
MEMFD = GpuDevice("memfd", 0, "memfd")


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch finds two GPUs, in an order of its own, and writes UUIDs as it does."""

    class Properties:
        def __init__(self, number: int) -> None:
            self.uuid = UUIDS[number].removeprefix("GPU-")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", Properties)


def refusal(call: Any, *arguments: Any) -> str:
    with pytest.raises(UnsupportedDevice) as caught:
        call(*arguments)
    return str(caught.value)


# ------------------------------------------------------------------------------ before connecting


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:0", "cuda:12"])
def test_devices_that_are_known(device: str) -> None:
    assert check_device(device) == device.partition(":")[0]


@pytest.mark.parametrize(
    "device", ["", "gpu", "cpu:0", "cuda:", "cuda:x", "cuda:-1", "mps", "CUDA"]
)
def test_a_device_that_is_none_is_refused_with_those_that_are(device: str) -> None:
    text = refusal(choose_tier, device, None)
    assert text == f'device {device!r} is unknown: "cpu", "cuda" or "cuda:N"'


@pytest.mark.parametrize("tier", ["", "gpu", "gpu:", "gpu:x", "gpu:-1", "ssd", "dram:0", "gpu:1\n"])
def test_a_tier_that_is_none_is_refused_with_those_that_are(tier: str) -> None:
    assert refusal(check_tier, tier) == f'tier {tier!r} is unknown: "dram" or "gpu:N"'


def test_the_cpu_reads_dram_if_nothing_else_is_said() -> None:
    assert choose_tier("cpu", None) == "dram"
    assert choose_tier("cpu", "gpu:3") == "gpu:3"


def test_a_gpu_reads_the_tier_of_its_number(gpus: None) -> None:
    assert choose_tier("cuda:0", None) == "gpu:0"
    assert choose_tier("cuda", None) == "gpu:1"  # torch's current one
    assert choose_tier("cuda:0", "gpu:5") == "gpu:5"


def test_a_gpu_does_not_read_dram() -> None:
    assert refusal(choose_tier, "cuda:0", "dram") == (
        'device \'cuda:0\' reads no tier "dram": give tier="gpu:N", or device="cpu"'
    )


def test_without_a_gpu_the_torch_that_finds_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    text = refusal(choose_tier, "cuda", None)
    assert text == f"device 'cuda': torch {torch.__version__} finds no CUDA GPU"


def test_a_gpu_that_is_not_there_is_refused_with_those_that_are(gpus: None) -> None:
    text = refusal(choose_tier, "cuda:2", None)
    assert text == "device 'cuda:2': torch finds 2 CUDA GPU(s), cuda:0 to cuda:1"


# -------------------------------------------------------------------- when the daemon has answered


def test_dram_and_a_gpu_that_the_host_plays_are_the_cpus() -> None:
    assert place(None, "dram", "cpu") == torch.device("cpu")
    assert place(MEMFD, "gpu:0", None) == place(MEMFD, "gpu:0", "cpu") == torch.device("cpu")


def test_a_gpu_that_the_host_plays_is_refused_to_a_cuda_device() -> None:
    assert refusal(place, MEMFD, "gpu:0", "cuda:0") == (
        "tier 'gpu:0' is a memfd device, memory of the host that plays a GPU: device 'cuda:0' "
        'cannot read it, device="cpu" can'
    )


def test_a_real_gpu_is_refused_to_the_cpu() -> None:
    assert refusal(place, VMM, "gpu:0", "cpu") == (
        "tier 'gpu:0' is a cuda_vmm device: the CPU cannot read it, device=\"cuda\" can"
    )


def test_a_gpu_is_found_by_its_uuid_whatever_its_number(gpus: None) -> None:
    assert place(VMM, "gpu:0", "cuda") == torch.device("cuda", 1)
    assert place(VMM, "gpu:0", "cuda:1") == torch.device("cuda", 1)
    assert place(VMM, "gpu:0", None) == torch.device("cuda", 1)


def test_another_gpu_than_the_tiers_is_refused_with_the_right_one(gpus: None) -> None:
    assert refusal(place, VMM, "gpu:0", "cuda:0") == (
        "device 'cuda:0' is another GPU than tier 'gpu:0', which is cuda:1 in this process: give "
        "device=\"cuda:1\", or the tier of 'cuda:0'"
    )


def test_a_gpu_that_this_process_does_not_see_is_named_by_its_uuid(gpus: None) -> None:
    hidden = GpuDevice("cuda_ipc", 7, "GPU-cccccccc-0000-0000-0000-000000000000")
    text = refusal(place, hidden, "gpu:7", "cuda")
    assert re.match(rf"tier 'gpu:7' is GPU {hidden.uuid}, .* its 2 CUDA GPU\(s\)", text)


@pytest.mark.parametrize("fields", [None, {}, {"kind": "memfd", "number": 0}, "memfd"])
def test_a_device_that_is_not_described_breaks_the_protocol(fields: Any) -> None:
    with pytest.raises(ProtocolBroken, match="hello reply with device"):
        GpuDevice.parse(fields)
