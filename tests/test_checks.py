"""Guards of chapter 01b: every fault is named, nothing else is, and the report says what changed."""
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import yaml
from PIL import Image, ImageOps

from pokemon_nb import checks, data
from pokemon_nb.captioning import caption_dataset
from pokemon_nb.checks import CHECKS, check_dataset, data_report, findings_table, pokemon_data, pokemon_report
from pokemon_nb.data import SPLITS, Critter, build_dataset, dataset_hash, paint_critter, random_critter, read_metadata

ROOT = Path(__file__).parents[1]
REAL = ROOT.parent/"shared"/"pokemon"
WORKFLOW = ROOT/".github"/"workflows"/"data-report.yml"


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    folder = build_dataset("critters", tmp_path_factory.mktemp("checks")/"data", n=120, size=64)
    caption_dataset(folder)
    return folder


@pytest.fixture
def root(clean, tmp_path): return Path(shutil.copytree(clean, tmp_path/"data"))


def rows_of(root, split="train"):
    return [json.loads(t) for t in (root/split/"metadata.jsonl").read_text(encoding="utf-8").splitlines()]


def write(root, rows, split="train"):
    text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
    (root/split/"metadata.jsonl").write_text(text, encoding="utf-8")


def reseal(root):
    "Write the manifest that a build of this very content would have: what is left are the faults of the content."
    made = json.loads((root/"dataset.json").read_text())
    for s in SPLITS:
        rows = [r for t in (root/s/"metadata.jsonl").read_text().splitlines() if (r := as_row(t))]
        families = {str(r["family"]) for r in rows}
        made["splits"][s] = dict(images=len(list((root/s).rglob("*.png"))), families=len(families))
    made["images"] = sum(v["images"] for v in made["splits"].values())
    (root/"dataset.json").write_text(json.dumps(made | dict(hash=dataset_hash(root))))


def as_row(text):
    try: return json.loads(text)
    except ValueError: return None


def change(root, k, split="train", **facts):
    "Other facts for row k; captions go with them."
    rows = rows_of(root, split)
    rows[k] |= facts
    write(root, rows, split)
    return f"{split}/{rows[k]['file_name']}"


def add_row(root, image, file_name, split="train", **facts):
    "A new picture with a row of its own."
    image.save(root/split/file_name)
    rows = rows_of(root, split)
    base = dict(file_name=file_name, id=7000 + len(file_name) + len(rows), name=file_name, types=["ice"],
                colour="blue", shape="ball", source="critters", text="a creature", captions=["a creature"])
    row = base | dict(family=base["id"]) | facts
    if row["colour"] == "any": del row["colour"], row["source"]
    write(root, rows + [row], split)
    return f"{split}/{file_name}"


def picture(root, k, split="train"): return Image.open(root/split/rows_of(root, split)[k]["file_name"]).convert("RGBA")
def file(root, k, split="train"): return root/split/rows_of(root, split)[k]["file_name"]
def named(p): return f"{p.parent.name}/{p.name}"


