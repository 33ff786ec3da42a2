"""What `RBLN_VAE_DEBUG` means, for every place that asks."""

from __future__ import annotations

import pytest

from rbln_vae.debug import debugging


@pytest.mark.parametrize(
    ("value", "on"), [(None, False), ("", False), ("0", False), ("1", True), ("yes", True)]
)
def test_it_is_on_where_it_is_set_but_to_0_or_nothing(monkeypatch, value, on):
    monkeypatch.delenv("RBLN_VAE_DEBUG", raising=False)
    if value is not None:
        monkeypatch.setenv("RBLN_VAE_DEBUG", value)
    assert debugging() is on
