"""Guards of chapter 01: pictures, facts, builds, order. Everything is seeded, offline and small."""
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image

from pokemon_nb import checks, data
from pokemon_nb.batches import PokemonData, StepSampler
from pokemon_nb.data import (
    COLOURS, PAINT_RGB, SHAPES, SPLITS, TYPES, Critter, PokemonDataset, augment,
    build_dataset, critter_family, cut_matte, dataset_hash, from_tensor, image_grid, load_rgba, needs_matte,
    open_dataset, over, paint_critter, random_critter, read_metadata, split_of, step_seed, to_float, to_tensor,
    write_atomic, write_manifest,
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return build_dataset("critters", tmp_path_factory.mktemp("critters")/"data", n=80, size=32)


def pasted(im, ground="white"): return Image.alpha_composite(Image.new("RGBA", im.size, ground), im)


# --- critters -------------------------------------------------------------------------------------------------------
def test_painting_is_a_pure_function():
    a = random_critter(3)
    assert a == random_critter(3) and a != random_critter(4)
    assert paint_critter(a, 32).tobytes() == paint_critter(replace(a), 32).tobytes()


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_fills_its_frame_without_touching_the_edge(shape):
    alpha = np.asarray(paint_critter(Critter("pink", shape, ("ice",), ears="long", stage=3, seed=8), 64))[..., 3]
    edge = np.concatenate([alpha[0], alpha[-1], alpha[:, 0], alpha[:, -1]])
    assert edge.max() == 0 and .15 < (alpha > 127).mean() < .8
    assert max(np.ptp(np.nonzero(alpha.any(k))[0]) for k in (0, 1)) >= 56


@pytest.mark.parametrize("colour", COLOURS)
def test_named_colour_is_the_commonest_one(colour):
    for seed in range(3):
        a = np.asarray(paint_critter(Critter(colour, "ball", ("normal",), seed=seed), 32)).astype(float)
        body = np.median(a[a[..., 3] > 250][:, :3], 0)
        assert min(COLOURS, key=lambda c: np.abs(np.subtract(PAINT_RGB[c], body)).sum()) == colour


def test_types_can_be_told_apart():
    marks = {t: paint_critter(Critter("gray", "ball", (t,), seed=1), 32).tobytes() for t in TYPES}
    assert len(set(marks.values())) == len(TYPES)


def test_families_keep_colour_and_shape():
    for seed in range(40):
        family = critter_family(seed)
        assert [c.stage for c in family] == list(range(1, len(family) + 1))
        assert len({(c.colour, c.shape, c.pattern, c.seed) for c in family}) == 1
        assert all(len(set(c.types)) == len(c.types) <= 2 for c in family)


# --- pictures -------------------------------------------------------------------------------------------------------
def test_hidden_colour_of_transparent_pixels_never_shows():
    a = np.zeros((40, 40, 4), np.uint8)
    a[..., :3] = (255, 0, 255)                                   # magenta under alpha 0, as many editors leave it
    a[10:30, 10:30] = (0, 128, 0, 255)
    t = to_tensor(Image.fromarray(a), 16)
    assert t[0].max() <= 2 and t[2].max() <= 2 and (t[:3] <= t[3]).all()


def test_tensor_round_trip_is_exact_and_capped():
    t = to_tensor(paint_critter(random_critter(1), 64), 64)
    assert torch.equal(to_tensor(from_tensor(to_float(t)), 64), t)
    wild = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0))*3
    assert from_tensor(wild).mode == "RGBA"
    assert torch.isfinite(over(wild)).all() and over(wild).abs().max() <= 1


def test_over_agrees_with_pillow():
    im = paint_critter(random_critter(2), 48)
    for ground in ("white", "black"):
        ours = np.asarray(from_tensor(over(to_float(to_tensor(im, 48)), ground))).astype(int)
        assert np.abs(ours - np.asarray(pasted(im, ground).convert("RGB")).astype(int)).max() <= 2


@pytest.mark.parametrize("colour", ["white", "black", "yellow"])
def test_matte_gives_the_alpha_back(colour):
    for seed, shape in enumerate(SHAPES):
        if shape in ("arms", "tentacles", "armor", "heads"): continue              # ground that they enclose stays
        im = paint_critter(Critter(colour, shape, ("rock",), seed=seed), 96)
        assert not needs_matte(im) and needs_matte(pasted(im))
        a, b = (np.asarray(i)[..., 3].astype(int) for i in (im, cut_matte(pasted(im))))
        eaten = ((a > 200) & (b < 50)).sum()/(a > 200).sum()
        assert eaten < .01, (shape, eaten)
        assert np.abs(a - b).mean() < 255*.04, shape


