"""What every technique of chapter 07 gains and costs, and a picture beside those of three peers. Idle cores wanted.

    python benchmarks/runtime.py                                   # times: a network call, a picture, batch, side
    python benchmarks/runtime.py --data DATA --n 1000              # and KID, faithfulness on the same seeds (minutes)
    python benchmarks/runtime.py --part peers                      # a picture against peers' DDIM-50 (minutes)

Variants take turns and are compared within a round (chapter 06); the first one is the baseline and runs twice, as a
check that "no difference" is printed for no difference. What is not installed (openvino, nncf, torchao) is named and
left out. Folders of variants are made once, under --out. `error` is the
norm of a network answer's difference to the baseline over the norm of the answer, mean over the calls of 8 guided
pictures; `pixel` is the largest difference of a pixel of those pictures, in levels of 255.
"""

import json
import math
from itertools import count
from pathlib import Path

import torch
from fastcore.script import call_parse

import pokemon_nb
from pokemon_nb.data import write_atomic
from pokemon_nb.ddpm import load_pipeline
from pokemon_nb.profiling import compare, count_work, measure_peaks, table, utilisation
from pokemon_nb.quantization import PROMPTS, TECHNIQUES, load_runtime, openvino_core, watch, why_not
from pokemon_nb.sampling import native_bf16

SHIPPED = Path(pokemon_nb.__file__).parent / "weights/pokemon-64"
# row -> (technique that makes its checkpoint, runtime)
ROWS = {
    "PyTorch float32": ("", "torch"),
    "PyTorch float32 again": ("", "torch"),
    "PyTorch bfloat16": ("bf16", "torch"),
    "machine code": ("compiled", "compiled"),
    "torchao int8": ("", "torchao"),
    "ONNX Runtime": ("", "onnxruntime"),
    "OpenVINO": ("", "openvino"),
    "OpenVINO bfloat16": ("", "openvino-bf16"),
    "ONNX Runtime int8": ("int8", "onnxruntime"),
    "OpenVINO int8": ("int8", "openvino"),
    "OpenVINO int8, the rest in bfloat16": ("int8", "openvino-bf16"),
}


def with_torchao(folder: Path):
    "PyTorch with torchao's dynamic int8, which knows linear layers only."
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    pipe = load_runtime(folder, "torch", "cpu")
    quantize_(pipe.unet, Int8DynamicActivationInt8WeightConfig())
    return pipe


def variants(checkpoint: Path, out: Path, pruned: str) -> dict:
    "Pipelines to be compared; a technique that cannot be used here is named and left out."
    pipes, rows = {}, dict(ROWS)
    if pruned:
        rows |= {"pruned, PyTorch": (pruned, "torch"), "pruned, ONNX Runtime": (pruned, "onnxruntime")}
    for name, (technique, runtime) in rows.items():
        folder = Path(technique) if technique == pruned and pruned else out / technique if technique else checkpoint
        try:
            if technique in TECHNIQUES and not folder.exists():
                out.mkdir(parents=True, exist_ok=True)
                TECHNIQUES[technique](checkpoint, folder)
            if technique == pruned and pruned and why_not(folder, "onnxruntime"):
                TECHNIQUES["onnx"](folder)
            pipes[name] = with_torchao(folder) if runtime == "torchao" else load_runtime(folder, runtime, "cpu")
            pipes[name].folder = folder
        except (ValueError, RuntimeError, ModuleNotFoundError) as e:
            print(f"left out: {name}: {e}")
    return pipes


def weights(folder: Path) -> float:
    "MiB of the networks' weights."
    return sum(f.stat().st_size for f in folder.rglob("diffusion_pytorch_model.safetensors")) / 2**20


def differences(pipes: dict) -> dict[str, dict]:
    "How far answers and pictures are from the baseline's."
    base, rows = next(iter(pipes.values())), {}
    calls = watch(load_pipeline(base.folder, "cpu"), PROMPTS[:4], 2)
    ask = [tuple(torch.from_numpy(a) for a in args) for args in calls["unet"]]
    draw = lambda pipe: pipe(list(PROMPTS[:8]), seed=0, output_type="pt").images  # noqa: E731
    with torch.inference_mode():
        answers, pictures = [base.unet(*a) for a in ask], draw(base)
        for name, pipe in pipes.items():
            off = [((pipe.unet(*a) - b).norm() / b.norm()).item() for a, b in zip(ask, answers)]
            rows[name] = {
                "MiB weights": weights(pipe.folder),
                "error": sum(off) / len(off),
                "pixel": (draw(pipe) - pictures).abs().max().item() * 255 / 2,
            }
    return rows


