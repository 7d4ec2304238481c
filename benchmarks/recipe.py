"""What each part of the training recipe gives: one change at a time, as many pictures, judged by one judge.

    python benchmarks/recipe.py DATA --out runs/recipe            # every row; finished ones are not repeated
    python benchmarks/recipe.py DATA --out runs/recipe --only optimizer
    python benchmarks/recipe.py DATA --out runs/recipe --only minutes --codec runs/codec    # and latents

DATA is a captioned dataset folder. Every row trains STEPS batches of 32 at 32 px with one setting changed against
`recipe`; the rows under "equal minutes" get as much processor time as `recipe` took instead, a codec's training not
counted. Columns: processor minutes of one thread; `loss`, the denoising error of the averaged weights on the validation
split at eight fixed noise levels, in units of EDM's c_out, comparable between all RGBA rows of one size; KID against
the test split, share of colours, shapes and types read back (relative to real pictures) for unseen combinations, and
`copy_rate`, from N pictures at guidance scale 3 in 16 steps. Pictures without alpha are cut out of their white ground
first (`cut_matte`, chapter 01); their loss is that of other pictures, and left out.
"""

import json
import math
import re
import shutil
import tempfile
import time
from pathlib import Path

import torch
from fastcore.script import call_parse

from pokemon_nb.captioning import TextEncoder, embed_captions
from PIL import Image

from pokemon_nb.data import PokemonDataset, cut_matte, to_tensor, write_atomic
from pokemon_nb.ddpm import denoising_loss, load_pipeline
from pokemon_nb.sampling import Denoiser, EDMSchedule, Preconditioner
from pokemon_nb.metrics import Judge, attributes, copy_rate, draw, features, kid, load_reader, unseen_prompts
from pokemon_nb.train import resolve_config, train

RECIPE = {
    "data.size": 32,
    "data.recolour": 0.5,
    "model": "small",
    "optimizer": "muon",
    "training_params.lr": 0.002,
    "training_params.decay": 0.5,
    "training_params.log_every": 100,
    "training_params.grid_prompts": 1,
    "wandb": "disabled",
}
ROWS = {
    "recipe": {},
    "optimizer: AdamW, rate 0.001": {"optimizer": "adamw", "training_params.lr": 0.001},
    "optimizer: Muon, rate 0.001": {"training_params.lr": 0.001},
    "rate: constant": {"training_params.decay": 0.0},
    "EMA: half-life 2,000": {"training_params.ema_halflife": 2000},
    "EMA: half-life up to a fifth of the run": {"training_params.ema_rampup": 0.2},
    "prediction: eps": {"diffusion.prediction": "eps"},
    "prediction: v": {"diffusion.prediction": "v"},
    "noise: EDM's own (-1.2, 1.2)": {"diffusion.p_mean": -1.2, "diffusion.p_std": 1.2},
    "noise: higher (0.4, 1.2)": {"diffusion.p_mean": 0.4, "diffusion.p_std": 1.2},
    "augmentation: none": {"data.augment": False},
    "augmentation: no other coats": {"data.recolour": 0.0},
    "captions: never dropped": {"training_params.caption_dropout": 0.0},
    "picture: RGB on white": {"data.channels": 3, "data.recolour": 0.0},
    "equal minutes: twice as wide": {"model": "wide"},
    "equal minutes: 64 px in one stage": {"model": "fast", "data.size": 64},
    "equal minutes: 64 px through a codec": {"model": "latent", "diffusion": "latent", "data.size": 64},
}


@torch.no_grad()
def fixed_loss(pipe, data: str) -> float:
    "Denoising error on the validation split at eight fixed noise levels, with fixed noise; NaN for latents."
    if pipe.codec or pipe.channels != 4:
        return float("nan")
    val, g = PokemonDataset(data, "val", pipe.config.sample_size), torch.Generator().manual_seed(0)
    x0, text = val.batch(range(len(val))), embed_captions(val.records, TextEncoder("minilm"))[:, 0]
    denoise, unit = Denoiser(pipe.unet, pipe.scheduler.precondition), Preconditioner("edm", 0.7)
    total = 0.0
    for sigma in EDMSchedule().training_sigmas((torch.arange(8) + 0.5) / 8):
        eps, level = torch.randn(x0.shape, generator=g), sigma.expand(len(x0))
        error = denoising_loss(denoise, x0, level, eps, text) * denoise.precondition(level)[1] ** 2
        total += (error / unit(level)[1] ** 2).mean().item() / 8
    return total


