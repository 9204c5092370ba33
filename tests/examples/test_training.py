"""The examples that train a network, at a small size."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
SMALL = ["--size", "32", "32", "32", "--widths", "8", "16", "16", "--learning-rate", "5e-3"]
SMALL += ["--every", "10", "--device", "cpu"]
STEPS = 40


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """For small tensors: PyTorch's threads would wait for each other longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["train_voxelmorph", "train_voxelmorph_jax"])
def example(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        yield importlib.import_module(request.param)


@pytest.fixture(scope="module")
def trained(
    example: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ModuleType, Any, Path]:
    """An example, what came of it without a break, and where its files are."""
    folder = tmp_path_factory.mktemp("whole")
    arguments = [*SMALL, "--steps", str(STEPS), "--workers", "0", "--output", str(folder)]
    return example, example.main(arguments), folder


def test_the_loss_falls_and_an_unseen_image_comes_closer(
    trained: tuple[ModuleType, Any, Path],
) -> None:
    _, found, folder = trained
    assert len(found.losses) == STEPS
    assert np.mean(found.losses[-10:]) < np.mean(found.losses[:10]) - 0.03
    assert found.after < 0.95 * found.before
    assert (folder / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_a_training_that_is_resumed_goes_on_bit_for_bit(
    example: ModuleType, tmp_path: Path
) -> None:
    # Convolutions in bfloat16 are not the same twice on the CPU.
    arguments = [*SMALL, "--precision", "float32", "--output"]
    whole = example.main([*arguments, str(tmp_path / "whole"), "--workers", "0", "--steps", "4"])
    parts = [*arguments, str(tmp_path / "parts"), "--workers", "1"]
    example.main([*parts, "--steps", "2"])
    assert example.main([*parts, "--steps", "4", "--resume"]) == whole


def test_a_size_that_the_network_cannot_halve_is_told(
    example: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        example.main(["--size", "30", "32", "32"])
    assert "--size: expected multiples of 16, got (30, 32, 32)" in capsys.readouterr().err
