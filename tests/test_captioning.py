"""Guards for chapter 02: the grammar, the sentence vectors, captioning of whole datasets, and the command line."""
import json, os, shutil, subprocess, sys
from pathlib import Path

import pytest
import torch

from pokemon_nb.captioning import (SHAPE_WORDS, TextEncoder, caption_dataset, captions_from_facts, check_prompt,
                                   drop_captions, embed_captions, pokemon_caption, size_word)
from pokemon_nb.data import COLOURS, SHAPES, TYPES, build_dataset, dataset_hash, open_dataset, read_metadata

FACTS = dict(name="Squirtle", genus="Tiny Turtle", colour="blue", types=["water"], shape="upright", height_m=.5,
             habitat="waters-edge", source="pokemon")


@pytest.fixture(scope="module")
def encoder(): return TextEncoder()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build_dataset("critters", tmp_path_factory.mktemp("captions")/"data", n=60, size=16)


@pytest.fixture
def root(built, tmp_path): return Path(shutil.copytree(built, tmp_path/"data"))


def run(*args, **env):
    return subprocess.run([sys.executable, "-c", *args], capture_output=True, text=True, env=os.environ | env)


# the grammar

def test_every_fact_is_spoken_in_several_phrasings():
    assert set(SHAPE_WORDS) == set(SHAPES)
    for i, shape in enumerate(SHAPES):
        colour, types = COLOURS[i % len(COLOURS)], [TYPES[i % len(TYPES)], TYPES[(i + 5) % len(TYPES)]]
        for source in ("pokemon", "critters"):
            said = captions_from_facts(dict(FACTS, colour=colour, shape=shape, types=types, source=source))
            assert len(said) == len(set(said)) == 6
            assert said == [c.lower() for c in said] and all("  " not in c and c == c.strip() for c in said)
            for word in (colour, *types): assert sum(word in c for c in said) >= 4, (word, said)
            assert sum(any(w in c for w in SHAPE_WORDS[shape]) for c in said) >= 3
            assert sum("squirtle" in c for c in said) == 2


def test_the_way_people_ask_is_among_the_captions():
    facts = dict(FACTS, shape="wings", source="critters")
    assert "a blue water pokemon with wings" in captions_from_facts(facts)


def test_captions_of_little_known_records():
    assert captions_from_facts({"types": ["electric"]})[0] == "an electric pokemon"
    assert captions_from_facts({"name": "Nidoran♀"})[-1] == "nidoran female the pokemon"
    assert captions_from_facts({"colour": "red", "shape": "wheel"})[0] == "a red pokemon with a wheel body"
    assert captions_from_facts(dict(FACTS, height_m=0))[0] == "a blue water pokemon standing upright"


@pytest.mark.parametrize("facts, says", [
    ({}, "must have a fact"), ({"colour": 3}, "must be a string, got 3"), ({"types": "water"}, "list of strings"),
    ({"colour": "red", "height_m": "tall"}, "got 'tall'"), ({"colour": "red", "height_m": float("nan")}, "got nan")])
def test_wrong_facts_are_refused(facts, says):
    with pytest.raises(ValueError, match=says): captions_from_facts(facts)


def test_sizes_never_shrink_as_heights_grow():
    words = ["tiny", "small", "medium-sized", "large", "huge"]
    ranks = [words.index(size_word(h/10)) for h in range(1, 60)]
    assert ranks == sorted(ranks) and set(ranks) == set(range(5))


# the door for prompts

@pytest.mark.parametrize("bad, says", [
    (None, "must be a string"), (b"blue", "must be a string"), (["a"], "must be a string"), ("a\0b", "position 1"),
    ("\x1b[31m", "position 0"), ("\ud83d", "plain text"), ("a"*1001, "at most 1000 characters, got 1001")])
def test_what_is_no_prompt_is_refused(bad, says):
    with pytest.raises(ValueError, match=says): check_prompt(bad)


def test_prompts_pass_unharmed():
    for p in ("", "a" * 1000, "Flabébé 👩‍🚀 とり"): assert check_prompt(p) == p
    assert check_prompt(" two\r\n lines\t") == "two lines"


# the encoder

def test_vectors_equal_sentence_transformers(encoder):
    st = pytest.importorskip("sentence_transformers")
    texts = ["a blue water pokemon with wings", "Pikachu", "word " * 300]
    theirs = torch.tensor(st.SentenceTransformer(str(encoder.folder), device="cpu").encode(texts))
    assert (encoder(texts) - theirs).abs().max() < 1e-6


def test_vectors_do_not_depend_on_the_batch(encoder):
    texts = [f"{'very '*k}blue creature" for k in (0, 1, 5, 9)]
    apart, whole = torch.cat([encoder(t) for t in texts]), encoder(texts)
    assert (apart - whole).abs().max() < 1e-6
    assert (encoder.encode(texts, batch_size=3) - whole).abs().max() < 1e-6
    assert torch.equal(whole, encoder(texts))
    assert not whole.requires_grad and whole.dtype == torch.float32


def test_the_null_caption_is_zero(encoder):
    assert torch.equal(encoder(["", " ", "a"]).norm(dim=1).round(), torch.tensor([0., 0., 1.]))


