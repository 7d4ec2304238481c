"""Guards of chapter 01c: shards on disk, who reads what, the stream, the trainer. Seeded, offline, small."""
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import islice, product
from pathlib import Path

import fsspec
import lightning as L
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

datasets = pytest.importorskip("datasets", reason="needs pip install 'pokemon_nb[data]'")
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402

from pokemon_nb import shards  # noqa: E402
from pokemon_nb.batches import PokemonData  # noqa: E402
from pokemon_nb.data import (  # noqa: E402
    SPLITS, PokemonDataset, build_dataset, paint_critter, random_critter, read_metadata, write_atomic,
)
from pokemon_nb.shards import ShardData, StreamedDataset, lane_parts, shard_files, write_shards  # noqa: E402


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return build_dataset("critters", tmp_path_factory.mktemp("critters")/"data", n=150, size=16)


@pytest.fixture(scope="module")
def packed(root):
    return write_shards(root, root.parent/"shards", per_shard=20)


def shard(path, n, start=0, group=5):
    "A shard of n rows named start ... start + n - 1, written by nobody's function."
    file = io.BytesIO()
    paint_critter(random_critter(1), 8).save(file, "PNG")
    features = datasets.Features({"id": datasets.Value("int64"), "image": datasets.Image()})
    rows = [dict(id=start + k, image=dict(bytes=file.getvalue(), path=None)) for k in range(n)]
    pq.write_table(pa.Table.from_pylist(rows, schema=features.arrow_schema), path, row_group_size=group)
    return str(path)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    "Seven shards of 1 to 40 rows: nothing divides anything."
    folder, sizes = tmp_path_factory.mktemp("uneven"), (40, 1, 17, 3, 28, 9, 22)
    starts = np.cumsum((0, *sizes))
    return [shard(folder/f"{k}.parquet", n, int(starts[k])) for k, n in enumerate(sizes)], int(starts[-1])


def stream(files, **kw): return StreamedDataset(files, **dict(size=8, batch_size=4, buffer=30) | kw)
def names(batches, key="file_name"): return [b[key] for b in batches]
def rows(loader, key="id"): return [i for b in loader for i in b[key]]


# --- writing --------------------------------------------------------------------------------------------------------
def test_shards_hold_the_files_and_all_facts(root, packed):
    for split in SPLITS:
        want = {r["file_name"]: r for r in read_metadata(root, split)}
        table = pa.concat_tables(pq.read_table(f) for f in shard_files(packed, split)).to_pylist()
        assert {r["file_name"]: {k: v for k, v in r.items() if k != "image"} for r in table} == want
        for r in table: assert r["image"]["bytes"] == (root/split/r["file_name"]).read_bytes()


def test_anybodys_tool_reads_them(packed, root):
    splits = datasets.load_dataset(str(packed))
    assert {k: len(v) for k, v in splits.items()} == {
        {"val": "validation"}.get(s, s): len(read_metadata(root, s)) for s in SPLITS}
    row = splits["train"][0]
    assert row["image"].size == (16, 16) and row["image"].mode == "RGBA" and isinstance(row["types"], list)


def test_shards_are_equally_long_deterministic_and_described(root, packed, tmp_path):
    again = write_shards(root, tmp_path/"again", per_shard=20)
    assert {p.name: p.read_bytes() for p in again.iterdir()} == {p.name: p.read_bytes() for p in packed.iterdir()}
    made = json.loads((packed/"shards.json").read_text())
    lengths = [v["rows"] for k, v in made["shards"].items() if k.startswith("train")]
    assert max(lengths) <= 20 and max(lengths) - min(lengths) <= 1
    assert lengths == [pq.read_metadata(f).num_rows for f in shard_files(packed)]
    other = write_shards(root, tmp_path/"other", per_shard=20, seed=1)
    assert Path(shard_files(other)[0]).read_bytes() != Path(shard_files(packed)[0]).read_bytes()


def test_file_order_and_another_size(root, tmp_path):
    out = write_shards(root, tmp_path/"s", per_shard=1000, size=8, seed=None)
    table = pq.read_table(shard_files(out)[0]).to_pylist()
    assert [r["file_name"] for r in table] == [r["file_name"] for r in read_metadata(root, "train")]
    batch = next(iter(stream(out, buffer=0, batch_size=9)))
    assert torch.equal(batch["x0"], PokemonDataset(root, "train", 8).batch(range(9)))


