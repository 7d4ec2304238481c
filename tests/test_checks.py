"""Twelve planted faults are named, and nothing else; the report says what changed."""
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

pytest.importorskip("imagehash")
from pokemon_nb.checks import _SAME_CELL, _cell_distance, _look, check_dataset, data_report, findings_table  # noqa: E402
from pokemon_nb.data import (  # noqa: E402
    build_dataset, load_rgba, paint_critter, random_critter, read_metadata, write_manifest)

SHARED = Path(__file__).parents[2] / "shared/pokemon"
needs_real = pytest.mark.skipif(not SHARED.is_dir(), reason="the artworks are not beside this checkout")


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    return build_dataset("critters", tmp_path_factory.mktemp("checks") / "data", n=120, size=64)


def rows(root, split): return [r["file_name"] for r in read_metadata(root, split)]


def change(root, split, file, **facts):
    "Change the facts of one row."
    path = root / split / "metadata.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(r | facts if r["file_name"] == file else r) + "\n" for r in lines))


def append(root, split, line):
    with (root / split / "metadata.jsonl").open("a") as f: f.write(line + "\n")


def blank(path): Image.new("RGBA", (64, 64), (200, 30, 30, 255)).save(path)
def smaller(a, b): load_rgba(a).resize((52, 52)).save(b)


def plants(clean):
    "name -> (what breaks a copy of `clean`, the (kind, where) that must be named)."
    t, v, x = (rows(clean, s) for s in ("train", "val", "test"))
    family = {r["file_name"]: r["family"] for r in read_metadata(clean, "train")}
    alone = [k for k in t if list(family.values()).count(family[k]) == 1]
    stay = next(r for r in read_metadata(clean, "val"))
    return {
        "truncated": (lambda d: (d / "train" / t[0]).write_bytes((d / "train" / t[0]).read_bytes()[:400]),
                      ("corrupt", f"train/{t[0]}")),
        "no picture": (lambda d: (d / "test" / x[0]).write_bytes(b"<html>not found</html>"),
                       ("corrupt", f"test/{x[0]}")),
        "duplicate": (lambda d: shutil.copy(d / "train" / t[1], d / "train" / t[2]), ("duplicate", f"train/{t[2]}")),
        "near-duplicate": (lambda d: smaller(d / "train" / t[3], d / "train" / t[4]),
                           ("near-duplicate", f"train/{t[4]}")),
        "twin in another split": (lambda d: smaller(d / "train" / t[5], d / "val" / v[0]), ("leakage", f"val/{v[0]}")),
        "row without image": (lambda d: (d / "train" / t[6]).unlink(), ("row-without-image", f"train/{t[6]}")),
        "image without row": (lambda d: paint_critter(random_critter(999), 64).save(d / "val/extra.png"),
                              ("image-without-row", "val/extra.png")),
        "bad line": (lambda d: append(d, "test", '{"file_name": '), ("bad-row", f"test/metadata.jsonl:{len(x) + 1}")),
        "unknown word": (lambda d: change(d, "train", t[7], colour="plaid"), ("bad-facts", f"train/{t[7]}")),
        "family in two splits": (lambda d: change(d, "train", alone[-1], family=stay["family"]),
                                 ("leakage", f"train/{alone[-1]}")),
        "blank": (lambda d: blank(d / "train" / t[8]), ("palette", f"train/{t[8]}")),
        "thumbnail": (lambda d: load_rgba(d / "train" / t[9]).resize((12, 12)).save(d / "train" / t[9]),
                      ("size", f"train/{t[9]}")),
    }


def test_a_clean_folder_names_nothing(clean): assert check_dataset(clean) == []


def test_twelve_faults_at_once_and_nothing_else(clean, tmp_path):
    bad, planted = tmp_path / "bad", plants(clean)
    shutil.copytree(clean, bad)
    for plant, _ in planted.values(): plant(bad)
    found = [(f.kind, f.where) for f in check_dataset(bad)]
    assert found.pop(found.index(("manifest", "dataset.json")))           # the build was changed: true as well
    assert len(planted) == 12 and sorted(found) == sorted(expected for _, expected in planted.values())


@pytest.mark.parametrize("name", range(12))
def test_each_fault_alone(clean, tmp_path, name):
    plant, expected = list(plants(clean).values())[name]
    shutil.copytree(clean, tmp_path / "bad")
    plant(tmp_path / "bad")
    assert sorted((f.kind, f.where) for f in check_dataset(tmp_path / "bad")) == sorted(
        [expected, ("manifest", "dataset.json")])


def test_contradictions_captions_and_paths(clean, tmp_path):
    bad = tmp_path / "bad"
    shutil.copytree(clean, bad)
    a, b, c, d, e = rows(bad, "train")[:5]
    first = read_metadata(bad, "train")[0]
    change(bad, "train", b, id=first["id"], family=first["family"], name="Somebody else")
    change(bad, "train", c, text="  ")
    change(bad, "train", d, text="a frog", captions=["a toad"])
    change(bad, "train", e, height_m=-1)
    append(bad, "val", '{"file_name": "../../etc/passwd"}')
    append(bad, "val", json.dumps(read_metadata(clean, "val")[0]))
    n = len(rows(clean, "val"))
    found = {(f.kind, f.where) for f in check_dataset(bad)}
    assert {("contradiction", f"train/{b}"), ("bad-caption", f"train/{c}"), ("bad-caption", f"train/{d}"),
            ("bad-facts", f"train/{e}"), ("bad-row", f"val/metadata.jsonl:{n + 1}"),
            ("duplicate-row", f"val/metadata.jsonl:{n + 2}")} <= found


