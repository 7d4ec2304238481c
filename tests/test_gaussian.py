"""Every sampler against the closed-form answer on Gaussian data, on both kinds of schedule."""

import math

import pytest
import torch

from pokemon_nb.sampling import SAMPLERS, BetaSchedule, CountCalls, EDMSchedule, Guided, gaussian_denoiser

C = 0.5


@pytest.mark.parametrize(
    "schedule", [EDMSchedule(), BetaSchedule("linear"), BetaSchedule("cosine")], ids=["edm", "linear", "cosine"]
)
@pytest.mark.parametrize("name,nfe", [("ddim", 240), ("heun", 479), ("dpmpp_2m", 240)])
def test_deterministic_samplers_follow_the_exact_path(schedule, name, nfe):
    sigmas = schedule.sampling_sigmas(240)
    start = torch.linspace(-2, 2, 41, dtype=torch.float64) * sigmas[0]
    exact = start * C / math.sqrt(C**2 + sigmas[0].item() ** 2)
    count = CountCalls(gaussian_denoiser(C))
    error = (SAMPLERS[name](count, start, sigmas) - exact).abs().max().item()
    assert error < (0.015 if name == "ddim" else 0.0015), error
    assert count.nfe(len(start)) == nfe


def test_second_order_quarters_the_error():
    errors = []
    for n in (18, 36, 72):
        sigmas = EDMSchedule(sigma_max=80.0).sampling_sigmas(n)
        start = torch.tensor([80.0], dtype=torch.float64)
        exact = start * C / math.sqrt(C**2 + 80**2)
        errors.append((SAMPLERS["heun"](gaussian_denoiser(C), start, sigmas) - exact).abs().item())
    assert 3 < errors[0] / errors[1] < 5.5 and 3 < errors[1] / errors[2] < 5.5, errors


@pytest.mark.parametrize("schedule", [EDMSchedule(), BetaSchedule("linear")], ids=["edm", "linear"])
def test_ddpm_draws_the_distribution(schedule):
    gen = torch.Generator().manual_seed(0)
    noise = lambda x: torch.randn(x.shape, generator=gen, dtype=torch.float64)
    sigmas = schedule.sampling_sigmas(1000)
    start = noise(torch.empty(50_000)) * sigmas[0]
    x = SAMPLERS["ddpm"](gaussian_denoiser(C, 0.3), start, sigmas, noise=noise)
    assert abs(x.mean().item() - 0.3) < 0.01 and abs(x.std().item() - C) < 0.01


def test_guidance_moves_the_mean_linearly():
    "Two Gaussians with means 0 and 0.4: at scale g the guided path is that of a Gaussian with mean 0.4*g."
    text = torch.ones(1, 8)

    def denoise(x, sigma, words):
        mean = 0.4 * words[:, :1, None, None]
        return mean + (x - mean) * C**2 / (C**2 + sigma**2)

    for scale in (0.0, 1.0, 2.5):
        x = torch.zeros(1, 1, 2, 2)
        out = SAMPLERS["dpmpp_2m"](Guided(denoise, scale), x, EDMSchedule().sampling_sigmas(40), text)
        exact = 0.4 * scale * (1 - C / math.sqrt(C**2 + 40**2))  # started at 0, which is not quite the mean
        torch.testing.assert_close(out, torch.full_like(out, exact), atol=1e-3, rtol=0)