@pytest.mark.parametrize("bad,why", [(dict(per_shard=0), "per_shard must be at least 1, got 0"),
                                     (dict(size=3), r"size must be None or lie in \[4,2048\]")])
def test_bad_arguments_of_write_shards(root, tmp_path, bad, why):
    with pytest.raises(ValueError, match=why): write_shards(root, tmp_path/"s", **bad)
    assert not (tmp_path/"s").exists()


def test_columns_of_mixed_kinds_and_a_taken_name_are_refused(tmp_path):
    for value, why in (({"age": 3}, "column 'age' must have values of one kind"), ({"image": 1}, "column 'image'")):
        root = build_dataset("critters", tmp_path/f"d{len(why)}", n=80, size=8)
        meta = root/"train"/"metadata.jsonl"
        lines = [json.loads(line) for line in meta.read_text().splitlines()]
        lines[0] |= value
        lines[1] |= {k: "old" for k in value}
        write_atomic(meta, "".join(json.dumps(r) + "\n" for r in lines))
        with pytest.raises(ValueError, match=why): write_shards(root, tmp_path/"s")


def test_a_fact_that_is_empty_in_one_split_keeps_its_type(tmp_path):
    root = build_dataset("critters", tmp_path/"d", n=80, size=8)
    meta = root/"val"/"metadata.jsonl"
    lines = [json.loads(line) | dict(habitat=None) for line in meta.read_text().splitlines()]
    write_atomic(meta, "".join(json.dumps(r) + "\n" for r in lines))
    out = write_shards(root, tmp_path/"s")
    assert {pq.read_schema(f).field("habitat").type for s in SPLITS for f in shard_files(out, s)} == {pa.string()}


def test_shards_of_something_else_are_never_overwritten(root, packed, tmp_path):
    before = {p.name: p.read_bytes() for p in packed.iterdir()}
    for kw in (dict(per_shard=30), dict(size=8), dict(seed=2)):
        with pytest.raises(FileExistsError, match="of another one; choose another folder"):
            write_shards(root, packed, **dict(per_shard=20) | kw)
    shard(tmp_path/"theirs.parquet", 3)
    with pytest.raises(FileExistsError, match="theirs.parquet"): write_shards(root, tmp_path)
    assert before == {p.name: p.read_bytes() for p in packed.iterdir()}


