from __future__ import annotations

import pytest

from tierd.sizes import LARGEST, format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GiB", 4 << 30), ("512MiB", 512 << 20), ("1.5GB", 1_500_000_000), ("64kB", 64_000),
        ("2TiB", 2 << 40), ("1 KiB", 1024), (" 7 ", 7), ("7B", 7), ("4gib", 4 << 30),
        (4096, 4096), ("0.5KiB", 512), (str(LARGEST), LARGEST),
    ],
)  # fmt: skip
def test_a_size_is_read_as_people_write_it(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "GiB", "-4GiB", "4 4GiB", "nan", "inf", "1e9", "0", "0.0GiB", "4G", "4Gib/s", "٤GiB",
     "4GiB\n4", "0x10", "1_000", str(LARGEST + 1), "9" * 40 + "TiB", 0, -1, True],
)  # fmt: skip
def test_nonsense_is_refused_with_the_text_that_was_given(text: str | int) -> None:
    with pytest.raises(ValueError, match=r"size|unit|bytes") as caught:
        parse_size(text)
    assert repr(text) in str(caught.value)


def test_a_unit_without_its_b_says_which_units_there_are() -> None:
    with pytest.raises(ValueError, match=r"'4G' has no unit that is known \('G'\): write KiB"):
        parse_size("4G")


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1024, "1.0 KiB"), (4 << 30, "4.0 GiB"),
     (5 << 40, "5.0 TiB"), (-2048, "-2.0 KiB"), (3000 << 40, "3000.0 TiB")],
)  # fmt: skip
def test_sizes_are_written_for_people(nbytes: int, text: str) -> None:
    assert format_size(nbytes) == text
