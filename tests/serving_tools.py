"""What the tests of chapter 08 share: a tiny checkpoint, the command, comparing pictures."""

import io
import socket
import sys
from pathlib import Path

from PIL import Image, ImageChops

SERVE = Path(sys.executable).with_name("pokemon_serve")


def tiny_checkpoint(folder: Path, side: int = 16) -> Path:
    "A run folder with a small untrained network: its pictures are noise, everything around them is real."
    import torch

    from pokemon_nb.ddpm import NoiseProcess, PokemonPipeline
    from pokemon_nb.unet import UNet

    torch.manual_seed(0)
    net = UNet(widths=(64, 128), depths=(1, 1))
    PokemonPipeline(net, NoiseProcess(), sample_size=side, num_inference_steps=3).save_pretrained(
        folder / "tiny/checkpoint"
    )
    return folder / "tiny"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def picture(answer) -> Image.Image:
    "The PNG of an answer."
    assert answer.status_code == 200 and answer.headers["content-type"] == "image/png", answer.text
    return Image.open(io.BytesIO(answer.content))


def apart(a: Image.Image, b: Image.Image) -> int:
    "Largest difference of two pictures as one sees them (colour times alpha), in levels of 256."
    assert a.size == b.size
    difference = ImageChops.difference(a.convert("RGBA").convert("RGBa"), b.convert("RGBA").convert("RGBa"))
    return max(high for _, high in difference.getextrema())