def test_a_damaged_shard_is_not_described_as_good(root, tmp_path):
    out = write_shards(root, tmp_path/"s", per_shard=50)
    victim = Path(shard_files(out)[1])
    content = bytearray(victim.read_bytes())
    content[len(content)//3] ^= 255
    victim.write_bytes(content)
    with pytest.raises(ValueError, match=f"{victim.name} must be as shards.json says.*remove it and run again"):
        write_shards(root, out, per_shard=50)
    victim.unlink()
    write_shards(root, out, per_shard=50)
    with pytest.raises(ValueError, match="out must lie outside of root"): write_shards(root, root/"shards")


@pytest.mark.slow
def test_a_killed_write_goes_on_where_it_stopped(tmp_path):
    root = build_dataset("critters", tmp_path/"data", n=300, size=32)
    code = "import sys; from pokemon_nb.shards import write_shards; write_shards(sys.argv[1], sys.argv[2], per_shard=2)"
    child = subprocess.Popen([sys.executable, "-c", code, root, tmp_path/"out"],
                             env=os.environ | {"PYTHONPATH": str(Path(shards.__file__).parent.parent)})
    end = time.time() + 60
    while len(list((tmp_path/"out").glob("*.parquet"))) < 20 and time.time() < end: time.sleep(.005)
    child.send_signal(signal.SIGKILL)
    child.wait()
    left = {p.name: p.stat().st_mtime_ns for p in (tmp_path/"out").glob("*.parquet")}
    assert 20 <= len(left) < 120 and not (tmp_path/"out"/"shards.json").exists()
    a, b = write_shards(root, tmp_path/"out", per_shard=2), write_shards(root, tmp_path/"whole", per_shard=2)
    parts = lambda f: {p.name: p.read_bytes() for p in f.iterdir()}
    assert parts(a) == parts(b)
    assert all((a/n).stat().st_mtime_ns == t for n, t in left.items())           # and what was whole is kept


# --- finding --------------------------------------------------------------------------------------------------------
def test_shard_files_knows_places_patterns_and_lists(packed, tmp_path):
    files = shard_files(packed)
    assert len(files) > 4 and files == sorted(files) and shard_files(str(packed) + "/") == files
    assert shard_files(f"{packed}/train-*.parquet") == files and shard_files(files) == files
    with pytest.raises(FileNotFoundError, match="split 'tset', got none"): shard_files(packed, "tset")
    for f in files[1:]: os.link(f, tmp_path/Path(f).name)
    with pytest.raises(FileNotFoundError, match=f"1 of {len(files)} shards are missing, e.g. number 0"):
        shard_files(tmp_path)


def test_a_url_is_streamed_like_a_folder(packed):
    memory = fsspec.filesystem("memory")
    for f in shard_files(packed): memory.pipe("/shards/" + Path(f).name, Path(f).read_bytes())
    try:
        assert shard_files("memory://shards")[0].startswith("memory://")
        a, b = (names(stream(r, epochs=1)) for r in ("memory://shards", packed))
        assert a == b and stream("memory://shards").counts() == stream(packed).counts()
        assert names(islice(stream("memory://shards", start_step=9), 3)) == names(islice(stream(packed), 12))[9:]
    finally: memory.rm("/shards", recursive=True)


# --- who reads what -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("n,lanes", list(product((1, 2, 3, 7, 8), (1, 2, 3, 4, 9))))
def test_lanes_are_disjoint_and_complete(n, lanes):
    for epoch in range(3):
        parts = [p for k in range(lanes) for p in lane_parts(n, k, lanes, epoch)]
        seen = Counter((s, r) for s, a, step in parts for r in range(a, 12, step))
        assert seen == Counter(product(range(n), range(12)))


def test_lanes_are_dealt_anew_every_epoch_and_by_seed():
    orders = {tuple(lane_parts(20, 0, 1, e, seed)) for e in range(5) for seed in range(5)}
    assert len(orders) == 25 and lane_parts(5, 1, 2, 3, None) == [(1, 0, 1), (3, 0, 1)]
    with pytest.raises(ValueError, match=r"lane must lie in \[0,2\), got 2"): lane_parts(5, 2, 2)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_two_ranks_two_workers_see_every_row_once(packed, root, workers):
    loaders = [DataLoader(stream(packed, epochs=1, rank=r, world_size=2), batch_size=None, num_workers=workers)
               for r in range(2)]
    seen = [rows(loader, "file_name") for loader in loaders]
    assert Counter(seen[0] + seen[1]) == Counter(r["file_name"] for r in read_metadata(root, "train"))
    assert abs(len(seen[0]) - len(seen[1])) <= 25               # equal shards, shared fairly


@pytest.mark.parametrize("ranks,workers", [(2, 2), (3, 1), (4, 2), (5, 0)])
def test_unequal_shards_and_more_readers_than_shards(uneven, ranks, workers):
    files, n = uneven                                            # 4 x 2 and 2 x 2 of 7 shards: some share a shard
    for epoch in (0, 1):
        seen = []
        for r in range(ranks):
            ds = stream(files, epochs=1, rank=r, world_size=ranks)
            ds.set_epoch(epoch)
            seen += rows(DataLoader(ds, batch_size=None, num_workers=workers))
        assert sorted(seen) == list(range(n))


@pytest.mark.slow
def test_two_real_processes(packed, root, tmp_path):
    "torchrun's environment, two interpreters, two workers each, ranks from torch.distributed."
    code = """
import json, sys, torch.distributed as dist
from torch.utils.data import DataLoader
from pokemon_nb.shards import StreamedDataset
if __name__ == "__main__":
    dist.init_process_group("gloo")
    r, n = dist.get_rank(), dist.get_world_size()
    ds = StreamedDataset(sys.argv[1], size=8, batch_size=4, epochs=1, rank=r, world_size=n)
    seen = [name for b in DataLoader(ds, batch_size=None, num_workers=2) for name in b["file_name"]]
    json.dump(seen, open(f"{sys.argv[2]}/{r}.json", "w"))
    dist.barrier(); dist.destroy_process_group()
"""
    write_atomic(tmp_path/"run.py", code)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                           tmp_path/"run.py", packed, tmp_path], capture_output=True, text=True, timeout=300,
                          env=os.environ | {"PYTHONPATH": str(Path(shards.__file__).parent.parent)})
    assert done.returncode == 0, done.stderr[-2000:]
    a, b = (json.loads((tmp_path/f"{r}.json").read_text()) for r in range(2))
    assert a and b and not set(a) & set(b)
    assert sorted(a + b) == sorted(r["file_name"] for r in read_metadata(root, "train"))


