"""Guards of chapter 01: the two kinds of folders that users bring, the real table, and what is wrong with them."""
import csv
import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from pokemon_nb.data import (
    SPLITS, Pokedex, PokemonDataset, build_dataset, dataset_hash, open_dataset, paint_critter, random_critter,
    read_metadata, split_of, write_atomic,
)

REAL = Path(__file__).parents[2]/"shared"/"pokemon"
needs_real = pytest.mark.skipif(not (REAL/"pokedex.csv").is_file(), reason="no real table beside the repository")
ROW = dict(id="1", name="Leafling", genus="Sprout Pokémon", type_1="grass", type_2="", color="green", shape="upright",
           habitat="", generation="1", egg_groups="plant", height_dm="7", weight_hg="69", evolves_from="", is_baby="0",
           is_legendary="0", is_mythical="0")


def write_pokedex(folder, rows):
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder/"pokedex.csv", "w", newline="", encoding="utf-8") as f:
        table = csv.DictWriter(f, ROW); table.writeheader(); table.writerows([ROW | r for r in rows])
    return folder/"pokedex.csv"


@pytest.fixture
def zoo(tmp_path):
    """A source like the real one, of critters: 80 species, two pairs, one stray suffix, one opaque white."""
    folder = tmp_path/"zoo"
    parent = lambda k: str(k - 1) if k in (8, 12) else ""
    write_pokedex(folder, [dict(id=str(k), name=f"N{k}", evolves_from=parent(k)) for k in range(1, 81)])
    (folder/"images").mkdir()
    for k in range(1, 81):
        im = paint_critter(random_critter(k), 24)
        if k == 9: im = Image.alpha_composite(Image.new("RGBA", im.size, "white"), im)
        im.save(folder/"images"/f"{k:03}{'r' if k == 7 else ''}.png")
    return folder


def test_pokemon_folder(zoo, tmp_path, capsys):
    out = build_dataset(zoo, tmp_path/"data")
    info = open_dataset(out)
    assert (info.source, sum(info.counts.values()), info.mattes) == ("pokemon", 80, 1)
    assert "1 of 80 images stand on opaque white" in capsys.readouterr().out
    rows = {r["id"]: (s, r) for s in SPLITS for r in read_metadata(out, s)}
    assert rows[7][1]["file_name"] == "007.png" and rows[8][1]["family"] == 7 and rows[8][0] == rows[7][0]
    assert rows[1][1] | dict(source="pokemon") == rows[1][1] and rows[1][1]["genus"] == "Sprout"
    assert (out/rows[7][0]/"007.png").read_bytes() == (zoo/"images"/"007r.png").read_bytes()
    assert dataset_hash(build_dataset(zoo, tmp_path/"again")) == info.hash


@pytest.mark.parametrize("change, why", [
    (dict(color="teal"), "line 3: color must be a known word, got 'teal'"), (dict(shape="cube"), "shape"),
    (dict(type_1=""), "type_1"), (dict(type_2="sound"), "type_2"),
    (dict(height_dm="tall"), "height_dm must be a number"),
    (dict(weight_hg="-3"), "weight_hg"), (dict(height_dm="inf"), "height_dm"), (dict(is_baby="yes"), "is_baby"),
    (dict(id="0"), "id must be"), (dict(id="1"), "id must be unique"), (dict(name=" "), "name must not be empty"),
    (dict(evolves_from="99"), "evolves_from must be an id of the table, got 99"), (dict(evolves_from="2"), "circle"),
])
def test_bad_pokedex_values_name_the_line(tmp_path, change, why):
    path = write_pokedex(tmp_path, [{}, dict(id="2") | change])
    with pytest.raises(ValueError, match=why) as e: Pokedex.read(path)
    assert "line 3" in str(e.value) and str(path) in str(e.value)


