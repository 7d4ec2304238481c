"""Guards for the training chapter: configuration, the papermill job, resume, checkpoints."""

import json
import multiprocessing
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pokemon_nb.ddpm import load_pipeline
from pokemon_nb.train import differences, read_metrics, resolve_config, train

TINY = (
    "model=tiny data.size=16 wandb=disabled training_params.val_every=10 training_params.val_levels=2 "
    "training_params.grid_prompts=2 training_params.log_every=5 diffusion_steps.num_inference_steps=2 "
    "training_params.batch_size=8 data.prompts=['a red creature','a blue fish']"
)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    "A dataset with one caption a picture, so that a run starts at once."
    from pokemon_nb.data import build_dataset, read_metadata, write_atomic, write_manifest

    folder = build_dataset("critters", tmp_path_factory.mktemp("small") / "data", n=60, size=16)
    for split in ("train", "val", "test"):
        rows = [
            r | {"text": f"a {r['colour']} creature", "captions": [f"a {r['colour']} creature"]}
            for r in read_metadata(folder, split)
        ]
        write_atomic(folder / split / "metadata.jsonl", "".join(json.dumps(r, sort_keys=True) + "\n" for r in rows))
    write_manifest(folder)
    return folder


def run_tiny(small, out, steps=20, extra=""):
    return train(resolve_config(str(small), steps=steps, out=str(out), overrides=f"{TINY} {extra}"))


def state_of(run):
    return torch.load(run / "last.ckpt", weights_only=True)


