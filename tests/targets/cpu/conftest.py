from __future__ import annotations

from pathlib import Path

import pytest
from vaes import compile_vae, make_vae


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compiled model for processes of their own, which load it much faster than compile it.

    It is not to be written to.
    """
    directory = tmp_path_factory.mktemp("models") / "compiled"
    compile_vae(make_vae(block_out_channels=(16, 32), norm_num_groups=8)).save_pretrained(directory)
    return directory
