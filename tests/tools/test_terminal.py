"""What daemons and clients say is printed as it is, and commands no terminal."""

from __future__ import annotations

import pytest

from tierd_tools import listings, record_tables, render


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("[/x]", "[/x]"),
        ("[bold]chat[/]", "[bold]chat[/]"),
        (":smile:", ":smile:"),
        ("\x1b]0;mine\x07\x9b2J", r"\x1b]0;mine\x07\x9b2J"),
        ("two\nlines", r"two\nlines"),
    ],
)
def test_a_client_may_call_itself_anything(
    name: str, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    record_tables.why({"sentence": f"leased by client 3 ({name})"})
    assert capsys.readouterr().out == f"leased by client 3 ({shown})\n"
    render.reload({"added": [], "replaced": [], "removed": [name], "failed": []})
    assert capsys.readouterr().out == f"removed {shown}\n"
    listings.config({"config": [{"key": "models", "value": name, "source": "flag"}]})
    assert shown in capsys.readouterr().out
