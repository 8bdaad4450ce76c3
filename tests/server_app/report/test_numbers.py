"""Numbers as people read them."""

import pytest

from fedmmkt.server_app.report.numbers import counted, flat, number, percent, seconds, size


@pytest.mark.parametrize(
    ("show", "value", "shown"),
    [
        (percent, None, "–"),
        (percent, 0.1234, "12.3 %"),
        (number, None, "–"),
        (number, 0.12345, "0.123"),
        (number, 99.96, "100"),
        (number, 826.4, "826"),
        (size, 1023, "1023 B"),
        (size, 1024, "1.0 KiB"),
        (size, 1.5 * 1024**2, "1.5 MiB"),
        (size, 5000 * 1024**2, "4.9 GiB"),
        (seconds, 119.94, "119.9 s"),
        (seconds, 120, "2.0 min"),
    ],
)
def test_a_number_is_shown_with_its_unit(show, value, shown):
    assert show(value) == shown


def test_things_are_counted():
    assert [counted(count, "client") for count in (0, 1, 2)] == ["0 clients", "1 client", "2 clients"]


def test_nested_settings_are_flat_texts():
    nested = {"seed": 0, "t2i": {"guidance": [1.5, 1.0], "model": "starter"}, "judge": True, "none": None}

    assert list(flat(nested)) == [
        ("seed", "0"),
        ("t2i.guidance", "1.5, 1.0"),
        ("t2i.model", "starter"),
        ("judge", "true"),
        ("none", "null"),
    ]
