"""Streaming: complete and disjoint between ranks and workers, repeatable, resumable, equal to what memory holds."""
import itertools
import json
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

pytest.importorskip("datasets")
from pokemon_nb.data import PokemonDataset, read_metadata  # noqa: E402
from pokemon_nb.shards import ShardData, StreamedDataset, shard_files, write_shards  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Too many dataloader workers")


@pytest.fixture(scope="module")
def shards(critters, tmp_path_factory):
    out = tmp_path_factory.mktemp("shards") / "shards"
    write_shards(critters, out, per_shard=9)
    return out


def names(batches): return [n for b in batches for n in b["file_name"]]


@pytest.mark.parametrize("per_shard, ranks, workers", [(9, 2, 2), (5, 2, 2), (40, 2, 2), (9, 3, 1), (1000, 2, 0)])
def test_ranks_and_workers_share_everything_once(critters, tmp_path, per_shard, ranks, workers):
    """Real loader processes; files that do and do not divide evenly, and fewer files than readers."""
    write_shards(critters, tmp_path / "s", per_shard)
    whole = sorted(r["file_name"] for r in read_metadata(critters, "train"))
    for _ in range(1):
        seen = []
        for rank in range(ranks):
            ds = StreamedDataset(shard_files(tmp_path / "s", "train"), "val", size=8, batch_size=4, rank=rank,
                                 world_size=ranks)
            seen.append(names(DataLoader(ds, batch_size=None, num_workers=workers)))
        assert sorted(sum(seen, [])) == whole
        assert not set(seen[0]) & set(seen[1]) and min(map(len, seen)) > 0


def test_one_shuffled_pass_is_complete_too(critters, shards):
    n, got = len(read_metadata(critters, "train")), []
    for rank in (0, 1):
        stream = iter(StreamedDataset(shards, size=8, batch_size=1, rank=rank, world_size=2, buffer=10))
        ds = StreamedDataset(shards, size=8, rank=rank, world_size=2)
        mine = sum(1 for _ in ds.rows(0))
        got.append(names(itertools.islice(stream, mine)))
    assert sorted(sum(got, [])) == sorted(r["file_name"] for r in read_metadata(critters, "train"))
    assert len(got[0]) + len(got[1]) == n and got[0] != sorted(got[0])


def test_the_order_is_a_function_of_seed_and_pass(shards):
    first = lambda **k: names(itertools.islice(iter(StreamedDataset(shards, size=8, batch_size=6, **k)), 5))
    assert first(seed=3) == first(seed=3) != first(seed=4)
    ds = StreamedDataset(shards, size=8)
    a, b = ([r["file_name"] for r in ds.rows(e)] for e in (0, 1))
    assert a != b and sorted(a) == sorted(b)


@pytest.mark.parametrize("workers, start", [(0, 1), (0, 23), (2, 7), (2, 12)])
def test_a_resumed_run_sees_what_it_would_have_seen(shards, workers, start):
    class Trainer: global_step, accumulate_grad_batches, global_rank, world_size = start, 1, 0, 1
    def batches(trainer, n):
        data = ShardData(shards, size=8, batch_size=5, seed=2, num_workers=workers)
        data.trainer = trainer
        return list(itertools.islice(iter(data.train_dataloader()), n))
    whole, late = batches(None, start + 4), batches(Trainer, 4)
    for a, b in zip(whole[start:], late, strict=True):
        assert a["step"] == b["step"] and a["file_name"] == b["file_name"] and torch.equal(a["x0"], b["x0"])


@pytest.mark.parametrize("channels", [3, 4])
def test_the_pixels_are_those_of_memory(critters, shards, channels):
    memory = PokemonDataset(critters, "val", 16, channels)
    place = {r["file_name"]: i for i, r in enumerate(memory.records)}
    count = 0
    for b in StreamedDataset(shards, "val", size=16, channels=channels, batch_size=3):
        assert torch.equal(b["x0"], memory.batch([place[n] for n in b["file_name"]]))
        assert b["text"] == [memory.records[place[n]]["text"] for n in b["file_name"]]
        count += len(b["file_name"])
    assert count == len(memory)