def test_matte_stops_at_an_outline_with_a_pinhole():
    im = Image.new("RGB", (60, 60), "white")
    px = np.asarray(im).copy()
    px[10:50, 10:50] = 0; px[13:47, 13:47] = 255
    px[30:32, 10:13] = 255                                                         # a two-pixel gap in the outline
    alpha = np.asarray(cut_matte(Image.fromarray(px)))[..., 3]
    assert alpha[30, 30] == 255 and alpha[5, 5] == 0


@pytest.mark.parametrize("mode", ["L", "LA", "P", "1", "RGB", "CMYK", "I;16"])
def test_modes_are_converted_knowingly(tmp_path, mode):
    path = tmp_path/("x.tif" if mode == "CMYK" else "x.png")
    if mode == "I;16": Image.fromarray(np.full((9, 9), 0x8080, np.uint16)).save(path)
    else: Image.new("RGB", (9, 9), (128, 128, 128)).convert(mode).save(path)
    im = load_rgba(path)
    assert im.mode == "RGBA" and im.getpixel((0, 0))[3] == 255
    if mode not in ("1", "P"): assert abs(im.getpixel((4, 4))[0] - 128) <= 4      # these two have no middle gray


def test_palette_transparency_survives(tmp_path):
    frog = paint_critter(random_critter(5), 32)
    frog.quantize(64).save(tmp_path/"p.png")
    assert load_rgba(tmp_path/"p.png").getpixel((0, 0))[3] == 0


@pytest.mark.parametrize("keep", [0, 5, 60, 400])
def test_broken_pictures_are_named(tmp_path, keep):
    paint_critter(random_critter(5), 64).save(tmp_path/"whole.png")
    write_atomic(tmp_path/"broken.png", (tmp_path/"whole.png").read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"broken\.png"): load_rgba(tmp_path/"broken.png")


def test_image_grid_sizes():
    ims = [paint_critter(random_critter(k), 16) for k in range(5)]
    assert image_grid(ims, cols=3, pad=2).size == (3*18 + 2, 2*18 + 2)
    batch = to_float(torch.stack([to_tensor(i, 16) for i in ims]))
    assert image_grid(batch, cols=9, background="checker").mode == "RGB"
    with pytest.raises(ValueError, match="one per picture"): image_grid(ims, captions=["a"])


# --- augmentation and order -----------------------------------------------------------------------------------------
def gen(seed=0): return torch.Generator().manual_seed(seed)


def test_augment_is_pure_and_keeps_colour_below_alpha():
    x0 = to_float(torch.stack([to_tensor(paint_critter(random_critter(k), 32), 32) for k in range(6)]))
    a = augment(x0, gen(3))
    assert torch.equal(a, augment(x0, gen(3))) and not torch.equal(a, augment(x0, gen(4)))
    assert a.shape == x0.shape and a.abs().max() <= 1 and (a[:, :3] <= a[:, 3:]).all()
    still = dict(shift=0, zoom=0, rotate=0)
    assert torch.allclose(augment(x0, gen(), flip=0, **still), x0, atol=1e-4)
    assert torch.allclose(augment(x0, gen(), flip=1, **still), x0.flip(-1), atol=1e-4)


def test_augment_brings_in_nothing_at_the_rim():
    far = dict(flip=0, shift=.3, zoom=.3, rotate=40)
    assert torch.allclose(augment(torch.full((4, 4, 16, 16), -1.), gen(), **far), torch.tensor(-1.))
    assert torch.allclose(augment(torch.full((4, 3, 16, 16), 1.), gen(), **far), torch.tensor(1.))


def test_augment_is_light_and_centred():
    x0 = to_float(to_tensor(paint_critter(random_critter(1), 64), 64)).repeat(256, 1, 1, 1)
    mass = (augment(x0, gen(), flip=0)[:, 3] + 1).sum((1, 2))/(x0[:, 3] + 1).sum((1, 2))
    assert .8 < mass.min() and mass.max() < 1.25 and abs(mass.mean() - 1) < .03


def test_sampler_is_a_pure_function_of_the_step():
    s = StepSampler(11, 4, seed=5)
    forward = [s.batch(k) for k in range(22)]
    assert [StepSampler(11, 4, seed=5).batch(k) for k in reversed(range(22))] == forward[::-1]
    assert np.bincount(sum(forward, [])).tolist() == [8]*11                     # 88 pictures: eight whole epochs
    it = iter(StepSampler(11, 4, seed=5, start_step=9))
    assert [next(it) for _ in range(5)] == forward[9:14]
    ranks = [[StepSampler(11, 2, seed=5, rank=r, world_size=2).batch(k) for r in (0, 1)] for k in range(22)]
    assert [a + b for a, b in ranks] == forward
    assert len(StepSampler(3, 10).batch(0)) == 10                               # a batch larger than the split