def assert_same(a, b, path="state"):
    "Every tensor and number equal, bit for bit."
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for k in a:
            assert_same(a[k], b[k], f"{path}.{k}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f"{path}[{i}]")
    else:
        assert a == b, f"{path}: {a} != {b}"


# configuration


@pytest.mark.parametrize(
    "overrides,says",
    [
        ("training_params.stepz=3", "stepz"),
        ("optimiser=sgd", "optimiser"),
        ("model=huge", "huge"),
        ("training_params.lr=-1", "training_params.lr must be positive"),
        ("data.size=33", "multiple of 4"),
        ("training_params.caption_dropout=1.5", "[0,1]"),
        ("diffusion_steps.sampler=euler", "ddpm, ddim, heun, dpmpp_2m"),
        ("seed=-1", "seed must be at least 0"),
        ("data.channels=5", "3 (RGB) or 4 (RGBA)"),
        ("wandb=maybe", "wandb must be"),
        ("training_params.steps=many", "many"),
        ("=", "configuration"),
    ],
)
def test_bad_overrides_are_refused_by_name(overrides, says):
    with pytest.raises(ValueError) as e:
        resolve_config(overrides=overrides)
    assert says in str(e.value)


def test_every_group_file_composes():
    conf = Path(sys.modules["pokemon_nb"].__file__).parent / "conf"
    for path in sorted(conf.glob("*/*.yaml")):
        extra = " data.source=x" if path.stem == "folder" else ""
        cfg = resolve_config(overrides=f"{path.parent.name}={path.stem}{extra}")
        assert cfg.training_params.steps > 0


def test_classic_ddpm_is_one_choice_away():
    cfg = resolve_config(overrides="diffusion=ddpm_linear diffusion_steps=ddpm")
    assert (cfg.diffusion.schedule, cfg.diffusion.prediction, cfg.diffusion.timesteps) == ("linear", "eps", 1000)
    assert (cfg.diffusion_steps.sampler, cfg.diffusion_steps.num_inference_steps) == ("ddpm", 1000)


# bad input is refused before anything is written


@pytest.mark.parametrize("case", ["missing", "empty", "no_images", "unwritable"])
def test_bad_folders(tmp_path, small, case):
    bad = tmp_path / "bad"
    if case != "missing":
        bad.mkdir()
    if case == "no_images":
        (bad / "notes.txt").write_text("no pictures here")
    out = tmp_path / "run"
    if case == "unwritable":
        out.write_text("a file where the run folder should be")
    with pytest.raises((ValueError, OSError)) as e:
        run_tiny(small if case == "unwritable" else bad, out)
    assert str(out if case == "unwritable" else bad) in str(e.value)
    assert case == "unwritable" or not out.exists()


# a run


@pytest.mark.parametrize(
    "extra",
    ["", "diffusion=ddpm_cosine optimizer=sgd training_params.lr=0.01", "data.channels=3 diffusion.prediction=v"],
    ids=["edm", "classic+sgd", "rgb+v"],
)
def test_a_run_leaves_a_complete_folder(tmp_path, small, extra):
    run = run_tiny(small, tmp_path / "run", extra=extra)
    for name in (
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "last.ckpt",
        "loss.png",
        "grid.png",
        "samples/step_000020.png",
        "checkpoint/model_index.json",
        "checkpoint/README.md",
        "checkpoint/metrics.json",
    ):
        assert (run / name).is_file(), name
    rows = read_metrics(run / "metrics.jsonl")
    assert [r["step"] for r in rows if "train_loss" in r] == [5, 10, 15, 20]
    assert [r["step"] for r in rows if "val_loss" in r] == [10, 20]
    env = json.loads((run / "environment.json").read_text())
    assert env["data_sha256"] and env["versions"]["torch"] and env["device"] == "cpu"
    card, metrics = (
        (run / "checkpoint/README.md").read_text(),
        json.loads((run / "checkpoint/metrics.json").read_text()),
    )
    assert f"{metrics['val_loss']:.4f}" in card and metrics["step"] == 20
    assert not list(run.rglob("*.part")) and not list(run.glob(".checkpoint*"))
    image = load_pipeline(run)("a red creature", seed=1).images[0]
    assert image.mode == ("RGB" if "channels=3" in extra else "RGBA") and image.size == (16, 16)


def test_the_last_steps_are_validated_too(tmp_path, small):
    run = run_tiny(small, tmp_path / "run", steps=14)
    assert [r["step"] for r in read_metrics(run / "metrics.jsonl") if "val_loss" in r] == [10, 14]
    assert state_of(run)["global_step"] == 14


def test_another_configuration_may_not_enter_a_run(tmp_path, small):
    run = run_tiny(small, tmp_path / "run", steps=10)
    with pytest.raises(ValueError, match="training_params.lr: .* -> 0.5"):
        run_tiny(small, run, steps=20, extra="training_params.lr=0.5")
    assert state_of(run)["global_step"] == 10


@pytest.mark.parametrize("extra", ["", "optimizer=muon training_params.lr=0.002"], ids=["adamw", "muon"])
def test_going_on_equals_never_stopping(tmp_path, small, extra):
    whole = run_tiny(small, tmp_path / "whole", 30, extra)
    run_tiny(small, tmp_path / "parts", 10, extra)
    parts = run_tiny(small, tmp_path / "parts", 30, extra)
    a, b = state_of(whole), state_of(parts)
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
        assert_same(a[key], b[key], key)
    assert (whole / "metrics.jsonl").read_bytes() == (parts / "metrics.jsonl").read_bytes()


def test_a_run_killed_after_its_last_needed_state_is_completed(tmp_path, small):
    "Asked for no more steps than are saved, it drops the rows that lead further and finishes."
    run = run_tiny(small, tmp_path / "run", steps=20)
    with (run / "metrics.jsonl").open("a") as f:
        f.write('{"step": 25, "images": 200, "train_loss": 0.5}\n')
    (run / "grid.png").unlink()
    run_tiny(small, run, steps=20)
    assert read_metrics(run / "metrics.jsonl")[-1]["step"] == 20 and (run / "grid.png").is_file()


def test_the_average_stays_outside_the_graph(tmp_path, small, monkeypatch):
    "An update with gradients on would chain every step to the one before, and memory would grow."
    from pokemon_nb import train as chapter

    kept = []
    monkeypatch.setattr(chapter, "finish", lambda *a: None)
    fit = chapter.fit
    monkeypatch.setattr(chapter, "fit", lambda cfg, run, module, *a: (kept.append(module), fit(cfg, run, module, *a)))
    run_tiny(small, tmp_path / "run", steps=10)
    assert all(p.is_leaf and not p.requires_grad for p in kept[0].ema.parameters())


def test_the_rate_falls_at_the_end(tmp_path, small):
    run = run_tiny(small, tmp_path / "run", 20, "training_params.decay=0.5 training_params.warmup=2")
    rates = [r["lr"] for r in read_metrics(run / "metrics.jsonl") if "lr" in r]
    assert rates == pytest.approx([1e-3, 1e-3, 5e-4, 1e-6], rel=0.21)


def test_muon_moves_matrices_by_orthogonal_steps(small):
    "Every update of a convolution inside the network has about equal singular values; the gradient has not."
    from pokemon_nb.train import MuonAdamW, split_matrices
    from pokemon_nb.unet import UNet

    torch.manual_seed(0)
    net = UNet(widths=(64,), depths=(1,))
    matrices, others = split_matrices(net)
    assert len(matrices) + len(others) == len(list(net.parameters()))
    assert {id(p) for p in matrices} & {id(net.stem.weight), id(net.head.weight)} == set()
    opt, before = MuonAdamW(matrices, others, 1e-3, (0.9, 0.99), 0.95, 0.0), [p.detach().clone() for p in matrices]
    for p in net.parameters():
        p.grad = torch.randn_like(p) * torch.logspace(0, -3, len(p)).view(-1, *[1] * (p.ndim - 1))
    opt.step()
    for old, p in zip(before, matrices):
        spread = torch.linalg.svdvals((old - p.detach()).flatten(1))
        assert spread[0] / spread[len(spread) // 2] < 3


def test_a_run_from_before_a_setting_existed_goes_on(tmp_path, small):
    run = run_tiny(small, tmp_path / "run", 10)
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text("".join(line for line in text.splitlines(True) if "decay: 0.0" not in line))
    assert state_of(run_tiny(small, run, 20))["global_step"] == 20


def test_differences():
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4}) == ["a.c: 2 -> 3", "d: None -> 4"]