# --- the faults: each plants one and returns the (kind, place) that must be told ------------------------------------
def corrupt(root):
    p = file(root, 3); b = bytearray(p.read_bytes()); b[len(b)//2] ^= 0x5A; p.write_bytes(bytes(b))
    return "corrupt image", named(p)


def truncated(root):
    p = file(root, 8); p.write_bytes(p.read_bytes()[:-300])
    return "truncated image", named(p)


def exact(root):
    return "exact duplicate", add_row(root, picture(root, 12), "zz_same.png", colour="any")


def nearly(root):
    im = picture(root, 20)
    r, g, b, a = im.split()
    moved = Image.new("RGBA", im.size); moved.paste(Image.merge("RGBA", (g, b, r, a)), (1, 0))
    return "near duplicate", add_row(root, moved, "zz_recoloured.png", colour="any")


def lost_picture(root):
    p = file(root, 30); p.unlink()
    return "row without image", named(p)


def lost_row(root):
    paint_critter(random_critter(5001), 64).save(root/"train"/"zz_nobody.png")
    return "image without row", "train/zz_nobody.png"


def bad_line(root):
    p = root/"train"/"metadata.jsonl"
    lines = p.read_text(encoding="utf-8").splitlines()
    lines[40] = lines[40][:-1]
    p.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return "bad row", "train/metadata.jsonl"


def contradiction(root):
    first = rows_of(root)[50]
    return "contradictory row", add_row(root, paint_critter(random_critter(5002), 64), "zz_other.png",
                                        **{k: first[k] for k in ("id", "family", "types", "shape")}, colour="any")


def strange_word(root): return "unknown word", change(root, 60, shape="cube")


def leaking_family(root):
    family = rows_of(root)[70]["family"]
    return "family in two splits", add_row(root, paint_critter(random_critter(5003), 64), "zz_stray.png", "val",
                                           family=family, colour="any")


def leaking_picture(root):
    im = picture(root, 80)
    flat = Image.alpha_composite(Image.new("RGBA", im.size, "white"), im).convert("RGB")
    flat.save(root/"jpeg.jpg", quality=85)
    again = Image.open(root/"jpeg.jpg"); again.load(); (root/"jpeg.jpg").unlink()
    return "image in two splits", add_row(root, again, "zz_leak.png", "test", colour="any")


def wrong_colour(root):
    im = paint_critter(Critter("yellow", "ball", ("fire",), eyes="dot", seed=4), 64)
    return "palette outlier", add_row(root, im, "zz_called_blue.png")


def large(root):
    return "size outlier", add_row(root, paint_critter(random_critter(5004), 256), "zz_large.png", colour="any")


def blank(root): return "blank picture", add_row(root, Image.new("RGBA", (64, 64)), "zz_blank.png", colour="any")


def no_picture(root):
    p = file(root, 15); p.write_text("<html>404</html>")
    return "not an image", named(p)


def negative(root): return "bad value", change(root, 17, height_m=-.4)
def no_name(root): return "missing fact", change(root, 18, name="")
def empty_caption(root): return "bad caption", change(root, 19, text=" ")



def lying_caption(root):
    wrong = next(c for c in ("red", "blue") if c != rows_of(root)[21]["colour"])
    return "caption against facts", change(root, 21, text=f"a {wrong} thing", captions=[f"a {wrong} thing"])


def escaping(root):
    rows = rows_of(root)
    write(root, rows + [dict(rows[0], file_name="../secret.png", id=9001, family=9001)])
    return "unsafe file_name", "train/metadata.jsonl"


def twice(root):
    rows = rows_of(root); write(root, rows + [rows[5]])
    return "duplicate file_name", f"train/{rows[5]['file_name']}"


def animated(root):
    p = file(root, 22); im = picture(root, 22)
    im.save(p, save_all=True, append_images=[im.rotate(5)])
    return "unusable picture", named(p)


def bomb(root):
    "A header of 3.6 gigapixels before pixels for one line."
    p = file(root, 23)
    data = p.read_bytes()
    head = data[12:16] + struct.pack(">II", 60_000, 60_000) + data[24:29]
    p.write_bytes(data[:12] + head + struct.pack(">I", zlib.crc32(head)) + data[33:])
    return "unusable picture", named(p)


def wrong_root(root):
    rows = rows_of(root)
    own = [r["family"] == r["id"] for r in rows]
    k = next(k for k in range(len(rows)) if own[k] and own[k + 1])           # a family of one
    return "family mismatch", change(root, k, family=next(r["id"] for r in rows if r["id"] != r["family"]))


TWELVE = (corrupt, truncated, exact, nearly, lost_picture, lost_row, contradiction, strange_word, leaking_family,
          leaking_picture, large, bad_line)                                # the unreadable line last: others add rows
MORE = (wrong_colour, blank, no_picture, negative, no_name, empty_caption, lying_caption, escaping, twice, wrong_root,
        animated, bomb)


def told(root, **kw):
    return [(f.kind, "/".join(x for x in (f.split, f.file) if x)) for f in check_dataset(root, progress=False, **kw)]


def test_a_clean_folder_has_no_finding(clean): assert told(clean) == []


def test_twelve_faults_get_twelve_names_and_nothing_else(root):
    planted = [fault(root) for fault in TWELVE]
    assert len({k for k, _ in planted}) == 12
    reseal(root)
    assert sorted(told(root)) == sorted(planted)


@pytest.mark.slow
def test_the_command_names_the_twelve_faults_and_nothing_else(root, tmp_path):
    planted = [fault(root) for fault in TWELVE]
    reseal(root)
    done = subprocess.run(["pokemon_data", "--check", str(root), "--format", "json"], env=scripts(tmp_path/"bin"),
                          capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    found = [(f["kind"], f"{f['split']}/{f['file']}") for f in json.loads(done.stdout)]
    assert sorted(found) == sorted(planted) and len(found) == 12


@pytest.mark.parametrize("fault", TWELVE + MORE, ids=lambda f: f.__name__)
def test_each_fault_alone(root, fault):
    planted = fault(root); reseal(root)
    found = check_dataset(root, progress=False)
    assert [(f.kind, f"{f.split}/{f.file}") for f in found] == [planted]
    assert (found[0].severity, found[0].todo) == CHECKS[found[0].kind] and found[0].detail


def test_two_runs_give_the_same_list(root):
    for fault in TWELVE: fault(root)
    assert check_dataset(root, progress=False) == check_dataset(root, progress=False)


@pytest.mark.parametrize("how", ["as it is", "one pixel", "jpeg", "larger", "half", "hue", "gray", "padded"])
def test_changed_copies_are_found(root, how):
    im = paint_critter(random_critter(77), 128)
    r, g, b, a = im.split()
    moved = Image.new("RGBA", im.size); moved.paste(im, (1, 1))
    flat = Image.alpha_composite(Image.new("RGBA", im.size, "white"), im).convert("RGB")
    flat.save(root/"a.jpg", quality=75)
    with Image.open(root/"a.jpg") as j: jpeg = j.convert("RGBA")
    (root/"a.jpg").unlink()
    copy = {"as it is": flat, "one pixel": moved, "jpeg": jpeg, "larger": im.resize((192, 192)),
            "half": im.resize((64, 64)), "hue": Image.merge("RGBA", (b, r, g, a)),
            "gray": Image.merge("RGBA", (*[im.convert("L")]*3, a)), "padded": ImageOps.expand(im, 9)}[how]
    folder = root.parent/"raw"; folder.mkdir()
    for k in range(20): paint_critter(random_critter(200 + k), 128).save(folder/f"{k}.png")
    im.save(folder/"original.png"); copy.save(folder/"z_copy.png")
    half = [("size outlier", "z_copy.png")] if how == "half" else []         # which it is, too
    assert told(folder) == [("near duplicate", "z_copy.png"), *half]
    assert told(folder, near=False) == half


# --- manifest, folders, values that are not what they should be ------------------------------------------------------
def test_an_edit_after_the_build_is_told_once(root):
    change(root, 4, height_m=9.)
    assert told(root) == [("changed since build", "dataset.json")]
    reseal(root)
    made = json.loads((root/"dataset.json").read_text())
    made["splits"]["val"]["images"] += 1
    (root/"dataset.json").write_text(json.dumps(made))
    assert told(root) == [("wrong counts", "dataset.json")]
    for text in ("{", "[]", "{}", '{"splits": {"train": 3}, "hash": 1}'):
        (root/"dataset.json").write_text(text)
        assert told(root) == [("bad manifest", "dataset.json")]


def test_a_missing_split_is_told(root):
    shutil.rmtree(root/"val")
    (root/"test"/"metadata.jsonl").unlink()
    kinds = {k for k, _ in told(root)}
    assert kinds == {"missing split", "changed since build"}


@pytest.mark.parametrize("key", "id family types colour shape text captions height_m name source".split())
@pytest.mark.parametrize("value", [None, [], {}, [[1]], 3.5, "\ud800", True, float("nan")], ids=repr)
def test_no_value_stops_the_check(clean, tmp_path, key, value):
    part = checks._Part("train", tmp_path, "metadata.jsonl")
    part.rows = [(1, rows_of(clean)[0] | {key: value}), (2, rows_of(clean)[1])]
    for line, r in part.rows: checks._check_facts(part, line, r); checks._check_captions(part, line, r, True)
    checks._check_families([part], checks._check_ids([part]))
    findings_table(part.found).encode("utf-8", "replace")


def test_raw_source_with_a_table(tmp_path):
    folder = tmp_path/"dex"; (folder/"images").mkdir(parents=True)
    head = ("id,name,genus,type_1,type_2,color,shape,habitat,generation,egg_groups,height_dm,weight_hg,evolves_from,"
            "is_baby,is_legendary,is_mythical")
    line = "{0},N{0},,grass,,{1},blob,,1,,{2},9,{3},0,0,0"
    rows = [line.format(k, random_critter(k).colour, 7, "") for k in range(1, 31)]
    rows[4] = line.format(5, "teal", 7, "")
    rows[5] = line.format(6, random_critter(6).colour, 0, "99")
    rows += [line.format(7, "red", 7, ""), "31,short"]
    (folder/"pokedex.csv").write_text("\n".join([head, *rows]) + "\n")
    for k in range(1, 31):
        paint_critter(random_critter(k), 64).save(folder/"images"/f"{k:03}{'r' if k == 9 else ''}.png")
    (folder/"images"/"008.png").unlink()
    paint_critter(random_critter(400), 64).save(folder/"images"/"400.png")
    want = [("bad row", "pokedex.csv"), ("bad value", "images/006.png"), ("contradictory row", "images/007.png"),
            ("image without row", "images/400.png"), ("row without image", "images/008.png"),
            ("unknown word", "images/005.png")]
    assert sorted(told(folder)) == want                       # species 99 may stand in the row that can not be read
    (folder/"pokedex.csv").write_text("\n".join([head, *rows[:-1]]) + "\n")
    assert sorted(told(folder)) == sorted([*want[1:], want[1]])                       # height 0, and evolves from 99


def stranger(folder, name):
    "Something that a data folder must not hold, at folder/name."
    p = folder/name
    if name == "pipe.png": os.mkfifo(p)
    elif name == "logo.svg": p.write_text("<svg/>")
    elif name == "folder.png": p.mkdir()
    else: p.symlink_to({"out.png": SECRET, "nowhere.png": "nothing", "self.png": "self.png", "round": ".",
                        "outside": SECRET.parent, "metadata.jsonl": SECRET}[name])


SECRET = Path(__file__)
STRANGERS = {"pipe.png": "not a file", "logo.svg": "unusable picture", "folder.png": "not a file",
             "out.png": "unsafe link", "nowhere.png": "unsafe link", "self.png": "unsafe link", "round": "unsafe link",
             "outside": "unsafe link"}


def test_strangers_are_named_and_not_opened(root, tmp_path):
    "In a build, in a raw folder; with a row of their own, too."
    raw = tmp_path/"raw"; raw.mkdir()
    for k in range(20): paint_critter(random_critter(k), 64).save(raw/f"{k}.png")
    for name in STRANGERS: stranger(raw, name); stranger(root/"val", name)
    add_row(root, paint_critter(random_critter(3), 64), "outside.png", "val", colour="any")
    rows = rows_of(root, "val")
    write(root, rows + [dict(rows[-1], file_name="out.png", id=9101, family=9101),
                        dict(rows[-1], file_name="outside/x.png", id=9102, family=9102)], "val")
    assert sorted(told(raw)) == sorted((kind, name) for name, kind in STRANGERS.items())
    found = [f for f in check_dataset(root, progress=False) if f.file != "dataset.json"]
    assert sorted((f.kind, f.file) for f in found if f.split) == sorted((k, n) for n, k in STRANGERS.items())
    assert "every fault is named" not in findings_table(found)                  # a line of the file that is linked to
    for p in (raw/"metadata.jsonl", raw/"pokedex.csv"): p.symlink_to(SECRET)
    assert [f.detail for f in check_dataset(raw) if f.kind == "bad row"] == []
    (root/"test"/"metadata.jsonl").unlink(); stranger(root/"test", "metadata.jsonl")
    shutil.rmtree(root/"train"); (root/"train").symlink_to(SECRET.parent)
    kinds = [(f.kind, f.split, f.file) for f in check_dataset(root, progress=False) if f.file != "dataset.json"]
    assert ("unsafe link", "test", "metadata.jsonl") in kinds and ("unsafe link", "train", "") in kinds
    assert not any(f in ("missing split",) for f, *_ in kinds)


def test_links_into_the_cache_of_dvc_are_the_datas_own(root, tmp_path):
    for k in range(3):
        p = file(root, k)
        stored = tmp_path/"cache"/"files"/"md5"/f"0{k}"/("a"*30)
        stored.parent.mkdir(parents=True)
        shutil.move(p, stored); p.symlink_to(stored)
    assert told(root) == []


def test_links_that_multiply_are_stopped(tmp_path, monkeypatch):
    "Twenty folders that hold two links to the next one: a million pictures from one."
    monkeypatch.setattr(data, "_MAX_LINKED", 500)
    for k in range(20):
        (tmp_path/"raw"/f"{k:02}").mkdir(parents=True)
        for name in "ab": (tmp_path/"raw"/f"{k:02}"/name).symlink_to(f"../{k + 1:02}")
    (tmp_path/"raw"/"20").mkdir(); paint_critter(random_critter(1), 16).save(tmp_path/"raw"/"20"/"a.png")
    for action in (check_dataset, lambda p: build_dataset(p, tmp_path/"data")):
        with pytest.raises(ValueError, match="at most 500 files through links, got more at"): action(tmp_path/"raw")
    assert not (tmp_path/"data").exists()


def test_unusable_folders_and_a_missing_package(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="does not exist"): check_dataset(tmp_path/"no")
    (tmp_path/"empty").mkdir()
    with pytest.raises(ValueError, match="hold pictures"): check_dataset(tmp_path/"empty")
    monkeypatch.setitem(sys.modules, "imagehash", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'pokemon_nb\[data\]'"): check_dataset(tmp_path)


def test_a_table_can_not_be_broken_by_a_name(tmp_path):
    for name in ("a|b.png", "<img src=x>.png"): (tmp_path/name).write_bytes(b"no picture")
    lines = findings_table(check_dataset(tmp_path)).splitlines()
    assert sum("not an image" in x and x.startswith("|") for x in lines) == 1 and "2 errors, 0 warnings" == lines[0]
    body = [x for x in lines if x.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", x)) for x in body} == {6} and not any("<img" in x for x in lines)


# --- the real data --------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.skipif(not (REAL/"pokedex.csv").is_file(), reason="no real data beside the repository")
def test_the_real_data_has_no_error(tmp_path):
    raw = check_dataset(REAL, progress=False)
    assert [f.kind for f in raw] == ["palette outlier"]                     # a gray ghost that the table calls black
    out = build_dataset(REAL, tmp_path/"data"); caption_dataset(out)
    built = check_dataset(out, progress=False)
    assert [(f.kind, f.file) for f in built] == [("palette outlier", Path(raw[0].file).name)]


@pytest.mark.slow
def test_a_thousand_critters_have_no_finding(tmp_path):
    assert told(build_dataset("critters", tmp_path/"data", n=1000)) == []


# --- the report -----------------------------------------------------------------------------------------------------
@pytest.fixture
def newer(root):
    rows = rows_of(root)
    gone = rows.pop(2); (root/"train"/gone["file_name"]).unlink()
    os.rename(root/"train"/rows[5]["file_name"], root/"train"/"new_name.png"); rows[5]["file_name"] = "new_name.png"
    paint_critter(random_critter(5005), 64).save(root/"train"/rows[9]["file_name"])
    rows[11]["weight_kg"] += 1
    write(root, rows)
    stray = rows_of(root, "test")[0]
    write(root, rows_of(root, "test")[1:], "test"); write(root, rows_of(root) + [stray])
    os.rename(root/"test"/stray["file_name"], root/"train"/stray["file_name"])
    add_row(root, paint_critter(random_critter(5006), 64), "added.png", colour="any", name="`|<b>New")
    return root


def test_the_report_says_what_changed(clean, newer, tmp_path):
    path = data_report(clean, newer, tmp_path/"report", progress=False)
    text = path.read_text(encoding="utf-8")
    assert "1 added, 1 removed, 1 renamed, 1 with another picture, 1 with other facts or captions, 1 moved" in text
    assert "1 of them from test to train" in text and f"`{dataset_hash(newer)[:12]}`" in text
    assert "changed since build" in text and "`???b>New`" not in text and "<b>New" not in re.sub(r"`[^`]*`", "", text)
    assert sorted(p.name for p in path.parent.iterdir()) == ["captions.png", "classes.png", "contact.png", "report.md"]
    assert set(re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)) == {"captions.png", "classes.png", "contact.png"}
    for p in path.parent.glob("*.png"): assert Image.open(p).width > 100 and p.stat().st_size < 200_000
    assert text.count("<details>") == text.count("</details>") and len(text) < 65_536


def test_without_images_nothing_of_a_picture_is_left(clean, newer, tmp_path):
    data_report(clean, newer, tmp_path/"report", progress=False)
    pokemon_report(str(clean), str(newer), out=str(tmp_path/"report"), no_images=True)
    assert sorted(p.name for p in (tmp_path/"report").iterdir()) == ["captions.png", "classes.png", "report.md"]
    assert "contact" not in (tmp_path/"report"/"report.md").read_text()


def test_a_first_version_and_no_change(clean):
    first, same = (data_report(old, clean, progress=False) for old in (None, clean))
    assert "120 added, 0 removed" in first and "and 60 more" in first
    assert "0 added, 0 removed, 0 renamed, 0 with another picture, 0 with other facts or captions, 0 moved" in same
    assert "WARNING" not in same and "| none |" in same


def test_the_report_refuses_at_the_door(clean, tmp_path):
    with pytest.raises(FileNotFoundError, match="must be datasets"): data_report(tmp_path, clean)
    with pytest.raises(ValueError, match="outside of the datasets"): data_report(None, clean, clean/"report")
    (tmp_path/"mine").mkdir(); (tmp_path/"mine"/"thesis.txt").write_text("x")
    with pytest.raises(FileExistsError, match="other files"): data_report(None, clean, tmp_path/"mine")
    with pytest.raises(ValueError, match="got the file"): data_report(None, clean, tmp_path/"mine"/"thesis.txt")
    assert [p.name for p in (tmp_path/"mine").iterdir()] == ["thesis.txt"]


# --- the command line and the workflow ------------------------------------------------------------------------------
def test_exit_codes(clean, root, capsys):
    pokemon_data(check=str(clean)); pokemon_data(check="", out=str(clean))
    assert capsys.readouterr().out.count("nothing found") == 2
    large(root); reseal(root)
    pokemon_data(check=str(root))                                            # a warning is no error
    with pytest.raises(SystemExit) as e: pokemon_data(check=str(root), strict=True)
    assert e.value.code == 1
    lost_row(root); reseal(root)
    capsys.readouterr()
    with pytest.raises(SystemExit) as e: pokemon_data(check=str(root), format="json")
    found = json.loads(capsys.readouterr().out)
    assert e.value.code == 1 and [f["kind"] for f in found] == ["image without row", "size outlier"]
    for wrong in (dict(check="nowhere"), dict(check=str(root), format="xml")):
        with pytest.raises(SystemExit) as e: pokemon_data(**wrong)
        assert e.value.code == 2


def scripts(folder):
    "The two console scripts as files, so that a shell finds this checkout's."
    folder.mkdir()
    for name in ("pokemon_data", "pokemon_report"):
        (folder/name).write_text(f"#!{sys.executable}\nfrom pokemon_nb.checks import {name}\n{name}()\n")
        (folder/name).chmod(0o755)
    return os.environ | dict(PATH=f"{folder}:{os.environ['PATH']}", PYTHONPATH=str(ROOT))


@pytest.mark.slow
def test_check_takes_a_folder_or_none(clean, tmp_path):
    env = scripts(tmp_path/"bin")
    def run(*args):
        return subprocess.run(["pokemon_data", *map(str, args)], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert run("--check", clean).returncode == 0
    assert run("--out", clean, "--check").returncode == 0
    lost = run("--check")
    assert lost.returncode == 2 and "root must be a folder, got 'data'" in lost.stderr
    assert not (tmp_path/"data").exists()


def steps(): return yaml.safe_load(WORKFLOW.read_text())["jobs"]["report"]["steps"]


def test_the_workflow_is_valid_and_pinned():
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", str(WORKFLOW)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    uses = [s["uses"] for s in steps() if "uses" in s]
    assert uses and all(re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", u) for u in uses), "an action is pinned by its commit"
    flow = yaml.safe_load(WORKFLOW.read_text())
    assert flow["permissions"] == {"contents": "read"} and flow["defaults"]["run"]["shell"] == "bash"
    assert all(s.get("if", "").startswith("env.HAS_KEY") for s in steps()), "a step without a key must not run silently"
    text = WORKFLOW.read_text()
    assert "pokemon_report \"$old\" head/data --out report --no_images" in text
    assert "upload-artifact" not in text


@pytest.mark.slow
@pytest.mark.parametrize("case, code", [("clean", 0), ("bad", 1), ("first", 0), ("gone", 0)])
def test_the_workflow_step_runs(clean, newer, tmp_path, case, code):
    (step,) = (s["run"] for s in steps() if "pokemon_report \"$old\"" in s.get("run", ""))
    at = tmp_path/"job"; (at/"head").mkdir(parents=True); (at/"base").mkdir()
    if case != "gone": shutil.copytree(newer if case == "bad" else clean, at/"head"/"data")
    if case != "first": shutil.copytree(clean, at/"base"/"data")
    env = scripts(tmp_path/"bin") | dict(GITHUB_STEP_SUMMARY=str(tmp_path/"summary"))
    done = subprocess.run(["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step], cwd=at, env=env,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (at/"report"/"report.md").is_file() and (at/"check.exit").read_text().strip() == str(code)
    assert not (at/"report"/"contact.png").exists()
    if case == "bad": assert "changed since build" in (tmp_path/"summary").read_text()


def test_read_metadata_agrees_on_a_clean_folder(clean):
    "What the tolerant reader reads is what the strict one reads."
    for part in checks._parts(clean): assert [r for _, r in part.rows] == read_metadata(clean, part.split)
