from __future__ import annotations

import math

import pytest

from rbln_vae.serving.settings import Address


@pytest.mark.parametrize(
    ("name", "value"),
    [("port", -1), ("port", 65536), ("grace", -1.0), ("grace", math.inf), ("grace", math.nan)],
)
def test_an_address_names_the_setting_that_is_out_of_range(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value}, expected"):
        Address(**{name: value})


def test_an_address_takes_any_free_port_and_no_grace() -> None:
    assert Address(port=0, grace=0.0) == Address("127.0.0.1", 0, 0.0)
