"""Guards for chapter 02: the grammar, the sentence vectors, captioning of whole datasets, and the command line."""
import json, os, random, shutil, subprocess, sys, time
from pathlib import Path

import pytest
import torch

from pokemon_nb.captioning import (
    SHAPE_WORDS, Blip2Captioner, FileCaptioner, TextEncoder, caption_dataset, caption_quality, captions_from_facts,
    check_prompt, drop_captions, embed_captions, pokemon_caption, quality_table, size_word, tiny_blip2, tiny_clip)
from pokemon_nb.data import (
    COLOURS, SHAPES, TYPES, Pokedex, build_dataset, dataset_hash, open_dataset, paint_critter, random_critter,
    read_metadata)

SHARED = Path(__file__).parents[2]/"shared/pokemon"
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


@pytest.mark.parametrize("control", list("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"))
def test_bidirectional_overrides_are_refused(control):
    with pytest.raises(ValueError, match="plain text"): check_prompt(f"blue {control}der")


def test_any_script_is_drawn(encoder):
    """Emoji, other scripts and right-to-left text are prompts like others: kept, encoded, and of finite length."""
    prompts = ["🔥🐉", "青いカエル", "تنين أحمر", "דרקון אדום", "дракон", "zero\u200bwidth", "👩\u200d🚀", "a\u0301"]
    kept = [check_prompt(p) for p in prompts]
    assert kept[:-1] == prompts[:-1] and kept[-1] == "á"              # NFC: equal to the eye, equal to the model
    vectors = encoder(kept)
    assert torch.isfinite(vectors).all() and (vectors.norm(dim=1) - 1).abs().max() < 1e-5
    assert check_prompt("") == "" and check_prompt(" \n\t ") == ""
    with pytest.raises(ValueError, match="at most 1000 characters, got 10000"): check_prompt("x"*10_000)


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
    with pytest.raises(ValueError, match="allowed: minilm, clip"): TextEncoder("bert")


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
            assert new.pop("text") == new.pop("captions")[0] == captions_from_facts(old)[0]
            assert new == old | dict(captioner="facts", captioner_revision="1", caption_prompt="")
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
    file, = (tmp_path/"cache").iterdir()
    before = file.stat().st_size
    embed_captions(records[1:], encoder, cache=tmp_path/"cache")     # nothing new: nothing written
    assert file.stat().st_size == before
    embed_captions([*records, {"text": "a brand new sentence"}], encoder, cache=tmp_path/"cache")
    assert before < file.stat().st_size < before + 384*4 + 200       # one vector more
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


# captioners

@pytest.fixture(scope="module")
def blip2(tmp_path_factory): return tiny_blip2(tmp_path_factory.mktemp("models")/"blip2")


@pytest.fixture(scope="module")
def pictures(): return [paint_critter(random_critter(i), 40) for i in range(6)]


@pytest.mark.slow
def test_blip2_looks_and_does_not_depend_on_the_batch(blip2, pictures):
    one = Blip2Captioner(blip2, max_new_tokens=8)
    alone = [one.caption([{}], [im])[0] for im in pictures]
    assert one.caption([{}]*6, pictures) == alone and len({c[0] for c in alone}) > 2
    asked = Blip2Captioner(blip2, prompt="a red creature", max_new_tokens=8)
    said = asked.caption([{}]*6, pictures)
    assert all(not c[0].startswith("a red creature") for c in said if c) and said != alone
    assert one.revision == asked.revision and len(one.revision) == 12
    assert Blip2Captioner(blip2, dtype="bf16", max_new_tokens=4).caption([{}], pictures[:1])[0]


@pytest.mark.slow
@pytest.mark.parametrize("place", ["balanced", "sequential"])
def test_a_device_map_says_the_same(blip2, pictures, place):
    pytest.importorskip("accelerate")
    mapped, plain = (Blip2Captioner(blip2, device=d, dtype="fp32", max_new_tokens=4) for d in (place, "cpu"))
    assert mapped.where == f"{place}, float32"
    assert torch.cuda.is_available() or mapped.caption([{}]*6, pictures) == plain.caption([{}]*6, pictures)
    assert torch.cuda.is_available() or Blip2Captioner(blip2, device=place).where == f"{place}, float32"


@pytest.mark.parametrize("device", ["toaster", "", "cuda", "cuda:7", "meta"])
def test_a_device_that_is_not_there_is_refused_before_anything_is_loaded(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=f"device must be one that is there, got '{device}'; allowed: auto, cpu, or a"):
        Blip2Captioner("nobody/nothing", device=device)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install accelerate"):
        Blip2Captioner("nobody/nothing", device="balanced")


