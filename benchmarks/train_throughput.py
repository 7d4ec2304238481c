"""Training throughput at 64 px, side by side with two peers in one process.

    python benchmarks/train_throughput.py                  # eager, batch 8 and 16
    python benchmarks/train_throughput.py --compile        # torch.compile on both sides as well
    python benchmarks/train_throughput.py --cond           # and diffusers' UNet2DConditionModel, seconds a step

One step is forward, backward and an AdamW update. Steps of all networks alternate, so that a busy moment of the machine
hits everybody; the figure is the median. `share` is achieved FLOP/s over the peak (`measure_peaks`) of the same run, in
the number format of the row. Ratios of our row against a peer's *default* row are what the README states.
"""

import statistics
import time

import torch
import torch.nn.functional as F
from fastcore.script import Param, call_parse, store_true
from peers import conditional_unet, ddp_unet, unet2d
from torch.utils.flop_counter import FlopCounterMode

from pokemon_nb.profiling import measure_peaks
from pokemon_nb.unet import UNet


def flops(net: torch.nn.Module, call) -> int:
    "FLOPs of one call with one picture."
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        call(net, 1)
    return counter.get_total_flops()


def call_ours(net, b: int) -> torch.Tensor:
    "Our network on a random batch of RGBA pictures, with text."
    return net(torch.randn(b, 4, 64, 64), torch.rand(b), F.normalize(torch.randn(b, 384), dim=1))


def call_ddp(net, b: int) -> torch.Tensor:
    "denoising_diffusion_pytorch's network on a random batch of RGB pictures."
    return net(torch.randn(b, 3, 64, 64), torch.randint(1000, (b,)))


def call_unet2d(net, b: int) -> torch.Tensor:
    "diffusers' network on a random batch of RGB pictures."
    return net(torch.randn(b, 3, 64, 64), torch.randint(1000, (b,))).sample


def call_cond(net, b: int) -> torch.Tensor:
    "diffusers' text-conditioned network on a random batch of RGBA pictures, with text."
    words = F.normalize(torch.randn(b, 1, 384), dim=2)
    return net(torch.randn(b, 4, 64, 64), torch.randint(1000, (b,)), encoder_hidden_states=words).sample


class Runner:
    "One network in one setting; `step()` trains it on one batch and returns the seconds it took."

    def __init__(self, name: str, net, call, bf16: bool = False, compiled: bool = False):
        self.name, self.net, self.call, self.bf16 = name, net, call, bf16
        self.fn = torch.compile(net) if compiled else net
        self.opt = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)
        self.gflop = flops(net, call) / 1e9
        self.params = sum(p.numel() for p in net.parameters()) / 1e6

    def step(self, b: int) -> float:
        "Forward, backward, update."
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            out = self.call(self.fn, b)
        out.float().square().mean().backward()
        self.opt.step()
        self.opt.zero_grad()
        return time.perf_counter() - start


def runners(compiled: bool, cond: bool) -> list[Runner]:
    "Every network in its default, and everybody in everybody's best simple setting."
    cl = {"memory_format": torch.channels_last}
    rows = [
        Runner("denoising_diffusion_pytorch fp32 (default)", ddp_unet(), call_ddp),
        Runner("diffusers UNet2DModel fp32 (default)", unet2d(), call_unet2d),
        Runner("pokemon_nb fp32", UNet(), call_ours),
        Runner("denoising_diffusion_pytorch bf16 channels-last", ddp_unet().to(**cl), call_ddp, bf16=True),
        Runner("diffusers UNet2DModel bf16 channels-last", unet2d().to(**cl), call_unet2d, bf16=True),
        Runner("pokemon_nb bf16 (default)", UNet(), call_ours, bf16=True),
    ]
    if cond:
        rows.append(Runner("diffusers UNet2DConditionModel fp32 (default)", conditional_unet(), call_cond))
    if compiled:
        rows += [
            Runner("denoising_diffusion_pytorch bf16 compiled", ddp_unet().to(**cl), call_ddp, True, True),
            Runner("diffusers UNet2DModel bf16 compiled", unet2d().to(**cl), call_unet2d, True, True),
            Runner("pokemon_nb bf16 compiled", UNet(), call_ours, True, True),
        ]
    return rows


@call_parse
def main(
    batch: Param("batch sizes", int, nargs="*") = (8, 16),  # noqa: F821
    steps: int = 9,  # timed steps a row; the median counts
    warmup: int = 2,  # untimed steps a row before
    compile: store_true = False,  # also with torch.compile, on both sides
    cond: store_true = False,  # also diffusers' UNet2DConditionModel in its default
    threads: int = 0,  # CPU threads; 0 = torch's own choice
):
    "Print images per second, ratio to the peers' defaults and share of the peak."
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    peak = {d: measure_peaks(d, 2048).flops for d in (torch.float32, torch.bfloat16)}
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads; peak "
        f"{peak[torch.float32] / 1e9:.0f} GFLOP/s fp32, {peak[torch.bfloat16] / 1e9:.0f} bf16"
    )
    rows = runners(compile, cond)
    for b in batch:
        times = {r.name: [] for r in rows}
        for r in rows:
            for _ in range(warmup):
                r.step(b)
        for _ in range(steps):
            for r in rows:
                times[r.name].append(r.step(b))
        rate = {n: b / statistics.median(t) for n, t in times.items()}
        ddp, u2d = rate[rows[0].name], rate[rows[1].name]
        print(
            f"\nbatch {b:<41} {'M par':>6} {'GFLOP':>6} {'img/s':>7} {'min-max':>13} "
            f"{'x ddp':>6} {'x U2D':>6} {'share':>6}"
        )
        for r in rows:
            v, t = rate[r.name], times[r.name]
            share = 3e9 * r.gflop * v / peak[torch.bfloat16 if r.bf16 else torch.float32]
            print(
                f"{r.name:<47} {r.params:6.1f} {r.gflop:6.2f} {v:7.1f} "
                f"{b / max(t):6.1f}-{b / min(t):<6.1f} {v / ddp:6.2f} {v / u2d:6.2f} {share:6.0%}"
            )