def test_bad_pokedex_files(tmp_path):
    with pytest.raises(ValueError, match="missing: name"):
        Pokedex.read(write_atomic(tmp_path/"a.csv", "id,genus\n1,x\n"))
    with pytest.raises(ValueError, match="at least one row"): Pokedex.read(write_pokedex(tmp_path, []))
    text = write_pokedex(tmp_path, [{}]).read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="line 3: the row must have one cell"):
        Pokedex.read(write_atomic(tmp_path/"b.csv", text + "2,Halfling\n"))
    with pytest.raises(ValueError, match="d.csv line 2: must be UTF-8, got the byte 0xe9"):
        Pokedex.read(write_atomic(tmp_path/"d.csv", text.encode().replace(b"Leafling", b"Leafl\xe9")))
    with pytest.raises(ValueError, match="c.csv line 2: must be CSV"):
        Pokedex.read(write_atomic(tmp_path/"c.csv", text.replace("Leafling", "x"*200_000)))


def test_pairs_are_checked_both_ways(zoo, tmp_path):
    (zoo/"images"/"003.png").rename(zoo/"images"/"099.png")
    with pytest.raises(ValueError, match="1 without: 003.png; add the images"): build_dataset(zoo, tmp_path/"data")
    Image.new("RGBA", (8, 8)).save(zoo/"images"/"003.png")
    with pytest.raises(ValueError, match="1 without: 099.png; add the rows"): build_dataset(zoo, tmp_path/"data")
    (zoo/"images"/"099.png").rename(zoo/"images"/"007.png")
    with pytest.raises(ValueError, match="one file per species, got 007.png and 007r.png"):
        build_dataset(zoo, tmp_path/"data")
    assert [p.name for p in tmp_path.iterdir()] == ["zoo"]


def test_truncated_png_is_named_and_nothing_stays(zoo, tmp_path):
    p = zoo/"images"/"012.png"
    p.write_bytes(p.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"012\.png"): build_dataset(zoo, tmp_path/"data")
    assert [q.name for q in tmp_path.iterdir()] == ["zoo"]


def test_missing_and_empty_sources(tmp_path):
    with pytest.raises(FileNotFoundError, match="'critters' or a folder, got"):
        build_dataset(tmp_path/"no", tmp_path/"data")
    (tmp_path/"empty").mkdir()
    with pytest.raises(ValueError, match="source must hold pictures, got none"):
        build_dataset(tmp_path/"empty", tmp_path/"data")
    (tmp_path/"dex"/"images").mkdir(parents=True); write_pokedex(tmp_path/"dex", [{}])
    with pytest.raises(ValueError, match="1 without: 001.png"): build_dataset(tmp_path/"dex", tmp_path/"data")
    assert not (tmp_path/"data").exists()


def test_out_must_lie_outside_of_source(zoo):
    for out in (zoo, zoo/"data", zoo.parent):
        with pytest.raises(ValueError, match="outside of source"): build_dataset(zoo, out)


def pictures(folder, names, **kw):
    folder.mkdir(parents=True, exist_ok=True)
    for k, n in enumerate(names): paint_critter(random_critter(k), 24).convert(kw.get("mode", "RGBA")).save(folder/n)


def test_any_folder_without_metadata(tmp_path):
    pictures(tmp_path/"mine"/"cats", [f"cat{k}.png" for k in range(30)])
    pictures(tmp_path/"mine", [f"dog{k}.jpg" for k in range(10)], mode="RGB")
    write_atomic(tmp_path/"mine"/"notes.txt", "not a picture")
    pictures(tmp_path/"mine"/".thumbs", ["t.png"])
    out = build_dataset(tmp_path/"mine", tmp_path/"data")
    rows = [r for s in SPLITS for r in read_metadata(out, s)]
    assert len(rows) == 40 and {r["source"] for r in rows} == {"folder"}
    assert {"cats/cat3.png", "dog3.png"} <= {r["file_name"] for r in rows}
    assert len(PokemonDataset(out, "train", size=16)) == open_dataset(out).counts["train"]