def with_alpha(x: torch.Tensor) -> torch.Tensor:
    "(N,3,S,S) pictures on white as (N,4,S,S), both in [-1,1]; RGBA is returned as it is."
    if x.shape[1] == 4:
        return x
    levels = ((x + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    cut = [to_tensor(cut_matte(Image.fromarray(a).convert("RGBA")), x.shape[-1]) for a in levels]
    return torch.stack(cut).float() / 127.5 - 1


def judge_run(run: Path, data: str, n: int) -> dict:
    "The figures of a row."
    pipe = load_pipeline(run, "cpu")
    judge, settings = Judge(data, load_reader(), pipe.config.sample_size, rounds=2), {"guidance_scale": 3.0}
    captions = [r["text"] for r in judge.records["test"]]
    x = draw(pipe, [captions[i % len(captions)] for i in range(n)], num_inference_steps=16, **settings)
    asked = unseen_prompts(judge.records["train"], n)
    y = draw(pipe, [w.prompt for w in asked], num_inference_steps=16, **settings)
    x, y = with_alpha(x), with_alpha(y)
    read = judge.faithfulness(y, attributes([w.record() for w in asked]))
    return {
        "loss": fixed_loss(pipe, data),
        "kid": float(kid(features(judge.net, x), judge.features["test"])),
        **{k: read[k].value for k in ("colour", "shape", "type")},
        "copy_rate": copy_rate(judge.detector, x).value,
    }


def minutes_of(data: str, steps: int, settings: dict, run: Path) -> float:
    "Train, and return the processor minutes that it took; sentence vectors are made once for all runs, unpaid."
    cache = Path(tempfile.gettempdir()) / "pokemon_nb-recipe-cache"
    if cache.is_dir():
        shutil.copytree(cache, run / "cache", dirs_exist_ok=True)
    elif steps > 1:
        with tempfile.TemporaryDirectory() as d:
            minutes_of(data, 1, settings, Path(d))
        return minutes_of(data, steps, settings, run)
    start = time.process_time()
    train(resolve_config(data, steps, 32, 0, str(run), settings | {"training_params.val_every": steps}))
    used = (time.process_time() - start) / 60
    shutil.copytree(run / "cache", cache, dirs_exist_ok=True)
    return used


def steps_in(minutes: float, data: str, settings: dict) -> int:
    "How many steps fit, from two short runs: the difference is the price of a step."
    with tempfile.TemporaryDirectory() as d:
        short, longer = (minutes_of(data, n, settings, Path(d) / str(n)) for n in (40, 120))
    step = (longer - short) / 80
    return int((minutes - short) / step) + 40


@call_parse
def main(
    data: str,  # captioned dataset folder
    out: str = "runs/recipe",  # one run folder a row, and recipe.json
    only: str = "",  # rows whose name contains this
    steps: int = 800,  # optimizer steps of 32 pictures
    n: int = 300,  # pictures to judge
    codec: str = "",  # codec of the row that draws latents; empty = without that row
):
    "Train and judge the rows that are missing, then print the table."
    torch.set_num_threads(1)
    file = Path(out) / "recipe.json"
    rows = json.loads(file.read_text()) if file.exists() else {}
    for name, change in ROWS.items():
        latents = change.get("model") == "latent"
        wanted = only in name or (name == "recipe" and "minutes" in only)
        if name in rows or not wanted or (latents and not codec):
            continue
        settings, many = RECIPE | change | ({"model.codec": codec} if latents else {}), steps
        if name.startswith("equal minutes"):
            many = steps_in(rows["recipe"]["minutes"], data, settings)
        run = Path(out) / re.sub(r"[^a-zA-Z0-9.]+", "-", name)
        used = minutes_of(data, many, settings, run)
        rows[name] = {"images": many * 32, "minutes": used} | judge_run(run, data, n)
        write_atomic(file, json.dumps(rows, indent=1) + "\n")
    heads = ["images", "minutes", "loss", "kid", "colour", "shape", "type", "copy_rate"]
    form = {"images": "{:,.0f}", "minutes": "{:.1f}", "loss": "{:.4f}", "kid": "{:.4f}"}
    print(f"| one change | {' | '.join(heads)} |\n| --- |{' --- |' * len(heads)}")
    for name in (k for k in ROWS if k in rows):
        cells = ["" if math.isnan(v := rows[name][h]) else form.get(h, "{:.2f}").format(v) for h in heads]
        print(f"| {name} | {' | '.join(cells)} |")