def test_a_reader_without_rows_is_told_instead_of_waiting_for_ever(tmp_path):
    tiny = [shard(tmp_path/"a.parquet", 2)]
    with pytest.raises(ValueError, match="reader 2 of 3 from 1 shards; use fewer workers"):
        next(iter(stream(tiny, rank=2, world_size=3)))
    with pytest.raises(ValueError, match="reader 2 of 3"): next(iter(stream(tiny, rank=2, world_size=3, start_step=5)))
    with pytest.raises(ValueError, match="reader 2 of 3"): next(iter(stream(tiny, rank=2, world_size=3, buffer=0)))
    assert list(stream(tiny, rank=2, world_size=3, epochs=1)) == []              # one pass over nothing is nothing


# --- the stream -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("channels,threads", [(4, 1), (3, 3)])
def test_tensors_are_those_of_chapter_01(root, packed, channels, threads):
    ds = PokemonDataset(root, "train", 16, channels)
    where = {r["file_name"]: k for k, r in enumerate(ds.records)}
    n = 0
    for b in stream(packed, size=16, channels=channels, threads=threads, epochs=1, batch_size=7):
        assert torch.equal(b["x0"], ds.batch([where[f] for f in b["file_name"]]))
        assert b["name"] == [ds.records[where[f]]["name"] for f in b["file_name"]] and b["text"] == [""]*len(b["x0"])
        n += len(b["x0"])
    assert n == len(ds)


def test_augmentation_is_that_of_chapter_01(root, tmp_path):
    "In file order and with the same seed and step, the augmented batch is the same to the bit."
    out = write_shards(root, tmp_path/"s", seed=None)
    from pokemon_nb.data import augment, step_seed
    b = list(islice(stream(out, size=16, buffer=0, augment=True, seed=5, batch_size=6), 3))[2]
    plain = PokemonDataset(root, "train", 16).batch(range(12, 18))
    assert torch.equal(b["x0"], augment(plain, torch.Generator().manual_seed(step_seed(5, "augment", 2, 0))))
    assert not torch.equal(b["x0"], plain)


def test_order_depends_on_seed_epoch_and_buffer_only(packed):
    order = lambda **kw: rows(stream(packed, epochs=1, **kw), "file_name")
    a = order()
    assert a == order() == order(threads=3) == order(batch_size=9) and sorted(a) != a
    assert len({tuple(order(**kw)) for kw in (dict(), dict(seed=1), dict(buffer=10), dict(buffer=0))}) == 4
    two = rows(stream(packed, epochs=2), "file_name")
    assert two[:len(a)] == a and two[len(a):] != a and sorted(two[len(a):]) == sorted(a)
    ds = stream(packed, epochs=1)
    ds.set_epoch(1)
    assert rows(ds, "file_name") == two[len(a):]
    with pytest.raises(ValueError, match="at least 0, got -1"): ds.set_epoch(-1)


def test_a_second_pass_is_whole_even_after_a_pass_that_was_left(packed):
    ds = stream(packed, epochs=1)
    whole = names(ds)
    assert names(islice(ds, 3)) == whole[:3] and names(ds) == whole


