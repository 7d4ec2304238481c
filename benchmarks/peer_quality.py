"""Quality after equal minutes: a checkpoint of ours beside two peers trained on the same pictures, judged by one judge.

    python benchmarks/peer_quality.py DATA --minutes 30 --out runs/peers        # train both peers, 30 minutes each
    python benchmarks/peer_quality.py DATA --out runs/peers --judge runs/ours   # draw and judge all three

DATA is a captioned dataset folder; only its training split is learned from, and `--judge` compares with its test split.
The peers get the tensors that our training gets (64 px, premultiplied RGBA) and, apart from four channels and a width
that two cores can train, their own examples' recipe:

- denoising_diffusion_pytorch: README's `Trainer`: batch 32, two batches a step, Adam (0.9, 0.99) at 8e-5, v-prediction
  with the sigmoid schedule, gradient norm 1, EMA 0.995 every 10 steps, mirrored pictures. Drawn by its own DDIM.
- diffusers `UNet2DConditionModel`: train_text_to_image.py: batch 16, AdamW at 1e-4 after 500 steps of warm-up,
  eps-prediction, gradient norm 1, EMA, mirrored pictures; one MiniLM vector as the text. Drawn by DDIMScheduler.

Minutes are processor minutes of one thread, so that two runs side by side do not cheat each other. A killed training
starts again; a finished one is not repeated.
"""

import json
import time
from pathlib import Path

import torch
from fastcore.script import call_parse
from peers import conditional_unet, ddp_diffusion
from tqdm import tqdm

from pokemon_nb.captioning import TextEncoder, embed_captions
from pokemon_nb.data import PokemonDataset, from_tensor, image_grid, write_atomic
from pokemon_nb.ddpm import load_pipeline
from pokemon_nb.metrics import Judge, draw, load_reader, plain, table


def budget(minutes: float, label: str):
    "Yield step numbers until this process has computed for so many minutes."
    start, step, bar = time.process_time(), 0, tqdm(total=minutes, unit="min", desc=label)
    while (used := (time.process_time() - start) / 60) < minutes:
        bar.update(used - bar.n)
        yield step
        step += 1
    bar.close()


def mirrored(x: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    "Every second picture the other way round."
    return torch.where(torch.rand(len(x), 1, 1, 1, generator=g) < 0.5, x.flip(-1), x)


def train_ddp(x0: torch.Tensor, text: torch.Tensor, minutes: float, seed: int) -> tuple[dict, int]:
    "denoising_diffusion_pytorch by its README; returns the averaged weights and the images seen."
    from ema_pytorch import EMA

    torch.manual_seed(seed)
    g, model = torch.Generator().manual_seed(seed), ddp_diffusion()
    opt, ema = torch.optim.Adam(model.parameters(), 8e-5, (0.9, 0.99)), EMA(model, beta=0.995, update_every=10)
    images = 0
    for _ in budget(minutes, "denoising_diffusion_pytorch"):
        for _ in range(2):
            i = torch.randint(len(x0), (32,), generator=g)
            (model((mirrored(x0[i], g) + 1) / 2) / 2).backward()
            images += 32
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
        ema.update()
    return ema.ema_model.state_dict(), images


def train_conditional(x0: torch.Tensor, text: torch.Tensor, minutes: float, seed: int) -> tuple[dict, int]:
    "UNet2DConditionModel by diffusers' text-to-image example; returns the averaged weights and the images seen."
    from diffusers import DDPMScheduler
    from diffusers.training_utils import EMAModel

    torch.manual_seed(seed)
    g, model, noise = torch.Generator().manual_seed(seed), conditional_unet(), DDPMScheduler()
    opt, ema = torch.optim.AdamW(model.parameters(), 1e-4), EMAModel(model.parameters())
    warm = torch.optim.lr_scheduler.LambdaLR(opt, lambda s: min(1.0, (s + 1) / 500))
    images = 0
    for _ in budget(minutes, "diffusers UNet2DConditionModel"):
        i = torch.randint(len(x0), (16,), generator=g)
        t, eps = torch.randint(1000, (16,), generator=g), torch.randn(16, *x0.shape[1:], generator=g)
        noisy = noise.add_noise(mirrored(x0[i], g), eps, t)
        torch.nn.functional.mse_loss(model(noisy, t, text[i][:, None]).sample, eps).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        warm.step()
        opt.zero_grad()
        ema.step(model.parameters())
        images += 16
    ema.copy_to(model.parameters())
    return model.state_dict(), images


def draw_ddp(state: dict, text: torch.Tensor, steps: int, seed: int) -> torch.Tensor:
    "Pictures by its own sampler; the words are not used, it has no place for them."
    model = ddp_diffusion(steps)
    model.load_state_dict(state)
    torch.manual_seed(seed)
    model.eval()
    batches = tqdm(text.split(16), desc="drawing")
    return torch.cat([model.sample(batch_size=len(b)) for b in batches]) * 2 - 1


@torch.inference_mode()
def draw_conditional(state: dict, text: torch.Tensor, steps: int, seed: int) -> torch.Tensor:
    "Pictures by DDIM, one call a step (no guidance)."
    from diffusers import DDIMScheduler

    model, scheduler = conditional_unet().eval(), DDIMScheduler()
    model.load_state_dict(state)
    scheduler.set_timesteps(steps)
    g, out = torch.Generator().manual_seed(seed), []
    for words in tqdm(text.split(16), desc="drawing"):
        x = torch.randn(len(words), 4, 64, 64, generator=g)
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t, words[:, None]).sample, t, x).prev_sample
        out.append(x.clamp(-1, 1))
    return torch.cat(out)


