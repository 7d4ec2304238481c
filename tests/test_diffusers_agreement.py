"""Our samplers against diffusers' schedulers, on one fixed random network, in double precision."""

import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    HeunDiscreteScheduler,
)

from pokemon_nb.sampling import (
    BetaSchedule,
    CountCalls,
    EDMSchedule,
    Preconditioner,
    make_betas,
    sample_ddim,
    sample_ddpm,
    sample_dpmpp_2m,
    sample_heun,
)

STEPS = 12


@pytest.fixture
def net():
    "A fixed, smooth, nonlinear function of picture and noise level, of output size about 1."
    conv = torch.nn.Conv2d(3, 3, 3, padding=1).double().requires_grad_(False)
    return lambda x, c_noise: torch.tanh(conv(x)) * torch.cos(torch.as_tensor(c_noise, dtype=torch.float64))


@pytest.fixture
def start():
    return torch.randn(2, 3, 8, 8, dtype=torch.float64)


def denoiser(net, precondition):
    "The preconditioned denoiser, without the float32 of `Denoiser`."

    def denoise(x, sigma, text=None):
        c_skip, c_out, c_in, c_noise = precondition(torch.tensor(sigma, dtype=torch.float64))
        return c_skip * x + c_out * net(c_in * x, c_noise)

    return denoise


@pytest.mark.parametrize("kind,theirs", [("linear", "linear"), ("cosine", "squaredcos_cap_v2")])
def test_betas(kind, theirs):
    want = DDPMScheduler(num_train_timesteps=1000, beta_schedule=theirs).betas.double()
    torch.testing.assert_close(
        make_betas(kind), want, atol=2e-6, rtol=2e-4
    )  # theirs are float32 (cosine: computed in Python)


def vp_loop(scheduler, net, x):
    "diffusers' own loop in its own coordinate, with eps-prediction."
    for t in scheduler.timesteps:
        alpha_bar = scheduler.alphas_cumprod[t].double()
        sigma = ((1 - alpha_bar) / alpha_bar).sqrt()
        x = scheduler.step(net(x, sigma.log() / 4), t, x).prev_sample
    return x


def ve_start(x, sigmas):
    "diffusers starts from unit noise; in our coordinate the same picture is larger by sqrt(1+sigma²)."
    return x * math.sqrt(1 + sigmas[0].item() ** 2)


def exact_alphas(scheduler, kind="linear"):
    "Give a scheduler the double-precision table, so that the comparison is of formulas and not of float32."
    scheduler.betas = make_betas(kind)
    scheduler.alphas = 1 - scheduler.betas
    scheduler.alphas_cumprod = scheduler.alphas.cumprod(0)
    scheduler.one = torch.tensor(1.0, dtype=torch.float64)
    if hasattr(scheduler, "final_alpha_cumprod"):
        scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    return scheduler


def test_ddim(net, start):
    steps = 10  # a divisor of 1000: diffusers' DDIM takes t - 1000//n for the next timestep, whatever the spacing says
    scheduler = exact_alphas(DDIMScheduler(clip_sample=False, timestep_spacing="trailing", beta_schedule="linear"))
    scheduler.set_timesteps(steps)
    want = vp_loop(scheduler, net, start)
    sigmas = BetaSchedule("linear").sampling_sigmas(steps)
    count = CountCalls(denoiser(net, Preconditioner("eps")))
    got = sample_ddim(count, ve_start(start, sigmas), sigmas)
    torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-9)
    assert count.nfe(len(start)) == steps


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_ddpm(net, start, kind, monkeypatch):
    scheduler = exact_alphas(
        DDPMScheduler(clip_sample=False, timestep_spacing="trailing", variance_type="fixed_small"), kind
    )
    scheduler.set_timesteps(STEPS)
    noises = torch.randn(STEPS, *start.shape, dtype=torch.float64)
    feed = iter(noises)
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *a, **k: next(feed))
    want = vp_loop(scheduler, net, start)
    sigmas, feed2 = BetaSchedule(kind).sampling_sigmas(STEPS), iter(noises)
    count = CountCalls(denoiser(net, Preconditioner("eps")))
    got = sample_ddpm(count, ve_start(start, sigmas), sigmas, noise=lambda x: next(feed2))
    torch.testing.assert_close(got, want, atol=1e-8, rtol=1e-8)
    assert count.nfe(len(start)) == STEPS


