"""The parts of the acceptance: how long each may take, and what it needs."""

from __future__ import annotations

from typing import Final

SECONDS: Final = 480.0
#: What each part may take; what one leaves over, the next may use. Nothing can run without the
#: build: it may take what the last parts would need (25 s with 2 cores that are free, 100 s and
#: more with cores that are not).
BUDGETS: Final = {
    "wheels": 15.0, "build": 205.0, "look": 15.0, "models": 60.0, "kernels": 60.0, "tests": 60.0,
    "doctor": 40.0, "gpu_error": 20.0, "gpu_expand": 20.0, "gpu_variants": 60.0, "gpu_fused": 35.0,
    "gpu_decode": 60.0, "gpu_copy": 25.0, "gpu_acquire": 25.0, "gpu_killed": 30.0,
    "gpu_token": 30.0, "gpu_layout": 15.0, "gpu_profile": 25.0, "gpu_sanitizer": 45.0,
    "gpu_shared": 30.0, "gpu_memory": 15.0,
}  # fmt: skip
#: A benchmark that hangs does not take the time of all others: so many times its own at most,
#: unless the parts were chosen.
PATIENCE: Final = 2.0
#: What runs on the models that `models` makes.
WITH_MODELS: Final = ("gpu_decode", "gpu_killed", "gpu_token", "gpu_shared")
