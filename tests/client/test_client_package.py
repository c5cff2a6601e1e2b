from __future__ import annotations

import subprocess
import sys
import threading

import pytest

import tierd_client


def in_fresh_python(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_importing_the_client_imports_no_torch_and_starts_no_thread() -> None:
    code = (
        "import sys, threading, tierd_client, tierd_client.private_daemon\n"
        "heavy = {'torch', 'transformers', 'safetensors', 'asyncio', 'uvloop', 'tierd'}\n"
        "print(sorted(heavy & set(sys.modules)), threading.active_count())"
    )
    assert in_fresh_python(code) == "[] 1"


def test_every_public_name_is_there() -> None:
    for name in tierd_client.__all__:
        assert getattr(tierd_client, name) is not None


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="tierd_client' has no attribute 'load_modle'"):
        tierd_client.load_modle  # noqa: B018


def test_every_public_error_is_a_tierd_error_and_a_builtin_one() -> None:
    errors = [
        value
        for value in (getattr(tierd_client, name) for name in tierd_client.__all__)
        if isinstance(value, type) and issubclass(value, BaseException)
    ]
    assert len(errors) > 20
    for error in errors:
        assert issubclass(error, tierd_client.TierdError)
        if error is not tierd_client.TierdError:
            builtins = [base for base in error.__mro__ if base.__module__ == "builtins"]
            assert builtins[0] is not Exception, error


def test_no_thread_is_alive_that_the_tests_did_not_start() -> None:
    assert all("tierd" not in thread.name for thread in threading.enumerate())
