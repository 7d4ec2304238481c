"""The checkpoint in the package: small enough, documented, and it follows colour words."""
import json

import pytest
import torch

from pokemon_nb.data import over
from pokemon_nb.ddpm import load_pipeline
from pokemon_nb.sampling import find_checkpoint

# what a colour word means as RGB in [0,1]; a picture counts for the nearest of these
ANCHORS = {"red": (0.85, 0.25, 0.15), "blue": (0.25, 0.5, 0.85), "green": (0.4, 0.7, 0.3), "yellow": (0.95, 0.85, 0.3),
           "purple": (0.45, 0.3, 0.55), "pink": (0.95, 0.65, 0.75)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return find_checkpoint(runs=tmp_path_factory.mktemp("no_runs"))


def test_files_are_small_and_documented(folder):
    for path in folder.rglob("*"):
        assert path.is_dir() or path.stat().st_size <= 16 * 2**20, path
    metrics, card = json.loads((folder / "metrics.json").read_text()), (folder / "README.md").read_text()
    assert f"{metrics['val_loss']:.4f}" in card and "without any affiliation" in card


@pytest.mark.slow
def test_it_follows_colour_words(folder):
    "Mean colour of what is opaque, on 6 colours x 8 seeds: at least two thirds nearest to the word (chance: a sixth)."
    pipe = load_pipeline(folder, "cpu")
    table, right = torch.tensor(list(ANCHORS.values())), 0
    for i, colour in enumerate(ANCHORS):
        x = pipe(f"a {colour} pokemon", num_images_per_prompt=8, seed=100, output_type="pt").images
        alpha = (x[:, 3:] + 1) / 2
        rgb = ((over(x, "black") + 1) / 2 * 1.0).sum((2, 3)) / alpha.sum((2, 3)).clamp_min(1)
        right += ((rgb[:, None] - table).norm(dim=-1).argmin(1) == i).sum().item()
    assert right >= 32, f"{right} of 48"
