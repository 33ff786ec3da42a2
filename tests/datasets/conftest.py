"""What the tests of data sets share."""

from __future__ import annotations

from pathlib import Path

import pytest
from vaes import default_compiled


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a small compiled model."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    default_compiled().save_pretrained(directory)
    return directory