EDM = dict(sigma_min=0.002, sigma_max=40.0, sigma_data=0.7, rho=7.0)


def edm_loop(scheduler, net, x):
    "diffusers' EDM loop: it scales the input and reads the raw output itself."
    scheduler.set_timesteps(STEPS)
    for t in scheduler.timesteps:
        raw = net(scheduler.scale_model_input(x, t), t.double())
        x = scheduler.step(raw, t, x).prev_sample
    return x


def test_edm_levels():
    scheduler = EDMEulerScheduler(**EDM)
    scheduler.set_timesteps(STEPS)
    ours = EDMSchedule(EDM["sigma_min"], EDM["sigma_max"]).sampling_sigmas(STEPS)
    torch.testing.assert_close(ours.float(), scheduler.sigmas, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "scheduler,ours",
    [
        (EDMEulerScheduler(**EDM), sample_ddim),
        (
            EDMDPMSolverMultistepScheduler(
                **EDM, solver_order=2, algorithm_type="dpmsolver++", final_sigmas_type="zero"
            ),
            sample_dpmpp_2m,
        ),
    ],
    ids=["euler=ddim", "dpmpp_2m"],
)
def test_edm_samplers(net, start, scheduler, ours):
    sigmas = EDMSchedule(EDM["sigma_min"], EDM["sigma_max"]).sampling_sigmas(STEPS)
    x = start * EDM["sigma_max"]
    want = edm_loop(scheduler, net, x.clone())
    count = CountCalls(denoiser(net, Preconditioner("edm", EDM["sigma_data"])))
    got = ours(count, x, sigmas)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)  # their levels are float32
    assert count.nfe(len(start)) == STEPS


def test_heun(net, start):
    """diffusers' Heun works on levels of a beta table: give both the same levels and the same network.

    Its last step goes to level 0 by Euler, as ours does, so n levels cost 2n-1 calls.
    """
    scheduler = HeunDiscreteScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02, prediction_type="epsilon")
    scheduler.set_timesteps(STEPS)
    sigmas = torch.cat([scheduler.sigmas[:1], scheduler.sigmas[1:-1:2], scheduler.sigmas[-1:]]).double()
    precondition = Preconditioner("eps")
    x = start * sigmas[0]
    want, calls = x.clone(), 0
    for t in scheduler.timesteps:
        sigma = scheduler.sigmas[scheduler.step_index if scheduler.step_index is not None else 0].double()
        raw = net(want / (1 + sigma**2).sqrt(), sigma.log() / 4)
        want = scheduler.step(raw, t, want).prev_sample
        calls += 1
    count = CountCalls(denoiser(net, precondition))
    got = sample_heun(count, x, sigmas)
    assert count.nfe(len(start)) == calls == 2 * (len(sigmas) - 1) - 1
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_dpmpp_2m_on_beta_levels(net, start):
    "The same solver on the classic table, against diffusers' multistep scheduler in its own coordinate."
    scheduler = DPMSolverMultistepScheduler(
        beta_schedule="linear",
        timestep_spacing="trailing",
        algorithm_type="dpmsolver++",
        solver_order=2,
        final_sigmas_type="zero",
        lower_order_final=True,
    )
    scheduler.set_timesteps(STEPS)
    want = vp_loop(scheduler, net, start)
    sigmas = BetaSchedule("linear").sampling_sigmas(STEPS)
    got = sample_dpmpp_2m(denoiser(net, Preconditioner("eps")), ve_start(start, sigmas), sigmas)
    torch.testing.assert_close(got, want, atol=2e-4, rtol=2e-4)  # their table is float32
