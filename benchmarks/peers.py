"""The networks that we measure against, at about 8 M parameters and otherwise in their own defaults."""

import contextlib
import importlib.util
import sys
import types

from torch import nn


@contextlib.contextmanager
def empty_torchvision():
    "Stand in for a missing torchvision while a module that never calls it is imported."
    if importlib.util.find_spec("torchvision"):
        yield
        return
    names = ["torchvision", *(f"torchvision.{n}" for n in ("transforms", "utils", "models"))]
    modules = {n: types.ModuleType(n) for n in names}
    for n in names[1:]:
        setattr(modules["torchvision"], n.split(".")[1], modules[n])
    sys.modules.update(modules)
    try:
        yield
    finally:
        for n in names:
            del sys.modules[n]


def ddp_unet(dim: int = 32) -> nn.Module:
    "`Unet` of denoising_diffusion_pytorch; only that package's Trainer and FID use torchvision."
    import diffusers, transformers  # noqa: F401 E401  (they look for torchvision: let them look before the stand-in)

    with empty_torchvision():
        from denoising_diffusion_pytorch.denoising_diffusion_pytorch import Unet
    return Unet(dim=dim)


def unet2d(widths: tuple[int, ...] = (32, 32, 64, 64, 128, 128)) -> nn.Module:
    "diffusers' `UNet2DModel` as in its unconditional training example for 64 px, at a quarter of the width."
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=64,
        block_out_channels=widths,
        layers_per_block=2,
        down_block_types=("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
    )


def ddp_diffusion(sampling_timesteps: int = 50, dim: int = 32) -> nn.Module:
    "`GaussianDiffusion` of denoising_diffusion_pytorch as in its README, with alpha and at half the width."
    import diffusers, transformers  # noqa: F401 E401

    with empty_torchvision():
        from denoising_diffusion_pytorch.denoising_diffusion_pytorch import GaussianDiffusion, Unet
    net = Unet(dim=dim, dim_mults=(1, 2, 4, 8), channels=4)
    return GaussianDiffusion(net, image_size=64, timesteps=1000, sampling_timesteps=sampling_timesteps)


def conditional_unet(widths: tuple[int, ...] = (32, 64, 128, 128)) -> nn.Module:
    "diffusers' `UNet2DConditionModel` with its default blocks at 64 px, one sentence vector as text; 9.4 M parameters."
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=64, in_channels=4, out_channels=4, block_out_channels=widths, cross_attention_dim=384
    )