@pytest.mark.parametrize("bad", [dict(n=0), dict(batch_size=0), dict(start_step=-1), dict(rank=2, world_size=2)])
def test_sampler_refuses(bad):
    with pytest.raises(ValueError, match="StepSampler"): StepSampler(**(dict(n=5, batch_size=2) | bad))


def test_step_seed_is_fixed_forever():
    assert step_seed(0, "augment", 7) == 2749265408155821527
    assert len({step_seed(a, b) for a in range(30) for b in range(30)}) == 900


@pytest.mark.parametrize("channels", [3, 4])
def test_batches_do_not_depend_on_where_one_starts(root, channels):
    def take(n, workers=0):
        it = iter(PokemonData(root, size=16, channels=channels, batch_size=4, num_workers=workers).train_dataloader())
        return [next(it) for _ in range(n)]
    a, b = take(4), take(4)
    for x, y in zip(a, b): assert torch.equal(x["x0"], y["x0"]) and torch.equal(x["index"], y["index"])
    assert [x["step"] for x in a] == [0, 1, 2, 3] and a[0]["x0"].shape == (4, channels, 16, 16)


def test_workers_give_the_same_batches_in_the_same_order(root):
    its = [iter(PokemonData(root, size=16, batch_size=4, num_workers=w).train_dataloader()) for w in (0, 2)]
    for _ in range(5):
        x, y = (next(i) for i in its)
        assert x["step"] == y["step"] and torch.equal(x["x0"], y["x0"])


class Tiny(L.LightningModule):
    def __init__(self):
        super().__init__(); self.w = torch.nn.Parameter(torch.zeros(1)); self.seen = []
    def training_step(self, batch, _):
        self.seen.append((batch["step"], batch["index"].tolist(), float(batch["x0"].sum())))
        return (self.w - batch["x0"].mean())**2
    def configure_optimizers(self): return torch.optim.SGD(self.parameters(), .1)


def test_a_resumed_trainer_sees_the_batches_it_would_have_seen(root, tmp_path):
    def run(steps, ckpt=None):
        quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
        t, m = L.Trainer(max_steps=steps, accelerator="cpu", limit_val_batches=0, **quiet), Tiny()
        t.fit(m, PokemonData(root, size=16, batch_size=4, seed=1), ckpt_path=ckpt)
        return t, m
    _, whole = run(9)
    t, half = run(4)
    t.save_checkpoint(tmp_path/"at4.ckpt")
    _, rest = run(9, tmp_path/"at4.ckpt")
    assert half.seen + rest.seen == whole.seen and torch.equal(rest.w, whole.w)


def test_validation_is_fixed_and_complete(root):
    d = PokemonData(root, size=16, batch_size=4)
    seen = [b["index"].tolist() for b in d.val_dataloader()]
    assert sum(seen, []) == list(range(len(d.val_set)))
    assert torch.equal(next(iter(d.val_dataloader()))["x0"], d.val_set.batch(range(4)))


# --- splits and builds ----------------------------------------------------------------------------------------------
def test_no_family_crosses_splits(root):
    home = {}
    for s in SPLITS:
        for r in read_metadata(root, s): assert home.setdefault(r["family"], s) == s == split_of(r["family"])
    assert len(home) > 20


def test_two_builds_are_the_same_bytes(root, tmp_path):
    again = build_dataset("critters", tmp_path/"data", n=80, size=32)
    assert dataset_hash(again) == dataset_hash(root) == open_dataset(root).hash
    other = build_dataset("critters", tmp_path/"other", n=80, size=32, seed=1)
    assert dataset_hash(other) != dataset_hash(root)


def test_records_have_the_agreed_form(root):
    want = {"file_name", "id", "name", "family", "types", "colour", "shape", "genus", "habitat", "legendary",
            "mythical", "baby", "height_m", "weight_kg", "source"}
    rows = [r for s in SPLITS for r in read_metadata(root, s)]
    assert sorted(r["id"] for r in rows) == list(range(1, 81))
    for r in rows:
        assert set(r) == want and r["colour"] in COLOURS and r["shape"] in SHAPES and set(r["types"]) <= set(TYPES)
        assert r["height_m"] > 0 and r["weight_kg"] > 0 and r["source"] == "critters"


