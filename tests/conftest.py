"""Shared fixtures: everything is seeded, small and offline."""

from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure(config):
    import matplotlib

    matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def seeded():
    "Every test starts from the same seed."
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def root() -> Path:
    "The project's top folder."
    return ROOT


@pytest.fixture(scope="session")
def critters(tmp_path_factory) -> Path:
    "A small captioned dataset."
    from pokemon_nb.captioning import caption_dataset
    from pokemon_nb.data import build_dataset

    folder = build_dataset("critters", tmp_path_factory.mktemp("critters") / "data", n=80, size=32)
    caption_dataset(folder)
    return folder


def pytest_addoption(parser):
    parser.addoption("--write-readme", action="store_true", help="write README.md from nbs/index.ipynb")