def quality(pipes: dict, costs: dict, data: str, n: int, file: Path) -> dict[str, dict]:
    "KID and what is read back on the same seeds (kept in a file); pictures equal to the baseline's need no judge."
    from pokemon_nb.metrics import Judge, attributes, copy_rate, draw, features, kid, load_reader, unseen_prompts

    rows = json.loads(file.read_text()) if file.exists() else {}
    judge = Judge(data, load_reader(), next(iter(pipes.values())).config.sample_size)
    test = [r["text"] for r in judge.records["test"]]
    captions, asked = [test[i % len(test)] for i in range(n)], unseen_prompts(judge.records["train"], 300)
    for name, pipe in pipes.items():
        if name in rows:
            continue
        if rows and costs[name]["pixel"] < 1:
            rows[name] = rows[next(iter(pipes))]
            continue
        pictures = draw(pipe, captions)
        read = judge.faithfulness(draw(pipe, [w.prompt for w in asked]), attributes([w.record() for w in asked]))
        rows[name] = {
            "KID": float(kid(features(judge.net, pictures), judge.features["test"])),
            "colour": float(read["colour"].value),
            "shape": float(read["shape"].value),
            "copies": float(copy_rate(judge.detector, pictures).value),
        }
        write_atomic(file, json.dumps(rows, indent=1) + "\n")
    return rows


def exponent(x: list[float], y: list[float]) -> float:
    "Slope of a straight line through log-log points (least squares)."
    u, v = [math.log(k) for k in x], [math.log(k) for k in y]
    mu, mv = sum(u) / len(u), sum(v) / len(v)
    return sum((a - mu) * (b - mv) for a, b in zip(u, v)) / sum((a - mu) ** 2 for a in u)


def scaling(pipe, file: Path, rounds: int):
    "Time against batch and against side of the picture, with fitted exponents, as a plot."
    from matplotlib.figure import Figure

    fig = Figure(figsize=(7, 2.8), layout="constrained")
    axes, words = fig.subplots(1, 2), torch.nn.functional.normalize(torch.randn(64, pipe.unet.config.text_dim), dim=1)
    channels, side = pipe.unet.config.in_channels, pipe.config.sample_size // pipe.factor

    def call(batch, s):
        args = torch.randn(batch, channels, s, s), torch.zeros(batch), words[:batch]
        return lambda: pipe.unet(*args)

    many = {str(b): call(b, side) for b in (1, 2, 4, 8, 16)}
    sides = {str(s): (lambda s=s: pipe("a red bird", seed=0, size=s, output_type="pt")) for s in (32, 64, 96, 128)}
    with torch.inference_mode():
        for ax, variants, what in ((axes[0], many, "batch of one call"), (axes[1], sides, "side of a picture, px")):
            rows = compare(variants, rounds, rest=0.05)
            x, y = [float(r.name) for r in rows], [1e3 * r.seconds for r in rows]
            k = exponent(x, y)
            ax.plot(x, y, "o-")
            ax.set(xscale="log", yscale="log", xlabel=what, ylabel="ms", title=f"exponent {k:.2f}")
            ax.set_xticks(x, [r.name for r in rows])
            ax.set_yticks(y, [f"{v:.1f}" for v in y])
            ax.minorticks_off()
            print(f"\n{what}: " + ", ".join(f"{a:g}: {b:.1f} ms" for a, b in zip(x, y)) + f"; exponent {k:.2f}")
    fig.savefig(file, dpi=110)


def techniques(checkpoint, data, out, n, pruned, rounds):
    "The tables of one checkpoint."
    pipes = variants(Path(checkpoint) if checkpoint else SHIPPED, out, pruned)
    base, number = next(iter(pipes.values())), count()
    channels, side = base.unet.config.in_channels, base.config.sample_size // base.factor
    args = (
        torch.randn(1, channels, side, side),
        torch.zeros(1),
        torch.nn.functional.normalize(torch.randn(1, base.unet.config.text_dim), dim=1),
    )
    costs = differences(pipes)
    if data and n:
        for name, row in quality(pipes, costs, data, n, out / f"quality-{n}.json").items():
            if name in costs:
                costs[name] |= row
    print(f"{base.describe(base.folder)}, {torch.get_num_threads()} threads\n\none call of the network, batch 1\n")
    with torch.inference_mode():
        rows = compare({k: (lambda p=p: p.unet(*args)) for k, p in pipes.items()}, rounds, rest=0.05)
        peaks, work = measure_peaks(), count_work(lambda: base.unet(*args))
    print(table(rows, costs))
    flops = sum(w.flops for w in work) / 1e9
    print(f"\n{flops:.3f} GFLOP a call; products and convolutions reach {peaks.flops / 1e9:.0f} GFLOP/s, of which")
    for r in rows:
        print(f"  {r.name}: {utilisation(work, r.seconds, peaks):.0%}")
    print("\na guided picture, words of its own included\n")
    pictures = {
        k: (lambda p=p: p(f"a green bug number {next(number)}", seed=next(number), output_type="pt"))
        for k, p in pipes.items()
    }
    print(table(compare(pictures, rounds, rest=0.05), costs))
    fastest = pipes.get("ONNX Runtime", base)
    scaling(fastest, out / "scaling.png", rounds)