@pytest.mark.parametrize("buffer", [0, 1, 7, 30, 1000])
@pytest.mark.parametrize("lanes", [1, 3, 10])
def test_every_place_is_a_place_to_go_on(uneven, buffer, lanes):
    "Also across epochs, across shards of very different length, and inside of shared shards."
    files, _ = uneven
    kw = dict(buffer=buffer, rank=lanes - 1, world_size=lanes, batch_size=3)
    whole = names(islice(stream(files, **kw), 60), "id")
    for k in (1, 2, 5, 13, 29, 43, 59):
        assert names(islice(stream(files, start_step=k, **kw), 60 - k), "id") == whole[k:]


def test_state_is_json_and_refuses_another_stream(packed):
    a, b = stream(packed, seed=3), stream(packed, seed=3)
    whole = names(islice(stream(packed, seed=3), 40))
    assert a.state_dict()["step"] == 0
    head = names(islice(iter(a), 23))
    b.load_state_dict(json.loads(json.dumps(a.state_dict())))
    assert b.state_dict() == a.state_dict() and head + names(islice(iter(b), 17)) == whole
    for kw in (dict(seed=4), dict(batch_size=5), dict(buffer=9), dict(world_size=2)):
        with pytest.raises(ValueError, match=f"{next(iter(kw))} must be as when"):
            stream(packed, **dict(seed=3) | kw).load_state_dict(a.state_dict())


@pytest.mark.parametrize("start", [1, 2, 5])
def test_workers_go_on_at_any_step(uneven, start):
    loader = lambda s: DataLoader(stream(uneven[0], start_step=s, batch_size=3), batch_size=None, num_workers=2)
    a, b = list(islice(loader(0), 9)), list(islice(loader(start), 9 - start))
    assert [x["step"] for x in b] == list(range(start, 9)) and names(b, "id") == names(a, "id")[start:]


def test_going_on_late_does_not_read_what_was_before(uneven, monkeypatch):
    "Step 10,000 opens a handful of tables, not thousands."
    read, real = [], StreamedDataset._tables
    def spy(self, *args):
        for t in real(self, *args): read.append(t); yield t
    monkeypatch.setattr(StreamedDataset, "_tables", spy)
    assert next(iter(stream(uneven[0], start_step=10_000)))["step"] == 10_000
    assert len(read) < 10


def test_a_stream_travels_to_another_process(packed):
    a = stream(packed, epochs=1)
    whole = names(a)                                             # opened by now
    assert names(pickle.loads(pickle.dumps(a))) == whole


@pytest.mark.slow
def test_spawned_workers_read_the_same(packed):
    how = dict(batch_size=None, num_workers=1)
    a, b = (names(DataLoader(stream(packed, epochs=1), multiprocessing_context=c, **how)) for c in ("fork", "spawn"))
    assert a == b


def test_text_and_missing_text(root, tmp_path):
    from pokemon_nb.captioning import caption_dataset
    own = build_dataset("critters", tmp_path/"d", n=80, size=8)
    caption_dataset(own)
    batch = next(iter(stream(write_shards(own, tmp_path/"s"))))
    by = {r["file_name"]: r for r in read_metadata(own, "train")}
    assert batch["text"] == [by[n]["text"] for n in batch["file_name"]] and all(batch["text"])
    assert batch["captions"] == [by[n]["captions"] for n in batch["file_name"]]


# --- damage ---------------------------------------------------------------------------------------------------------
def test_a_corrupt_row_stops_the_stream_and_is_named(packed, tmp_path):
    src = shard_files(packed)[0]
    table = pq.read_table(src)
    bad = table.to_pylist()
    bad[5]["image"]["bytes"] = bad[5]["image"]["bytes"][:60]
    pq.write_table(pa.Table.from_pylist(bad, schema=table.schema), tmp_path/"bad.parquet")
    with pytest.raises(ValueError, match=rf"bad\.parquet row 5 \({bad[5]['file_name']}\)"):
        list(stream([str(tmp_path/"bad.parquet")], epochs=1))
    bad[5]["image"] = dict(bytes=None, path="gone.png")
    pq.write_table(pa.Table.from_pylist(bad, schema=table.schema), tmp_path/"bad.parquet")
    with pytest.raises(ValueError, match="must hold its picture's bytes, got none in .*bad.parquet row 5"):
        list(stream([str(tmp_path/"bad.parquet")], epochs=1))


