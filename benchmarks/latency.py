"""Milliseconds from a prompt to one picture, words and guidance included, after loading; idle cores wanted.

    python benchmarks/latency.py                        # the shipped checkpoint in its own setting, and in 50 steps
    python benchmarks/latency.py --checkpoint FOLDER --rounds 40

Every picture has a prompt and a seed of its own, so nothing comes from a cache. Variants take turns (chapter 06).
"""

from itertools import count
from pathlib import Path

import torch
from fastcore.script import call_parse

import pokemon_nb
from pokemon_nb.ddpm import load_pipeline
from pokemon_nb.profiling import compare, table

COLOURS, NOUNS = ("red", "blue", "green", "yellow", "pink"), ("bird", "fish", "mouse", "dragon", "cat", "turtle")


@call_parse
def main(
    checkpoint: str = "",  # checkpoint or run folder; empty = the shipped one
    rounds: int = 20,  # pictures that count, for each variant
    threads: int = 0,  # CPU threads; 0 = torch's own choice
):
    "Draw and print the table."
    if threads:
        torch.set_num_threads(threads)
    shipped = Path(pokemon_nb.__file__).parent / "weights/pokemon-64"
    pipe, number = load_pipeline(checkpoint or shipped, "cpu"), count()

    def draw(**settings):
        k = next(number)
        return pipe(f"a {COLOURS[k % 5]} {NOUNS[k % 6]} number {k}", seed=k, **settings)

    own = pipe.settings()
    variants = {f"{own['sampler']}, {own['steps']} steps, {draw().nfe:g} calls": draw}
    if own["steps"] != 50:
        variants["the same in 50 steps"] = lambda: draw(num_inference_steps=50)
    print(f"{pipe.describe(checkpoint or 'shipped')}, {torch.get_num_threads()} threads, {rounds} pictures each\n")
    print(table(compare(variants, rounds)))