@pytest.mark.slow
def test_the_exit_code(clean, tmp_path):
    (tmp_path / "cli.py").write_text("from pokemon_nb.checks import pokemon_data\npokemon_data()\n")
    def run(*args):
        done = subprocess.run([sys.executable, "cli.py", *map(str, args)], cwd=tmp_path, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr
    shutil.copytree(clean, tmp_path / "data")
    assert run("--check") == (0, "no findings\ndata: 0 errors, 0 warnings\n")                # of --out
    t = rows(clean, "train")
    shutil.copy(tmp_path / "data/train" / t[1], tmp_path / "data/train" / t[2])
    write_manifest(tmp_path / "data")
    code, said = run("--check", tmp_path / "data")
    assert code == 0 and "0 errors, 1 warnings" in said and f"train/{t[2]}" in said
    assert run("--check", "data", "--strict")[0] == 1
    (tmp_path / "data/train" / t[3]).unlink()
    assert run("--check", "data")[0] == 1
    code, said = run("--check", "nowhere")
    assert code == 2 and said.startswith("error: check: 'nowhere' must be a folder")


@pytest.mark.slow
@pytest.mark.parametrize("source", ["critters", pytest.param("artworks", marks=needs_real)])
def test_the_threshold_lies_between_copies_and_lookalikes(source, tmp_path):
    root = tmp_path / "data"
    build_dataset("critters" if source == "critters" else SHARED, root, n=1000, size=64)
    assert check_dataset(root) == []                                      # no lookalike is called a copy
    out, worst = tmp_path / "copy.png", 0.
    for name in rows(root, "train")[::25]:
        im = load_rgba(root / "train" / name)
        moved = Image.new("RGBA", im.size)
        moved.paste(im, (1, 0))
        jpeg = io.BytesIO()
        Image.alpha_composite(Image.new("RGBA", im.size, "white"), im).convert("RGB").save(jpeg, "JPEG", quality=92)
        bright = Image.fromarray(np.dstack([np.asarray(ImageEnhance.Brightness(im.convert("RGB")).enhance(1.05)),
                                            np.asarray(im)[..., 3]]))
        for copy in (im.resize((im.width * 4 // 5,) * 2), moved, im.quantize(64).convert("RGBA"), bright,
                     Image.open(jpeg).convert("RGBA")):
            copy.save(out)
            worst = max(worst, _cell_distance(_look(root / "train" / name), _look(out)))
    print(f"worst copy {worst:.3f}")
    assert worst < _SAME_CELL


@needs_real
@pytest.mark.slow
def test_a_raw_source_is_checked_too(tmp_path):
    assert check_dataset(SHARED) == []
    raw = tmp_path / "raw"
    (raw / "images").mkdir(parents=True)
    for p in sorted((SHARED / "images").iterdir())[:30]: shutil.copy(p, raw / "images")
    lines = (SHARED / "pokedex.csv").read_text(encoding="utf-8").splitlines()[:31]
    lines[4] = lines[4].replace("red", "plaid")
    (raw / "pokedex.csv").write_text("\n".join(lines[:-1]) + "\n", encoding="utf-8")
    found = [(f.kind, f.where) for f in check_dataset(raw)]
    assert found == [("bad-facts", "pokedex.csv:5"), ("image-without-row", "images/030.png")]


def test_the_report_says_what_changed(clean, tmp_path):
    new = tmp_path / "new"
    shutil.copytree(clean, new)
    t, v = rows(new, "train"), rows(new, "val")
    change(new, "train", t[0], colour="pink")
    paint_critter(random_critter(4711), 64).save(new / "train" / t[1])
    (new / "train" / t[2]).rename(new / "val" / t[2])
    moved = next(r for r in read_metadata(clean, "train") if r["file_name"] == t[2])
    path = new / "train/metadata.jsonl"
    path.write_text("".join(line + "\n" for line in path.read_text().splitlines() if f'"{t[2]}"' not in line))
    append(new, "val", json.dumps(moved))
    path = new / "val/metadata.jsonl"
    (new / "val" / v[0]).unlink()
    path.write_text("".join(line + "\n" for line in path.read_text().splitlines() if f'"{v[0]}"' not in line))
    write_manifest(new)
    text = data_report(clean, new, tmp_path / "report").read_text()
    assert "1 moved · 0 added · 1 removed · 1 changed image · 1 changed facts · 0 changed captions" in text
    assert "**1 pictures moved between splits" in text and t[2] in text and v[0] in text
    assert f"| train | {len(t)} | {len(t) - 1} |" in text and "| leakage |" not in text.split("## New")[0]
    assert Image.open(tmp_path / "report/classes.png").size[0] > 500 and (tmp_path / "report/sheet.png").is_file()
    first = data_report(None, clean, tmp_path / "first", images=False).read_text()
    assert "120 added" in first and "| sha256 | none |" in first and not (tmp_path / "first/sheet.png").exists()
    with pytest.raises(FileNotFoundError, match="must be a dataset folder"): data_report(clean, tmp_path / "first")


def test_the_table_survives_odd_names(clean, tmp_path):
    bad = tmp_path / "bad"
    shutil.copytree(clean, bad)
    append(bad, "val", '{"file_name": "a|b\\nc.png"}')
    table = findings_table(check_dataset(bad))
    assert "a\\|b c.png" in table and all(line.startswith("|") for line in table.splitlines())