def test_damaged_and_foreign_files_are_named(packed, tmp_path):
    good = shard_files(packed)[0]
    (tmp_path/"cut.parquet").write_bytes(Path(good).read_bytes()[:-50])
    for files in ([str(tmp_path/"cut.parquet")], [good, str(tmp_path/"cut.parquet")]):
        with pytest.raises(ValueError, match="cut.parquet"): list(stream(files, epochs=1))
    pq.write_table(pa.table({"a": [1]}), tmp_path/"other.parquet")
    with pytest.raises(ValueError, match=r"other.parquet' must have a column 'image', got the columns \['a'\]"):
        list(stream([str(tmp_path/"other.parquet")]))


@pytest.mark.parametrize("bad,why", [
    (dict(batch_size=0), "batch_size must be at least 1, got 0"), (dict(buffer=-1), "buffer must be at least 0"),
    (dict(epochs=0), "epochs must be at least 1, got 0"), (dict(start_step=-1), "start_step"),
    (dict(rank=2, world_size=2), r"rank must lie in \[0,2\), got 2"), (dict(size=2), "size must lie in"),
    (dict(channels=1), "channels must be 3 or 4"), (dict(threads=0), "threads must be at least 1"),
])
def test_bad_arguments_of_a_stream(packed, bad, why):
    with pytest.raises(ValueError, match=f"StreamedDataset: {why}"): stream(packed, **bad)


def test_the_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'pokemon_nb\[data\]'"): StreamedDataset("anywhere")


# --- the trainer ----------------------------------------------------------------------------------------------------
class Tiny(L.LightningModule):
    "Remembers what it was fed."
    def __init__(self):
        super().__init__()
        self.w, self.fed, self.checked = torch.nn.Linear(1, 1), [], []
    def training_step(self, batch, i):
        self.fed.append((batch["step"], batch["file_name"]))
        return self.w(batch["x0"].mean()[None]).sum()
    def validation_step(self, batch, i): self.checked += batch["file_name"]
    def configure_optimizers(self): return torch.optim.SGD(self.parameters(), 1e-4)


def fit(data, steps, tmp_path, resume=None, **kw):
    m = Tiny()
    quiet = dict(logger=False, enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False)
    t = L.Trainer(max_steps=steps, accelerator="cpu", **quiet | dict(num_sanity_val_steps=0, limit_val_batches=0) | kw)
    t.fit(m, data, ckpt_path=resume)
    t.save_checkpoint(tmp_path/"last.ckpt")
    return m


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("workers,gather", [(0, 1), (2, 1), (0, 2)])
def test_a_resumed_trainer_goes_on_in_the_stream(packed, tmp_path, workers, gather):
    data = lambda: ShardData(packed, size=8, batch_size=4, num_workers=workers, buffer=30)
    kw = dict(accumulate_grad_batches=gather)
    whole = fit(data(), 10, tmp_path, **kw).fed
    first = fit(data(), 4, tmp_path, **kw).fed
    rest = fit(data(), 10, tmp_path, tmp_path/"last.ckpt", **kw).fed
    assert [s for s, _ in whole] == list(range(10*gather)) and first + rest == whole


@pytest.mark.filterwarnings("ignore")
def test_every_validation_sees_the_whole_split(packed, root, tmp_path):
    m = fit(ShardData(packed, size=8, batch_size=4), 6, tmp_path, num_sanity_val_steps=1, limit_val_batches=1.,
            val_check_interval=3, check_val_every_n_epoch=None)
    want = sorted(r["file_name"] for r in read_metadata(root, "val"))
    assert len(m.checked) == 4 + 2*len(want) and sorted(m.checked[4:4 + len(want)]) == want


def test_the_module_speaks_pokemon_datas_words(root, packed):
    import inspect
    ours, theirs = (inspect.signature(c).parameters for c in (ShardData, PokemonData))
    shared = [k for k in theirs if k in ours]
    assert list(ours)[:len(shared)] == shared and set(theirs) - set(shared) <= {"recoloured"}
    assert all(ours[k].default == theirs[k].default for k in shared)
    with pytest.raises(FileNotFoundError, match="got none"): ShardData(root).setup("fit")
    with pytest.raises(ValueError, match="num_workers"): ShardData(packed, num_workers=-1)
