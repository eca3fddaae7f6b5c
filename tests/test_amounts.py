"""Amounts of memory as people write them."""

import pytest

from torchrec_compress.amounts import parse_bytes


@pytest.mark.parametrize(
    ("text", "decimal", "binary"),
    [
        ("4GB", 4 * 10**9, 4 * 2**30),
        ("512 MB", 512 * 10**6, 512 * 2**20),
        (" 1.5g\n", 15 * 10**8, 3 * 2**29),
        ("2TB", 2 * 10**12, 2 * 2**40),
        ("3kb", 3000, 3072),
        ("4GiB", 4 * 2**30, 4 * 2**30),
        ("0.5 mib", 2**19, 2**19),
        ("7B", 7, 7),
        ("0GB", 0, 0),
    ],
)
def test_a_gb_is_what_the_command_says_and_a_gib_always_2_to_the_30(text, decimal, binary):
    assert parse_bytes(text, "--memory", 1000) == decimal
    assert parse_bytes(text, "hbm", 1024) == binary


@pytest.mark.parametrize(
    "text",
    ["", "GB", "-1GB", "4XB", "4 G B", "40", "4iB", "4Gi", "4_0GB", "٤GB", "infGB", "nanGB", "1e3GB", "4GB GB", "4.GB"],
)
def test_what_is_no_amount(text):
    with pytest.raises(ValueError, match=r"^hbm: must be a size such as '80GB' or '512MiB' \(1024\*\*3 bytes to a GB,"):
        parse_bytes(text, "hbm", 1024)


@pytest.mark.parametrize("text", ["9" * 400 + "GB", "9" * 5000 + "B", "8388608TiB"])
def test_more_bytes_than_there_can_be(text):
    with pytest.raises(ValueError, match=r"^--memory: must be below 2\*\*63 bytes, got '"):
        parse_bytes(text, "--memory", 1000)
    assert parse_bytes("8388607TiB", "--memory", 1000) == 2**63 - 2**40