def test_a_damaged_encoder_is_named(encoder, tmp_path):
    for f in encoder.folder.iterdir():
        if f.is_file() and f.suffix != ".safetensors": shutil.copy(f, tmp_path)
    with pytest.raises(FileNotFoundError, match="model.safetensors"): TextEncoder(folder=tmp_path)
    (tmp_path/"model.safetensors").write_bytes((encoder.folder/"model.safetensors").read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"{tmp_path}.*damaged"): TextEncoder(folder=tmp_path)
    with pytest.raises(ValueError, match="allowed: minilm"): TextEncoder("bert")


def test_without_package_and_network_it_says_what_to_install(tmp_path):
    code = ("import pokemon_nb.captioning as c\nc.ENCODERS['minilm']['package'] = 'not_installed'\nc.TextEncoder()")
    done = run(code, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert done.returncode == 1 and "pip install 'pokemon_nb[offline]'" in done.stderr.splitlines()[-1]


def test_import_is_cheap_and_forks_are_quiet():
    code = ("import sys, os, pokemon_nb.captioning as c\n"
            "print([m for m in ('transformers', 'lightning', 'gradio', 'diffusers') if m in sys.modules])\n"
            "c.TextEncoder()(['a', 'b'])\nif os.fork() == 0: os._exit(0)\nos.wait()")
    done = run(code)
    assert done.stdout.strip() == "[]" and done.returncode == 0
    assert "fork" not in done.stderr and "Loading" not in done.stderr, done.stderr


# dropping captions

def test_dropping_is_reproducible_and_leaves_the_rest():
    v = torch.randn(64, 8)
    a, b = (drop_captions(v, .5, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a, b) and not torch.equal(a, v)
    kept = a.any(1)
    assert torch.equal(a[kept], v[kept]) and 16 < kept.sum() < 48
    tokens = torch.ones(64, 5, 8)
    assert torch.equal(drop_captions(tokens, .5, torch.Generator().manual_seed(3)).amax((1, 2)) > 0, kept)
    for p in (-.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="share in"): drop_captions(v, p)


# whole datasets

def test_captioning_is_idempotent_and_keeps_the_manifest_true(root):
    before = {s: read_metadata(root, s) for s in ("train", "val", "test")}
    counts = caption_dataset(root)
    after = {s: read_metadata(root, s) for s in before}
    assert {s: c["records"] for s, c in counts.items()} == {s: len(r) for s, r in before.items()}
    for s in before:
        for old, new in zip(before[s], after[s]):
            assert new.pop("text") == new.pop("captions")[0] == captions_from_facts(old)[0] and new == old
    first = dataset_hash(root)
    assert open_dataset(root).hash == first
    caption_dataset(root)
    assert dataset_hash(root) == first
    assert not [p for p in root.rglob("*") if p.name.endswith(".part")]


def test_own_words_win(root):
    meta = root/"train/metadata.jsonl"
    rows = read_metadata(root, "train")
    rows[0]["text"] = "the first creature I drew"
    meta.write_text("".join(json.dumps(r) + "\n" for r in rows))
    for _ in range(2):
        assert caption_dataset(root)["train"]["own"] == 1
        assert read_metadata(root, "train")[0]["captions"] == ["the first creature I drew"]


def test_a_row_without_words_is_named_and_nothing_is_written(root):
    meta = root/"val/metadata.jsonl"
    rows = [{"file_name": r["file_name"]} for r in read_metadata(root, "val")]
    meta.write_text("".join(json.dumps(r) + "\n" for r in rows))
    before = dataset_hash(root)
    with pytest.raises(ValueError, match=f"val.metadata.jsonl line 1 .{rows[0]['file_name']}.*add a `text` or facts"):
        caption_dataset(root)
    assert dataset_hash(root) == before


def test_imagefolder_reads_the_captions(root):
    datasets = pytest.importorskip("datasets")
    caption_dataset(root)
    ds = datasets.load_dataset("imagefolder", data_dir=str(root), cache_dir=str(root.parent/"cache"))
    rows = read_metadata(root, "train")
    assert sorted(ds["train"]["text"]) == sorted(r["text"] for r in rows)


def test_cached_vectors_equal_fresh_ones(root, encoder, tmp_path):
    caption_dataset(root)
    records = read_metadata(root, "val") + read_metadata(root, "test")
    fresh, made = (embed_captions(records, encoder, cache=tmp_path/"cache") for _ in range(2))
    assert torch.equal(fresh, made) and fresh.shape == (len(records), 6, 384)
    assert len(list((tmp_path/"cache").iterdir())) == 1
    embed_captions(records[1:], encoder, cache=tmp_path/"cache")     # other sentences, another file
    assert len(list((tmp_path/"cache").iterdir())) == 2
    row = encoder(records[0]["captions"])
    assert (row - fresh[0]).abs().max() < 1e-6


def test_command_line(root, tmp_path, capsys):
    pokemon_caption(str(root))
    said = capsys.readouterr().out
    assert "train" in said and read_metadata(root, "train")[0]["captions"][-1] in said
    nowhere = str(tmp_path/"none")
    script = Path(sys.executable).with_name("pokemon_caption")
    done = subprocess.run([script, nowhere], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and nowhere in done.stderr
    assert len(done.stderr.splitlines()) == 1
