"""Personal data in texts as they are, and as word-pieces bring them back."""

import time

import pytest

from v2t_jax.audit import personal_data
from v2t_jax.audit.personal_data import detector, joined


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("john . smith @ example . com called", {("email", "john.smith@example.com")}),
        ("call + 49 30 123456 now", {("phone", "+4930123456")}),
        ("pay de89 3704 0044 0532 0130 00 today", {("iban", "de89370400440532013000")}),
        ("pay de89 3704 0044 0532 0130 02 today", set()),  # not by its checksum
        ("card 4111 1111 1111 1111 .", {("card", "4111111111111111")}),
        ("at 192 . 168 . 0 . 1", {("ip", "192.168.0.1")}),
        ("at 192.168.0.999", set()),
        ("card 1732862558001", set()),  # a time in milliseconds that passes the cards' checksum
        ("call ( 555 ) 123 - 4567 .", {("phone", "5551234567")}),
        ("ruf 030 123456.", {("phone", "030123456")}),
        ("in 1998 , 23 people were there", set()),
        ("2026-11-29T06:42:38 and 29/11/2026 , 01 . 11 . 2026", set()),
        ("at 1732862558, invoice 10000023", set()),
        ("it rained . the end", set()),
    ],
)
def test_patterns(text: str, found: set[tuple[str, str]]) -> None:
    assert personal_data._by_patterns(joined(text)) == found


def test_spaces_are_undone_inside_addresses_and_numbers_alone() -> None:
    assert joined("it rained . to a @ b . org , 3 . 5 and a - b") == "it rained . to a@b.org , 3.5 and a - b"


MANY = " ".join(f"a{i}@example.org" for i in range(20_000))


@pytest.mark.parametrize(
    "text", ["-" * 60 + "!@", "a.-" * 99 + "!@", "a" * 300_000, "1 " * 50_000, "a@" * 50_000, MANY]
)
def test_no_text_takes_long(text: str) -> None:
    start = time.perf_counter()
    personal_data._by_patterns(joined(text))
    assert time.perf_counter() - start < 5  # the first took minutes


def test_the_detector_says_what_it_looks_for() -> None:
    assert "email" in detector().name or "Presidio" in detector().name
