"""Quality against network calls: a curve for every sampler, and what the shipped setting gives up against many steps.

    python benchmarks/sampling.py DATA --checkpoint FOLDER --out runs/sampling                 # the curves
    python benchmarks/sampling.py DATA --checkpoint FOLDER --teacher FOLDER --out runs/sampling  # and 50 steps

DATA is a captioned dataset folder. Every point draws the same captions of the test split with the same seeds at the
checkpoint's own guidance scale; KID and FD are against the test split, `calls` counts every call of every network.
A second table changes the guidance scale, and the noise levels at which it acts, at the checkpoint's own sampler and
steps, with the shares of colours, shapes and types that are read back for unseen combinations (relative to real ones).
Points that are already in OUT/sampling.json are not drawn again.
"""

import json
from pathlib import Path

from fastcore.script import call_parse

from pokemon_nb.data import write_atomic
from pokemon_nb.ddpm import load_pipeline
from pokemon_nb.sampling import SAMPLERS
from pokemon_nb.metrics import (
    Judge,
    attributes,
    copy_rate,
    draw,
    features,
    frechet_distance,
    jackknife,
    kid,
    load_reader,
    plain,
    unseen_prompts,
)

STEPS = (2, 3, 4, 5, 6, 8, 16)
GUIDANCE = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
INTERVALS = ((0.2, 1.0), (1.0, 6.0), (0.0, 1e9))


def point(pipe, judge: Judge, captions: list[str], **settings) -> dict:
    "Draw one picture for each caption and measure."
    x = draw(pipe, captions, **settings)
    f, test = features(judge.net, x), judge.features["test"]
    figures = {"kid": jackknife(kid, f, test), "fd": jackknife(frechet_distance, f, test, rounds=20)}
    nfe = pipe(captions[0], seed=0, output_type="pt", **settings).nfe
    return {"calls": nfe} | plain(figures | {"copy_rate": copy_rate(judge.detector, x)})


def guided(pipe, judge: Judge, captions: list[str], scale: float, interval: tuple[float, float]) -> dict:
    "As `point`, and how the prompts are followed."
    pipe.register_to_config(guidance_interval=interval)
    asked = unseen_prompts(judge.records["train"], 300)
    read = judge.faithfulness(
        draw(pipe, [w.prompt for w in asked], guidance_scale=scale), attributes([w.record() for w in asked])
    )
    return point(pipe, judge, captions, guidance_scale=scale) | plain(read)


def curves(rows: dict, file: Path):
    "KID against calls, one line a sampler."
    from matplotlib.figure import Figure

    fig = Figure(figsize=(7, 3.5), layout="constrained")
    ax = fig.subplots()
    for sampler in SAMPLERS:
        points = sorted((r["calls"], *r["kid"]) for k, r in rows.items() if k.startswith(f"{sampler} "))
        if points:
            calls, value, low, high = zip(*points)
            (line,) = ax.plot(calls, value, "o-", ms=3, label=sampler)
            ax.fill_between(calls, low, high, color=line.get_color(), alpha=0.12, lw=0)
    if "teacher" in rows:
        ax.axhline(rows["teacher"]["kid"][0], color="k", ls=":", label=f"teacher, {rows['teacher']['calls']:g} calls")
    ax.set(xscale="log", xlabel="network calls a picture", ylabel="KID against the test split")
    ticks = (2, 3, 5, 7, 10, 15, 25)
    ax.set_xticks(ticks, [str(t) for t in ticks])
    ax.minorticks_off()
    ax.legend(fontsize=8)
    fig.savefig(file, dpi=110)


@call_parse
def main(
    data: str,  # captioned dataset folder
    checkpoint: str = "",  # checkpoint or run folder; empty = newest run, else shipped
    teacher: str = "",  # checkpoint of the undistilled network: drawn in 50 steps
    out: str = "runs/sampling",  # sampling.json and sampling.png
    n: int = 1000,  # pictures a point
    only: str = "",  # "steps" or "guidance": this table only
):
    "Draw what is missing, then print the tables."
    pipe, file = load_pipeline(checkpoint or None, "cpu"), Path(out) / "sampling.json"
    judge = Judge(data, load_reader(), pipe.config.sample_size)
    test = [r["text"] for r in judge.records["test"]]
    captions = [test[i % len(test)] for i in range(n)]
    rows = json.loads(file.read_text()) if file.exists() else {}
    for sampler in SAMPLERS if only != "guidance" else ():
        for steps in STEPS:
            key = f"{sampler} {steps}"
            if key not in rows and not (sampler == "heun" and steps > 8):
                rows[key] = point(pipe, judge, captions, sampler=sampler, num_inference_steps=steps)
                write_atomic(file, json.dumps(rows, indent=1) + "\n")
    if teacher and "teacher" not in rows:
        rows["teacher"] = point(load_pipeline(teacher, "cpu"), judge, captions, num_inference_steps=50)
        write_atomic(file, json.dumps(rows, indent=1) + "\n")
    always, own = tuple(pipe.config.guidance_interval), pipe.config.guidance_scale
    for scale, interval in [(g, always) for g in GUIDANCE] + [(own, i) for i in INTERVALS] if only != "steps" else ():
        key = f"guidance {scale:g} at sigma {interval[0]:g} to {interval[1]:g}"
        if key not in rows:
            rows[key] = guided(pipe, judge, captions, scale, interval)
            write_atomic(file, json.dumps(rows, indent=1) + "\n")
    curves(rows, file.with_suffix(".png"))
    heads = ("kid", "fd", "copy_rate", "colour", "pixels", "shape", "type")
    print(f"| setting | calls | {' | '.join(heads)} |\n| --- | --- |{' --- |' * len(heads)}")
    for key, r in rows.items():
        print(f"| {key} | {r['calls']:g} | {' | '.join(f'{r[h][0]:.3f}' if h in r else '' for h in heads)} |")