# the same run from outside


def shell(*args, **kw):
    return subprocess.run([str(a) for a in args], capture_output=True, text=True, timeout=300, **kw)


@pytest.mark.slow
def test_papermill_parameters_change_the_run_and_equal_the_cli(root, small, tmp_path):
    "Fails when the `parameters` tag is lost: papermill then only warns, and the notebook's defaults win."
    tools, cli, out, nb = Path(sys.executable).parent, tmp_path / "cli", tmp_path / "p", tmp_path / "p.ipynb"
    prompts = "data.prompts=['a red creature','a blue fish']"
    asked = ["--data", small, "--steps", 20, "--seed", 3, "--out", cli]
    done = shell(tools / "pokemon_train", *asked, *TINY.split(" ", 9)[:9], prompts)
    assert done.returncode == 0, done.stderr
    assert "device cpu" in done.stdout and "data " in done.stdout

    # some come from a file, some from the command line, which wins: `steps` is in both
    yaml = tmp_path / "params.yaml"
    yaml.write_text(f'out: {out}\nsteps: 10\nseed: 3\noverrides: "{TINY}"\n')
    given = ["-f", yaml, "-p", "data", small, "-p", "steps", 20, "-p", "batch_size", 8]
    done = shell(
        tools / "papermill", root / "nbs/05_train.ipynb", nb, *given, "--no-progress-bar", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (out / "metrics.jsonl").read_bytes() == (cli / "metrics.jsonl").read_bytes()
    assert nb.is_file()
    rows, other = (read_metrics(r / "metrics.jsonl") for r in (out, run_tiny(small, tmp_path / "seed_0", 5)))
    assert rows[-1]["step"] == 20 and rows[0]["train_loss"] != other[0]["train_loss"]


@pytest.mark.slow
def test_unknown_papermill_parameter_is_refused_before_any_compute(root, tmp_path):
    done = shell(
        Path(sys.executable).with_name("papermill"),
        root / "nbs/05_train.ipynb",
        tmp_path / "x.ipynb",
        "-p",
        "stepz",
        5,
        "-p",
        "out",
        tmp_path / "run",
        "--no-progress-bar",
        cwd=tmp_path,
    )
    assert done.returncode != 0 and "did you mean 'steps'" in done.stderr
    assert not (tmp_path / "run").exists()


def test_cli_refuses_in_one_line(tmp_path):
    done = shell(Path(sys.executable).with_name("pokemon_train"), "training_params.stepz=5", "--out", tmp_path / "run")
    assert (
        done.returncode == 2
        and done.stderr.startswith("error: ")
        and "stepz" in done.stderr
        and "Traceback" not in done.stderr
    )
    assert not (tmp_path / "run").exists()


def train_slowly(*config):
    "In a process of its own: a pause in every step, so that a kill can fall between any two."
    from pokemon_nb import train as chapter

    step = chapter.LitDiffusion.training_step
    chapter.LitDiffusion.training_step = lambda self, *a: (time.sleep(0.1), step(self, *a))[1]
    run_tiny(*config)


@pytest.mark.slow
def test_kill_minus_nine_three_times_then_resume_bit_for_bit(tmp_path, small):
    "Weights, EMA, optimizer, schedule and metrics equal those of a run that nobody disturbed."
    steps, rng = 60, random.Random(1)
    whole = run_tiny(small, tmp_path / "whole", steps=steps)
    out = tmp_path / "killed"
    fresh = multiprocessing.get_context("forkserver")  # each process has imported the chapter and done nothing else
    fresh.set_forkserver_preload(["pokemon_nb.train"])
    for low in (4, 20, 40):  # somewhere in the first, second and last third
        target, log = low + rng.randrange(15), out / "metrics.jsonl"
        process = fresh.Process(target=train_slowly, args=(small, out, steps))
        process.start()
        limit = time.time() + 120
        while time.time() < limit and process.is_alive() and not any(
            r["step"] >= target - 5 for r in read_metrics(log)
        ):
            time.sleep(0.02)
        time.sleep(rng.random() * 0.5)
        assert process.is_alive(), f"ended by itself: {process.exitcode}"
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    killed = run_tiny(small, out, steps=steps)
    a, b = state_of(whole), state_of(killed)
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
        assert_same(a[key], b[key], key)
    assert (whole / "metrics.jsonl").read_bytes() == (killed / "metrics.jsonl").read_bytes()
    for name in ("unet/diffusion_pytorch_model.safetensors", "metrics.json"):
        assert (whole / "checkpoint" / name).read_bytes() == (killed / "checkpoint" / name).read_bytes()


def test_a_run_starts_from_another_ones_weights(small, tmp_path):
    "And its configuration says so; another architecture is refused before anything is trained."
    first = run_tiny(small, tmp_path / "a")
    config = first / "checkpoint/unet/config.json"                 # written before the network could be pruned
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "hidden"}))
    warm, cold = (run_tiny(small, tmp_path / n, 1, f"seed=5 {e}") for n, e in (("b", f"model.init={first}"), ("c", "")))
    assert f"init: {first}" in (warm / "config.yaml").read_text()
    a, b, c = (load_pipeline(p).unet.state_dict() for p in (first, warm, cold))
    distance = lambda x, y: sum((x[k] - y[k]).square().sum() for k in x)
    assert distance(a, b) < 0.2 * distance(a, c)
    assert load_pipeline(warm).config.training == "data, 20 steps of 8; then: data, 1 steps of 8"
    assert "| started from: step | 20 |" in (warm / "checkpoint/README.md").read_text()
    with pytest.raises(ValueError, match="holds another network"):
        run_tiny(small, tmp_path / "d", 1, f"model.init={first} model.emb_dim=128")