PEERS = {
    "denoising_diffusion_pytorch": (train_ddp, draw_ddp),
    "diffusers UNet2DConditionModel": (train_conditional, draw_conditional),
}


@call_parse
def main(
    data: str,  # captioned dataset folder
    out: str = "runs/peers",  # weights, pictures and figures
    minutes: float = 30.0,  # processor minutes of training for each peer
    only: str = "",  # train this peer only (a part of its name)
    judge: str = "",  # run or checkpoint of ours: draw with all three and judge
    n: int = 1000,  # pictures of ours
    peer_n: int = 128,  # pictures of each peer, which takes seconds for each
    steps: int = 25,  # the peers' DDIM steps
    seed: int = 0,  # of training and drawing
):
    "Train the peers, or judge."
    torch.set_num_threads(1)
    folder, ds = Path(out), PokemonDataset(data, "train", 64)
    folder.mkdir(parents=True, exist_ok=True)
    x0, encoder = ds.batch(range(len(ds))), TextEncoder("minilm")
    for name, (train, _) in PEERS.items():
        file = folder / f"{name.split()[0]}.pt"
        if only in name and not judge and not file.exists():
            state, images = train(x0, embed_captions(ds.records, encoder)[:, 0], minutes, seed)
            torch.save({"state": state, "images": images, "minutes": minutes}, file.with_suffix(".part"))
            file.with_suffix(".part").replace(file)
            print(f"{name}: {images} images in {minutes:g} minutes -> {file}")
    if not judge:
        return
    judges, rows, notes, sheet = Judge(data, load_reader(), 64), {}, {}, []
    captions = [r["text"] for r in judges.records["test"]]
    words = encoder([captions[i % len(captions)] for i in range(peer_n)])
    for name, (_, sample) in PEERS.items():
        kept = torch.load(folder / f"{name.split()[0]}.pt")
        x = sample(kept["state"], words, steps, seed)
        name = f"{name}, {kept['minutes']:g} min, {kept['images']} images, DDIM-{steps}, n={peer_n}"
        rows[name], sheet = judges.likeness(x), sheet + [from_tensor(i) for i in x[:16]]
    pipe = load_pipeline(judge, "cpu")
    x = draw(pipe, [captions[i % len(captions)] for i in range(n)], seed)
    rows[f"pokemon_nb, {pipe.config.training}, n={n}"] = judges.likeness(x)
    rows |= judges.references(n, seed)
    sheet += [from_tensor(i) for i in x[:16]]
    image_grid(sheet, cols=16, size=64).save(folder / "sheet.png")
    print(table(rows))
    notes = {"rows": plain(rows), "peer_n": peer_n, "steps": steps, "seed": seed}
    print(write_atomic(folder / "peers.json", json.dumps(notes, indent=1) + "\n"))
