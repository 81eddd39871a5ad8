"""Looking for a GPU without torch finds what torch finds."""

import pytest
import torch

from moemesh import cuda_detection
from moemesh.cuda_detection import cuda_is_usable


def test_it_agrees_with_torch() -> None:
    assert cuda_is_usable() == torch.cuda.is_available()


def test_where_there_is_a_driver_torch_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_detection, "_has_driver", lambda: True)
    assert cuda_is_usable() == torch.cuda.is_available()