def test_datasets_loads_the_build(root, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1"); monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    datasets = pytest.importorskip("datasets", reason="the dev extra is not installed")
    ds = datasets.load_dataset("imagefolder", data_dir=str(root), cache_dir=str(tmp_path))
    n = open_dataset(root).counts
    assert {k: v.num_rows for k, v in ds.items()} == dict(train=n["train"], validation=n["val"], test=n["test"])
    row, record = ds["train"][0], read_metadata(root, "train")[0]
    assert row["name"] == record["name"] and row["image"].size == (32, 32) and row["image"].mode == "RGBA"


def test_manifest_follows_captions_and_the_build_is_still_recognised(root, tmp_path, capsys):
    out = build_dataset("critters", tmp_path/"data", n=80, size=32)
    for s in SPLITS:
        rows = [r | dict(text="a creature") for r in read_metadata(out, s)]
        write_atomic(out/s/"metadata.jsonl", "".join(json.dumps(r, sort_keys=True) + "\n" for r in rows))
    made = write_manifest(out)
    assert made["hash"] == dataset_hash(out) != made["build_hash"] == open_dataset(root).hash
    build_dataset("critters", out, n=80, size=32)
    assert "kept" in capsys.readouterr().out and read_metadata(out, "val")[0]["text"] == "a creature"


def test_existing_folders_are_never_lost(root, tmp_path):
    (tmp_path/"mine").mkdir(); write_atomic(tmp_path/"mine"/"thesis.txt", "years of work")
    for force in (False, True):
        with pytest.raises(FileExistsError, match="choose another folder"):
            build_dataset("critters", tmp_path/"mine", n=80, size=16, force=force)
    assert (tmp_path/"mine"/"thesis.txt").read_text() == "years of work"
    out = build_dataset("critters", tmp_path/"data", n=80, size=16)
    with pytest.raises(FileExistsError, match="--force"): build_dataset("critters", out, n=81, size=16)
    assert open_dataset(out).counts["train"] and sum(open_dataset(out).counts.values()) == 80
    build_dataset("critters", out, n=81, size=16, force=True)
    assert sum(open_dataset(out).counts.values()) == 81
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "mine"]


def test_a_failure_in_the_middle_leaves_nothing(tmp_path, monkeypatch):
    def full(*_, **__): raise OSError(28, "No space left on device")
    monkeypatch.setattr(data, "write_manifest", full)
    with pytest.raises(OSError, match="No space"): build_dataset("critters", tmp_path/"data", n=80, size=16)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bad, why", [
    (dict(n=0), "n must be at least 1"), (dict(n=2), "every split must get a family"),
    (dict(size=2), "size must lie in"),
])
def test_bad_critter_builds(tmp_path, bad, why):
    with pytest.raises(ValueError, match=why): build_dataset("critters", tmp_path/"data", **(dict(n=80, size=16) | bad))
    assert list(tmp_path.iterdir()) == []


def test_unwritable_out(tmp_path):
    write_atomic(tmp_path/"file", "in the way")
    for out in (tmp_path/"file"/"data", tmp_path/"file"):
        with pytest.raises(PermissionError, match="out must be a folder that can be written"):
            build_dataset("critters", out, n=80, size=16)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


@pytest.mark.parametrize("bad", [dict(channels=1), dict(size=0), dict(split="dev")])
def test_dataset_refuses(root, bad):
    with pytest.raises(ValueError, match=str(next(iter(bad.values())))): PokemonDataset(root, **bad)


def test_reader_names_the_row(root, tmp_path):
    out = build_dataset("critters", tmp_path/"data", n=80, size=16)
    meta = out/"val"/"metadata.jsonl"; lines = meta.read_text().splitlines(True)
    for text, why in (("".join(lines[:2]) + "{oops\n", "line 3"),
                      ("".join(lines[1:]), "image must have its metadata row"),
                      (lines[0] + "".join(lines), "line 2.*again"), ("[]\n", "line 1"), ("", "at least one row"),
                      ("".join(lines) + '{"file_name": "no.png"}\n', "without: no.png"),
                      ('{"file_name": "../x.png"}\n', "inside the folder")):
        write_atomic(meta, text)
        with pytest.raises(ValueError, match=why): read_metadata(out, "val")
    (out/"train"/"metadata.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="pokemon_data"): PokemonDataset(out, "train")


# --- the command line -----------------------------------------------------------------------------------------------
def script(*args, cwd):
    (cwd/"cli.py").write_text("from pokemon_nb.checks import pokemon_data\npokemon_data()\n")
    env = os.environ | {"PYTHONPATH": str(Path(data.__file__).parents[1])}
    return subprocess.run([sys.executable, "cli.py", *map(str, args)], cwd=cwd, env=env, capture_output=True, text=True)


def test_command_line(tmp_path, capsys):
    checks.pokemon_data("critters", str(tmp_path/"d"), n=80, size=16)
    said = capsys.readouterr().out
    assert said.startswith("source: critters (n 80") and "train" in said and "sha256" in said
    wrong = script("--source", "nowhere", "--out", "e", cwd=tmp_path)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: open_source: source must be 'critters' (painted here)")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cli.py", "d"]


@pytest.mark.slow
def test_help_is_made_of_the_parameter_comments(tmp_path):
    usage = script("--help", cwd=tmp_path)
    assert usage.returncode == 0 and "a folder with pokedex.csv and images/" in " ".join(usage.stdout.split())
