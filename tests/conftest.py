"""Fixtures that several test folders share: tiny random bases, built once a session."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which bitsandbytes does

from tests.tiny_bases import MAKERS


@pytest.fixture(scope="session")
def tiny_base_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny random base of one architecture."""
    folders: dict[str, Path] = {}

    def folder(architecture: str) -> Path:
        if architecture not in folders:
            folders[architecture] = MAKERS[architecture](tmp_path_factory.mktemp("bases") / f"tiny-{architecture}")
        return folders[architecture]

    return folder