def test_blip2_without_a_model_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="--captioner facts"): Blip2Captioner("nobody/nothing")
    with pytest.raises(FileNotFoundError, match=r"must hold \*.safetensors"): Blip2Captioner(tmp_path)
    with pytest.raises(ValueError, match="allowed: auto, bf16"): Blip2Captioner(tmp_path, dtype="int3")
    with pytest.raises(ValueError, match="max_new_tokens must be"): Blip2Captioner(tmp_path, max_new_tokens=0)
    with pytest.raises(ValueError, match="prompt must be plain text"): Blip2Captioner(tmp_path, prompt="a\0")


@pytest.mark.slow
def test_equal_pictures_are_captioned_once_and_origin_is_recorded(root, blip2):
    names = [r["file_name"] for r in read_metadata(root, "train")]
    for n in names[1:4]: shutil.copy(root/"train"/names[0], root/"train"/n)
    who = Blip2Captioner(blip2, prompt="a", max_new_tokens=4)
    calls, ask = [], who.caption
    who.caption = lambda records, images: (calls.append(len(images)), ask(records, images))[1]
    caption_dataset(root, who, batch_size=4)
    rows = read_metadata(root, "train")
    assert sum(calls) == sum(len(read_metadata(root, s)) for s in ("train", "val", "test")) - 3
    assert len({r["text"] for r in rows[:4]}) == 1
    assert {(r["captioner"], r["captioner_revision"], r["caption_prompt"]) for r in rows} == {
        ("blip2", who.revision, "a")}


@pytest.mark.slow
def test_mixing_puts_the_new_in_front(root, blip2):
    caption_dataset(root)
    facts = read_metadata(root, "train")[0]["captions"]
    caption_dataset(root, Blip2Captioner(blip2, max_new_tokens=4), mix=True)
    mixed = read_metadata(root, "train")[0]["captions"]
    assert mixed[1:] == facts and mixed[0] not in facts
    caption_dataset(root)                                                       # the facts alone again
    assert read_metadata(root, "train")[0]["captions"] == facts