def like_for_like(ours, nets: dict, rounds: int, precision: str):
    "One call of each network in the same runtime, OpenVINO, so that only the networks differ."
    import openvino as ov

    options = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
    options["INFERENCE_PRECISION_HINT"] = precision
    latent = torch.randn(1, ours.unet.config.in_channels, *[64 // ours.factor] * 2)
    words = torch.nn.functional.normalize(torch.randn(1, 384), dim=1)
    calls = {"ours": lambda: ours.unet(latent, torch.zeros(1), words)}
    for name, (net, args) in nets.items():
        request = openvino_core().compile_model(ov.convert_model(net, example_input=args), "CPU", options)
        request = request.create_infer_request()
        arrays = [a.numpy() for a in args]
        calls[name] = lambda request=request, arrays=arrays: request.infer(arrays)
    print(f"one call of each network in OpenVINO, {precision}, {torch.get_num_threads()} threads\n")
    print(table(compare(calls, rounds, rest=0.05)), "\n")


def peers(checkpoint, rounds, calls_only):
    "One picture: ours with the fastest runtime, theirs as their examples draw, DDIM-50 in eager float32."
    from diffusers import DDIMScheduler
    from peers import conditional_unet, ddp_diffusion, unet2d

    ours = load_runtime(checkpoint or SHIPPED, "auto", "cpu")
    torch.manual_seed(0)
    ddp, plain, cond = ddp_diffusion(50).eval(), unet2d().eval(), conditional_unet().eval()
    level = torch.zeros(1).long()
    theirs = {
        "denoising_diffusion_pytorch": (ddp.model, (torch.randn(1, 4, 64, 64), level)),
        "diffusers UNet2DModel": (plain, (torch.randn(1, 3, 64, 64), level)),
        "diffusers UNet2DConditionModel": (cond, (torch.randn(1, 4, 64, 64), level, torch.randn(1, 1, 384))),
    }
    for runtime, precision in [("openvino", "f32")] + [("openvino-bf16", "bf16")] * native_bf16():
        like_for_like(load_runtime(checkpoint or SHIPPED, runtime, "cpu"), theirs, max(rounds, 15), precision)
    if calls_only:
        return
    ddim = DDIMScheduler()
    ddim.set_timesteps(50)
    words = torch.nn.functional.normalize(torch.randn(1, 1, 384), dim=2)

    def walk(net, channels, guided):
        x = torch.randn(1, channels, 64, 64)
        for t in ddim.timesteps:
            if guided:
                text = torch.cat([torch.zeros_like(words), words])
                a, b = net(torch.cat([x, x]), t, encoder_hidden_states=text).sample.chunk(2)
                eps = a + 2.5 * (b - a)
            else:
                eps = net(x, t).sample
            x = ddim.step(eps, t, x).prev_sample

    number = count()
    own = ours.settings()

    def picture(**kw):
        k = next(number)
        return ours(f"a green bug number {k}", seed=k, output_type="pt", **kw)

    unguided = {
        f"ours, {own['steps']} steps, unguided ({ours.runtime})": lambda: picture(guidance_scale=1.0),
        "denoising_diffusion_pytorch, DDIM-50": lambda: ddp.sample(batch_size=1),
        "diffusers UNet2DModel, DDIM-50": lambda: walk(plain, 3, False),
    }
    guided = {
        f"ours, {picture().nfe:g} calls, guided, from text ({ours.runtime})": picture,
        "diffusers UNet2DConditionModel, guided DDIM-50": lambda: walk(cond, 4, True),
    }
    import contextlib
    import io

    with torch.inference_mode(), contextlib.redirect_stderr(io.StringIO()):
        first, second = compare(unguided, rounds, 1), compare(guided, max(3, rounds // 3), 1)
        x, level, w = torch.randn(1, 4, 64, 64), torch.zeros(1), words[0]
        latent = torch.randn(1, ours.unet.config.in_channels, *[64 // ours.factor] * 2)
        calls = {
            f"ours, one call ({ours.runtime})": lambda: ours.unet(latent, level, w),
            "denoising_diffusion_pytorch": lambda: ddp.model(x, level.long()),
            "diffusers UNet2DModel": lambda: plain(x[:, :3], 0),
            "diffusers UNet2DConditionModel": lambda: cond(x, 0, encoder_hidden_states=words),
        }
        third = compare(calls, rounds, rest=0.05)
    print(f"{ours.describe('ours')}, {torch.get_num_threads()} threads\n")
    for rows in (first, second, third):
        print(table(rows), "\n")
    for r in first[1:]:
        print(f"against 1,000 steps of {r.name.split(',')[0]} (20 times its 50): {20 / r.ratio:.0f} ×")


@call_parse
def main(
    part: str = "techniques",  # "techniques", "peers" or "calls" (of peers, in the same runtime)
    checkpoint: str = "",  # checkpoint or run folder; empty = the shipped one
    data: str = "",  # captioned dataset folder, for the quality columns
    out: str = "runs/runtime",  # folders of the variants, scaling.png, quality-N.json
    n: int = 0,  # pictures for the quality columns; 0 = without
    pruned: str = "",  # a pruned checkpoint that has been trained on, for two more rows
    rounds: int = 25,  # that count
    threads: int = 0,  # CPU threads; 0 = torch's own choice
):
    "Print the tables."
    if threads:
        torch.set_num_threads(threads)
    if part in ("peers", "calls"):
        peers(checkpoint, min(rounds, 9), part == "calls")
    else:
        techniques(checkpoint, data, Path(out), n, pruned, rounds)