def test_resized_shards_are_nearly_the_same(critters, tmp_path):
    write_shards(critters, tmp_path / "small", size=16)
    memory = PokemonDataset(critters, "val", 16)
    b = next(iter(StreamedDataset(tmp_path / "small", "val", size=16, batch_size=len(memory))))
    order = [b["file_name"].index(r["file_name"]) for r in memory.records]
    assert (b["x0"][order] - memory.batch(range(len(memory)))).abs().max() < 2.01 / 127.5 * 2


def test_the_trainer_takes_it(shards):
    class Tiny(L.LightningModule):
        def __init__(self): super().__init__(); self.w = torch.nn.Parameter(torch.zeros(1)); self.steps = []
        def training_step(self, batch, i): self.steps.append(batch["step"]); return (batch["x0"].mean() - self.w)**2
        def validation_step(self, batch, i): self.log("v", batch["x0"].mean(), batch_size=len(batch["x0"]))
        def configure_optimizers(self): return torch.optim.SGD(self.parameters(), .1)
    m = Tiny()
    t = L.Trainer(max_steps=5, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
                  enable_model_summary=False, val_check_interval=5, check_val_every_n_epoch=None)
    t.fit(m, ShardData(shards, size=8, batch_size=4))
    assert m.steps == [0, 1, 2, 3, 4] and torch.isfinite(t.callback_metrics["v"])


def test_a_damaged_row_is_named(critters, tmp_path):
    import pyarrow.parquet as pq
    file = next(f for f in write_shards(critters, tmp_path / "s") if f.name.startswith("val"))
    table = pq.read_table(file)
    rows = table.to_pylist()
    rows[1]["image"]["bytes"] = rows[1]["image"]["bytes"][:50]
    import pyarrow as pa
    pq.write_table(pa.Table.from_pylist(rows, table.schema), file)
    with pytest.raises(ValueError, match=f"row '{rows[1]['file_name']}' must hold a whole picture"):
        list(StreamedDataset(tmp_path / "s", "val", size=8))


def test_bad_words_are_refused(critters, shards, tmp_path):
    for bad, why in ((dict(rank=2, world_size=2), "rank must lie"), (dict(batch_size=0), "batch_size"),
                     (dict(channels=2), "channels")):
        with pytest.raises(ValueError, match=why): StreamedDataset(shards, **bad)
    with pytest.raises(FileNotFoundError, match="at least one file"): StreamedDataset(tmp_path)
    with pytest.raises(ValueError, match="per_shard"): write_shards(critters, tmp_path / "x", 0)
    with pytest.raises(FileExistsError): write_shards(critters, shards)
    assert shard_files("gs://bucket/train-*.parquet") == ["gs://bucket/train-*.parquet"]


@pytest.mark.slow
def test_two_processes_of_two_workers(critters, shards, tmp_path):
    """Two real processes, each a rank with two loader processes."""
    code = ("import json, sys\nfrom torch.utils.data import DataLoader\n"
            "from pokemon_nb.shards import StreamedDataset, shard_files\n"
            "if __name__ == '__main__':\n"
            "    files, rank = shard_files(sys.argv[1]), int(sys.argv[2])\n"
            "    ds = StreamedDataset(files, 'val', size=8, rank=rank, world_size=2)\n"
            "    loader = DataLoader(ds, batch_size=None, num_workers=2)\n"
            "    print(json.dumps([n for b in loader for n in b['file_name']]))\n")
    (tmp_path / "read.py").write_text(code)
    run = [subprocess.Popen([sys.executable, tmp_path / "read.py", shards, str(r)], stdout=subprocess.PIPE, text=True)
           for r in (0, 1)]
    seen = [json.loads(p.communicate()[0].splitlines()[-1]) for p in run]
    assert sorted(seen[0] + seen[1]) == sorted(r["file_name"] for r in read_metadata(critters, "train"))
    assert len(set(seen[0])) + len(set(seen[1])) == len(seen[0]) + len(seen[1]) and Path(shards).is_dir()