@pytest.mark.slow
def test_a_persons_words_survive_a_model_unless_asked(root, blip2):
    rows = read_metadata(root, "val")
    rows[0]["text"] = "my own frog"
    (root/"val/metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    who = Blip2Captioner(blip2, max_new_tokens=4)
    assert caption_dataset(root, who)["val"]["own"] == 1
    assert read_metadata(root, "val")[0]["text"] == "my own frog"
    assert caption_dataset(root, who, overwrite=True)["val"]["own"] == 0
    assert read_metadata(root, "val")[0]["captioner"] == "blip2"


@pytest.mark.slow
def test_three_kills_change_nothing(root, blip2, tmp_path):
    """kill -9 at three random points; the file of the resumed run equals that of an uninterrupted one."""
    whole, broken = (Path(shutil.copytree(root, tmp_path/n)) for n in ("whole", "broken"))
    command = [Path(sys.executable).with_name("pokemon_caption"), "--captioner", "blip2", "--model", blip2,
               "--batch_size", "1"]
    assert subprocess.run([*command, whole], capture_output=True).returncode == 0
    journal, total = broken/".captions.journal", sum(len(read_metadata(root, s)) for s in ("train", "val", "test"))
    lines = lambda: journal.read_bytes().count(b"\n") if journal.exists() else 0
    at = sorted(random.Random(7).sample(range(2, total - 3), 3))
    for stop in at:
        child = subprocess.Popen([*command, broken], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while lines() < stop and child.poll() is None: time.sleep(.001)
        child.kill()
        assert child.wait() == -9, "it was too fast to be killed"
        assert stop <= lines() <= total and dataset_hash(broken) == dataset_hash(root)       # no half-captioned data
        with journal.open("a") as f: f.write('{"sha256": "cut of')                           # the worst kill: mid-line
    done = subprocess.run([*command, broken], capture_output=True, text=True)
    assert done.returncode == 0 and "a line that a kill cut off is dropped" in done.stdout
    for split in ("train", "val", "test"):
        assert (broken/split/"metadata.jsonl").read_bytes() == (whole/split/"metadata.jsonl").read_bytes()
    assert not journal.exists()


@pytest.mark.slow
def test_another_prompt_begins_anew(root, blip2, capsys):
    first, second = (Blip2Captioner(blip2, prompt=p, max_new_tokens=4) for p in ("a", "the"))
    def stop(records, images): raise KeyboardInterrupt
    ask, n = first.caption, iter(range(9))
    first.caption = lambda r, i: ask(r, i) if next(n) < 2 else stop(r, i)
    with pytest.raises(KeyboardInterrupt): caption_dataset(root, first, batch_size=4)
    assert (root/".captions.journal").read_text().count("\n") == 1 + 8
    caption_dataset(root, second)
    assert "of another model or prompt, begun anew" in capsys.readouterr().out
    assert {r["caption_prompt"] for r in read_metadata(root, "train")} == {"the"}


@pytest.mark.slow
def test_a_caption_file_with_bad_lines(root, tmp_path):
    a, b = (r["file_name"] for r in read_metadata(root, "train")[:2])
    table = tmp_path/"mine.csv"
    table.write_text(f'file_name,text\n{a},"a frog, green"\n{b},\ntrain/{b},a toad\nghost.png,boo\n{a},again\n'
                     f'x\0.png,nul\n')
    script = Path(sys.executable).with_name("pokemon_caption")
    caption_dataset(root)
    done = subprocess.run([script, root, "--captioner", "file", "--captions", table], capture_output=True, text=True)
    assert done.returncode == 1
    for words in ("line 3: text must be a sentence", f"line 6: {a} has captions already", "no picture ghost.png"):
        assert words in done.stderr, done.stderr
    rows = read_metadata(root, "train")
    assert [r["text"] for r in rows[:2]] == ["a frog, green", "a toad"] and rows[2]["captioner"] == "facts"
    empty = tmp_path/"empty.jsonl"
    empty.write_text("{}\n")
    with pytest.raises(ValueError, match="line 1: file_name is missing"): FileCaptioner(empty)
    done = subprocess.run([script, root, "--captioner", "file"], capture_output=True, text=True)
    assert done.returncode == 2 and "--captions FILE" in done.stderr


@pytest.mark.parametrize("name, content, words, bad", [
    ("c.jsonl", '{"file_name": "a.png", "text": "one\u2028two"}\n', {"a.png": ["one two"]}, []),
    ("c.jsonl", b'\xef\xbb\xbf{"file_name": "a.png", "text": "caf\xe9"}\r\n', {}, [(1, "0xe9 is not UTF-8")]),
    ("c.jsonl", "["*100_000 + "\n7\nNaN\n", {}, [(1, "nested too deep"), (2, "an object"), (3, "an object")]),
    ("c.jsonl", '{"file_name": "a.png", "text": "x \\ud83d"}\n', {}, [(1, "half of a surrogate pair")]),
    ("c.jsonl", '{"file_name": "a\\u0000.png", "text": "x"}\n', {}, [(1, "file_name must be plain text")]),
    ("c.jsonl", '{"file_name": "a.png", "text": "\\u202egnp"}\n', {}, [(1, "text must be plain text")]),
    ("c.jsonl", json.dumps(dict(file_name="a.png", text="x"*10_000)) + "\n", {}, [(1, "at most 1000 characters")]),
    ("c.jsonl", '{"file_name": "a.png", "text": "🔥 אדום"}\n', {"a.png": ["🔥 אדום"]}, []),
    ("c.csv", 'file_name,text\na.png,"two\nlines"\n', {"a.png": ["two lines"]}, []),
    ("c.csv", "file_name,text\na.png,a frog, green\n", {}, [(2, "a comma wants quotes")]),
    ("c.csv", 'file_name,text\na.png,"open\nc.png,ok\n', {"c.png": ["ok"]}, [(2, "must be CSV")]),
    ("c.csv", "file_name,text\na.png," + "x"*200_000 + "\n", {}, [(2, "must be CSV")]),
    ("c.csv", b"file_name,text\na.png,caf\xe9\nc.png,ok\n", {"c.png": ["ok"]}, [(2, "must be UTF-8")]),
])
def test_one_bad_line_costs_nothing_else(tmp_path, name, content, words, bad):
    good = dict(jsonl='{"file_name": "b.png", "text": "a toad"}\n', csv="b.png,a toad\n")[name.split(".")[1]]
    (tmp_path/name).write_bytes((content if isinstance(content, bytes) else content.encode()) + good.encode())
    read = FileCaptioner(tmp_path/name)
    assert read.words == words | {"b.png": ["a toad"]}
    assert [n for n, _ in read.bad] == [n for n, _ in bad], read.bad
    assert all(why in told for (_, why), (_, told) in zip(bad, read.bad)), read.bad
    with pytest.raises(FileNotFoundError, match="path must be a file"): FileCaptioner(tmp_path)


def set_row(root, split="val", **facts):
    "Other facts for the first row of a split, as a person with an editor would write them."
    rows = read_metadata(root, split)
    (root/split/"metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [rows[0] | facts, *rows[1:]]))


@pytest.mark.parametrize("facts, says", [
    (dict(text="a\0b"), "text must be plain text"), (dict(name="a\0b"), "name must be plain text"),
    (dict(genus="\u202egnp"), "genus must be plain text"), (dict(types=["fire\x1b[31m"]), "type must be plain text"),
    (dict(text="a", captions=["a", " "]), "captions must be sentences"), (dict(text="a\ud83d"), "surrogate pair"),
    (dict(habitat="a\ud83d"), "surrogate pair")])
def test_hostile_words_of_a_dataset_are_refused_before_anything_is_written(root, facts, says):
    set_row(root, **facts)
    before = dataset_hash(root)
    with pytest.raises(ValueError, match=f"val.metadata.jsonl line 1.*{says}"): caption_dataset(root)
    assert dataset_hash(root) == before


def test_odd_words_of_a_dataset_are_kept_and_can_be_read_again(root, encoder):
    own = {"train": "one\u2028two", "val": "x"*10_000, "test": "🔥 אדום"}
    for split, text in own.items(): set_row(root, split, text=text)
    for _ in range(2): caption_dataset(root)
    rows = {s: read_metadata(root, s) for s in own}
    assert {s: r[0]["text"] for s, r in rows.items()} == own
    set_row(root, text=" ")                                                     # a blank is no word: the facts speak
    caption_dataset(root)
    assert read_metadata(root, "val")[0]["captioner"] == "facts"
    with pytest.raises(ValueError, match="half a surrogate pair"): encoder("a\ud83d")


@pytest.mark.slow
def test_a_model_is_not_asked_again_for_what_it_has_said(root, blip2):
    who = Blip2Captioner(blip2, max_new_tokens=4)
    caption_dataset(root, who, batch_size=16)
    done, ask, asked = dataset_hash(root), who.caption, []
    who.caption = lambda records, images: (asked.append(len(images)), ask(records, images))[1]
    caption_dataset(root, who)
    assert dataset_hash(root) == done and not asked
    set_row(root, text="my own frog")
    caption_dataset(root, who)
    assert not asked and read_metadata(root, "val")[0]["captions"] == ["my own frog"]
    caption_dataset(root, who, overwrite=True)
    assert sum(asked) == 1 and dataset_hash(root) == done


# quality

def test_quality_of_nothing_is_refused(built):
    for rows in ([], read_metadata(built, "val")):
        with pytest.raises(ValueError, match="records must hold captions, got none"): caption_quality(rows)


def test_quality_counts_what_is_mentioned():
    rows = [dict(colour="red", shape="wings", types=["fire"], captions=["a red fire bird", "it flies with two wings"]),
            dict(colour="blue", shape="fish", types=["water", "ice"], captions=["a water fish", "reddish"])]
    q = caption_quality(rows)
    assert q["all"]["colour"] == .5 and q["phrasing 1"]["colour"] == .5 and q["phrasing 2"]["colour"] == 0
    assert q["all"]["shape"] == .5 and q["all"]["types"] == .5 and "size" not in q["all"]
    assert (q["all"]["captions"], q["all"]["distinct"], q["all"]["words"]) == (4, 1., 13/4)
    assert "| all | 4 |" in quality_table(q)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the artworks are not beside this checkout")
def test_every_species_is_captioned_by_facts():
    species = Pokedex.read(SHARED/"pokedex.csv").rows
    rows = [r | {"captions": captions_from_facts(r | {"source": "pokemon"})} for r in species]
    assert len(rows) == 809 and all(len(r["captions"]) >= 5 for r in rows)
    quality = caption_quality(rows)["all"]
    assert all(quality[k] == 1 for k in ("colour", "shape", "types", "size", "habitat", "name")), quality


# CLIP

def test_clip_keeps_the_contract(tmp_path):
    clip = TextEncoder("clip", folder=tiny_clip(tmp_path/"clip"))
    v = clip(["a red fish", "", "a red fish", "a blue bird with wings"])
    assert v.shape == (4, 24) and torch.equal(v[0], v[2]) and not v[1].any()
    assert (v[3].norm() - 1).abs() < 1e-5 and (clip("a red fish")[0] - v[0]).abs().max() < 1e-6
    from transformers import AutoTokenizer, CLIPTextModelWithProjection
    tokens = AutoTokenizer.from_pretrained(tmp_path/"clip")(["a red fish"], return_tensors="pt")
    theirs = CLIPTextModelWithProjection.from_pretrained(tmp_path/"clip")(tokens["input_ids"]).text_embeds[0]
    assert (theirs/theirs.norm() - v[0]).abs().max() < 1e-6
    e = embed_captions([{"text": "a red fish"}], clip, tmp_path/"cache")
    assert e.shape == (1, 1, 24) and [p.name for p in (tmp_path/"cache").iterdir()] == [
        f"captions-clip-{clip.sha256[:12]}.safetensors"]
    with pytest.warns(UserWarning, match="reads 77 tokens"): clip("very "*100)


def test_clip_without_a_network_says_what_to_do(tmp_path):
    done = run("from pokemon_nb.captioning import TextEncoder; TextEncoder('clip')", HF_HUB_OFFLINE="1",
               HF_HOME=str(tmp_path))
    assert done.returncode == 1 and "name a local copy: folder=" in done.stderr.splitlines()[-1]
