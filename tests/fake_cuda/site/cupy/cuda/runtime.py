"""`cupy.cuda.runtime` of a process that has tests/fake_cuda/site on its PYTHONPATH."""

from __future__ import annotations

from importlib import import_module

FAKE = import_module("tests.fake_cuda.runtime").FakeRuntime(
    import_module("cuda.bindings.driver").FAKE
)
globals().update({name: getattr(FAKE, name) for name in dir(FAKE) if not name.startswith("_")})