def test_any_folder_with_metadata_and_splits(tmp_path):
    for s in SPLITS:
        pictures(tmp_path/"mine"/s, ["a.png", "b.png"])
        rows = [dict(file_name=n, text=f"{s} {n}", family=f"{s}-fam") for n in ("a.png", "b.png")]
        write_atomic(tmp_path/"mine"/s/"metadata.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
    out = build_dataset(tmp_path/"mine", tmp_path/"data")
    assert [r["text"] for r in read_metadata(out, "val")] == ["val a.png", "val b.png"]
    meta = tmp_path/"mine"/"val"/"metadata.jsonl"
    write_atomic(meta, meta.read_text().replace("val-fam", "train-fam"))
    with pytest.raises(ValueError, match="family must stay in one split, got 'train-fam' in train and val"):
        build_dataset(tmp_path/"mine", tmp_path/"other")


def test_metadata_of_strangers(tmp_path):
    "A line separator inside of a sentence is text; what JSON, UTF-8 or Python can not carry is named by its line."
    pictures(tmp_path/"mine", [f"{k}.png" for k in range(40)])
    meta, rows = tmp_path/"mine"/"metadata.jsonl", [dict(file_name=f"{k}.png", text="one\u2028two") for k in range(40)]
    write_atomic(meta, "\ufeff" + "".join(json.dumps(r, ensure_ascii=False) + "\r\n" for r in rows))
    out = build_dataset(tmp_path/"mine", tmp_path/"data")
    assert {r["text"] for s in SPLITS for r in read_metadata(out, s)} == {"one\u2028two"}
    for bad, why in ((b'{"file_name": "0.png", "text": "\xe9"}', "byte 0xe9 is not UTF-8"),
                     (b"["*100_000, "nested too deep"),
                     (b'{"file_name": "0.png", "text": "\\ud83d"}', "half of a surrogate pair"),
                     (b"1"*5000, "must be one JSON object")):
        write_atomic(meta, b"\n" + bad)
        with pytest.raises(ValueError, match=f"metadata.jsonl line 2: .*{why}"):
            build_dataset(tmp_path/"mine", tmp_path/"other")


def test_tiny_and_clashing_folders_say_what_to_do(tmp_path):
    pictures(tmp_path/"two", ["a.png", "b.png"])
    with pytest.raises(ValueError, match="sort them into train/, val/ and test/"):
        build_dataset(tmp_path/"two", tmp_path/"data")
    pictures(tmp_path/"clash", ["a.png", "a.webp"])
    with pytest.raises(ValueError, match="differ in name before the suffix, got 'a.png' twice"):
        build_dataset(tmp_path/"clash", tmp_path/"data")
    pictures(tmp_path/"meta", ["a.png"]); write_atomic(tmp_path/"meta"/"metadata.jsonl", '{"file_name": "b.png"}\n')
    with pytest.raises(ValueError, match="1 without: b.png"): build_dataset(tmp_path/"meta", tmp_path/"data")
    assert not (tmp_path/"data").exists()


@needs_real
def test_the_real_table():
    dex = Pokedex.read(REAL/"pokedex.csv")
    assert len(dex) == 809 and dex.family(3) == 1 and dex.family(25) == 172
    home = {}
    for r in dex.rows: assert home.setdefault(r["family"], split_of(r["family"])) == split_of(r["family"])
    counts = Counter(split_of(r["family"]) for r in dex.rows)
    assert counts == {"train": 648, "val": 81, "test": 80}


@needs_real
@pytest.mark.slow
def test_the_real_build_is_deterministic(tmp_path):
    a, b = (build_dataset(REAL, tmp_path/n) for n in "ab")
    assert dataset_hash(a) == dataset_hash(b) and open_dataset(a).mattes == 0
    home = {}
    for s in SPLITS:
        for r in read_metadata(a, s): assert home.setdefault(r["family"], s) == s