def test_recoloured_pictures_train_under_their_new_names(small, tmp_path):
    "The coats change what is learned; a dataset without colours refuses them."
    plain, coats = (run_tiny(small, tmp_path / n, 5, e) for n, e in (("a", ""), ("b", "data.recolour=0.9")))
    a, b = (load_pipeline(p).unet.state_dict() for p in (plain, coats))
    assert any(not torch.equal(a[k], b[k]) for k in a)
    with pytest.raises(ValueError, match="data.recolour must be a share"):
        resolve_config(str(small), overrides="data.recolour=2")
    with pytest.raises(ValueError, match="be 0 without alpha"):
        resolve_config(str(small), overrides="data.recolour=0.5 data.channels=3")


def test_a_build_without_captions_is_described_from_its_facts(tmp_path, capsys):
    "What `dvc pull` brings is trained on as it is; nothing is written into it."
    from pokemon_nb.data import build_dataset, dataset_hash

    root = build_dataset("critters", tmp_path / "data", n=60, size=16)
    before = dataset_hash(root)
    run_tiny(root, tmp_path / "run", 2)
    assert "described from the facts" in capsys.readouterr().out and dataset_hash(root) == before


# second stages and students


def test_a_run_whose_loss_rises_stops_and_keeps_its_best(small, tmp_path, capsys):
    "A rate that destroys the network: the checkpoint stays the one from before, and a second start trains nothing."
    extra = "training_params.early_stopping=2 training_params.lr=3.0 training_params.warmup=0 optimizer=sgd"
    run = run_tiny(small, tmp_path / "run", steps=200, extra=f"{extra} training_params.ema_halflife=1")
    said = capsys.readouterr().out
    losses = {r["step"]: r["val_loss"] for r in read_metrics(run / "metrics.jsonl") if "val_loss" in r}
    best = min(losses, key=losses.get)
    assert list(losses)[-3:] == [best, best + 10, best + 20] and best + 20 < 200
    assert json.loads((run / "checkpoint/metrics.json").read_text())["step"] == best
    seen = list(losses.values())
    worse = sum(v > min(seen[:i]) for i, v in enumerate(seen) if i)
    assert said.count("checkpoint not replaced") == worse and "did not improve in the last 2 records" in said
    before = state_of(run)
    run_tiny(small, run, steps=200, extra=f"{extra} training_params.ema_halflife=1")
    assert f"stopped early at step {best + 20}; nothing to train" in capsys.readouterr().out
    assert_same(state_of(run), before)


def test_a_run_that_copies_stops(small, tmp_path, capsys, monkeypatch):
    "With a detector that was calibrated on noise, and so takes any body for a copy, the first validation is the last."
    from pokemon_nb.metrics import CopyDetector

    watched = "training_params.copy_pictures=16 training_params.max_copy_rate"
    run = run_tiny(small, tmp_path / "honest", extra=f"{watched}=0.9")
    rows = [r for r in read_metrics(run / "metrics.jsonl") if "val_loss" in r]
    assert [r["step"] for r in rows] == [10, 20] and all(0 <= r["copy_rate_low"] <= r["copy_rate"] < 1 for r in rows)
    noise = torch.rand(8, 4, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    monkeypatch.setattr("pokemon_nb.train.CopyDetector", lambda pictures, _: CopyDetector(pictures, noise, 0.0))
    capsys.readouterr()
    run = run_tiny(small, tmp_path / "copies", extra=f"{watched}=0.1")
    row = read_metrics(run / "metrics.jsonl")[-1]
    assert row["step"] == 10 and row["copy_rate_low"] > 0.1
    assert "copy_rate_low" in capsys.readouterr().out and (run / "checkpoint/model_index.json").is_file()


@pytest.fixture(scope="module")
def first(small, tmp_path_factory):
    return run_tiny(small, tmp_path_factory.mktemp("first") / "run", 10)


def test_a_second_stage_holds_both_networks(small, first, tmp_path):
    run = run_tiny(small, tmp_path / "run", 10, f"data.size=32 model.base={first}")
    pipe = load_pipeline(run)
    assert pipe.config.base_size == 16 and pipe("a cat", seed=1).images[0].size == (32, 32)
    a, b = pipe.unet.state_dict(), load_pipeline(first).unet.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert "_name_or_path" not in (run / "checkpoint/upsampler/config.json").read_text()
    again = run_tiny(small, tmp_path / "warm", 1, f"data.size=32 model.base={first} model.init={run}")
    assert load_pipeline(again).upsampler.config.cond_channels == 5
    for extra, says in (
        ("data.size=8", "at least the 16 px"),
        ("data.size=32 diffusion.sigma_data=0.5", "mean the same"),
        ("data.size=32 data.channels=3", "be as in model.base"),
    ):
        with pytest.raises(ValueError, match=says):
            run_tiny(small, tmp_path / "no", 1, f"{extra} model.base={first}")


def test_what_a_second_stage_is_shown(small, first, tmp_path):
    "The small picture arrives: with another hint the same noise becomes another picture, near the hint in colour."
    pipe = load_pipeline(run_tiny(small, tmp_path / "run", 60, f"data.size=32 model.base={first}"))
    noise = lambda x: torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    low = torch.stack([torch.full((4, 16, 16), v) for v in (-1.0, 0.9)])
    large, calls = pipe.enlarge(low, 32, torch.zeros(2, 384), noise, lambda *a: None)
    assert calls == 2 * pipe.config.upsampler_steps and large[1].mean() > large[0].mean() + 1


def test_autoguidance_costs_a_third_call(small, first, tmp_path):
    "A weak network like the strong one changes nothing; another one does."
    from pokemon_nb.train import publish

    ask = dict(seed=1, num_inference_steps=3, guidance_scale=2.0, output_type="pt")
    plain = load_pipeline(first)("a cat", **ask)
    same, other = first, run_tiny(small, tmp_path / "other", 20, "seed=4")
    auto = [
        load_pipeline(publish(first, tmp_path / "out", weak=w, autoguidance=1.0))("a cat", **ask) for w in (same, other)
    ]
    assert (plain.nfe, auto[0].nfe) == (6, 9)
    assert (plain.images - auto[0].images).abs().max() < 0.02 < (plain.images - auto[1].images).abs().max()


def test_publish_exchanges_the_first_stage(small, first, tmp_path):
    from pokemon_nb.train import publish

    run = run_tiny(small, tmp_path / "run", 10, f"data.size=32 model.base={first}")
    other = run_tiny(small, tmp_path / "other", 10, "seed=3 model.widths=[64,128] model.depths=[1,1]")
    out = publish(run, tmp_path / "out", base=other, upsampler_steps=3, sigma_max=20.0)
    pipe = load_pipeline(out)
    assert len(pipe.unet.config.widths) == 2 and pipe.config.upsampler_steps == 3
    assert pipe.scheduler.schedule.sigma_max == 20
    big = run_tiny(small, tmp_path / "big", 1, "data.size=24")
    with pytest.raises(ValueError, match="must draw 16 px"):
        publish(run, tmp_path / "out", base=big)


def test_a_student_is_its_teacher_at_scale_one_and_resumes(small, first, tmp_path):
    from pokemon_nb.distillation import LitStudent, student_config

    cfg = student_config(first, tmp_path / "student", steps=10)
    student = load_pipeline(train(cfg, LitStudent))
    assert student.config.guidance == "length"
    one = dict(seed=1, num_inference_steps=4, output_type="pt")
    assert student("a cat", guidance_scale=3.0, **one).nfe == 4
    assert state_of(train(student_config(first, tmp_path / "student", steps=10), LitStudent))["global_step"] == 10
    weak = run_tiny(small, tmp_path / "weak", 1, "seed=2 model.emb_dim=128")
    other = load_pipeline(train(student_config(first, tmp_path / "auto", 10, weak=weak), LitStudent)).unet.state_dict()
    assert any(not torch.equal(other[k], v) for k, v in student.unet.state_dict().items())
    from pokemon_nb.quantization import to_pruned

    cut = to_pruned(first, tmp_path / "cut", 0.5)
    small_one = load_pipeline(train(student_config(first, tmp_path / "few", 10, start=cut), LitStudent))
    assert tuple(small_one.unet.config.hidden) == (32,) and small_one.config.guidance == "length"
    with pytest.raises(ValueError, match="is a student itself"):
        train(student_config(tmp_path / "student", tmp_path / "grandchild", steps=1), LitStudent)
    with pytest.raises(ValueError, match="config.yaml"):
        student_config(tmp_path / "nowhere", tmp_path / "x")
