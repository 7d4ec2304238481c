"""Does data loading starve training, and does a million pictures fit through a small memory?

    python benchmarks/data_loading.py                      # both parts
    python benchmarks/data_loading.py --part ratio         # loader images/s over training images/s
    python benchmarks/data_loading.py --part million       # 1,000,000 pictures streamed, memory printed on the way

Ratio: one training step is forward, backward and an AdamW update of the `model=base` network in the number format that
training chooses on this machine (bf16 where the processor multiplies it, else float32). Training steps and loader
windows alternate, so that a busy moment of the machine hits everybody; figures are medians of `rounds` windows. A
window of a loader with workers is measured after its queue has been emptied, so what was made while nobody asked does
not count. Loaders make what training eats: float tensors (B,4,64,64) in [-1,1], augmented. `memory` is PokemonData,
what training uses by default; the others stream parquet shards.

Million: 1,000 shard files of 1,000 pictures (hard links to four different files, so the disk holds four), every picture
decoded to a tensor and batched. Exit code 1 when the ratio of `memory` is below 10, a picture is missed, or the memory
grows by more than the bound after the first tenth.
"""

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from fastcore.script import Param, call_parse
from torch.utils.data import DataLoader
from train_throughput import Runner, call_ours

from pokemon_nb.batches import PokemonData
from pokemon_nb.data import build_dataset
from pokemon_nb.shards import ShardData, StreamedDataset, write_shards
from pokemon_nb.metrics import best_precision
from pokemon_nb.unet import UNet

DEMANDED = 10  # loader images/s over training images/s, for what training uses by default
BOUND_MIB = 32  # allowed growth of the resident memory after the first tenth


def resident_mib() -> float:
    "Resident memory of this process (Linux)."
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no VmRSS in /proc/self/status; this part needs Linux")


class Loader:
    "An endless loader; `window(n)` draws n batches and returns images per second."

    def __init__(self, name: str, data, batch: int):
        self.name, self.batch, self.workers, self.it = name, batch, data.num_workers, iter(data.train_dataloader())
        for _ in range(3):  # the first batches pay for decoding a split, opening shards and starting workers
            next(self.it)

    def window(self, n: int) -> float:
        "Images per second of n batches, after whatever lay ready has been drawn."
        for _ in range(2 * self.workers):  # DataLoader keeps two batches per worker ready
            next(self.it)
        start = time.perf_counter()
        for _ in range(n):
            next(self.it)
        return n * self.batch / (time.perf_counter() - start)


def ratio(folder: Path, batches, rounds: int, window: int) -> bool:
    "Print the table of one batch size after the other; True when what training uses by default is fast enough."
    root = build_dataset("critters", folder / "data", n=2500, size=64)
    shards = write_shards(root, folder / "shards", per_shard=200)
    enough = True
    for b in batches:
        train = Runner("pokemon_nb (default)", UNet(), call_ours, bf16=best_precision("cpu") == "bf16-mixed")
        loaders = [Loader("memory, 0 workers (default)", PokemonData(root, batch_size=b), b)]
        loaders += [
            Loader(f"shards, {w} worker{'s' * (w != 1)}, {t} thread{'s' * (t != 1)}", data, b)
            for w, t in ((0, 1), (0, 2), (1, 1), (2, 1))
            for data in [ShardData(shards, batch_size=b, num_workers=w, threads=t)]
        ]
        speed, steps = {x.name: [] for x in loaders}, []
        for _ in range(2):
            train.step(b)
        for _ in range(rounds):
            time.sleep(0.5)  # workers fill their queues and rest
            steps.append(train.step(b))
            for x in loaders:
                speed[x.name].append(x.window(window))
        base = b / statistics.median(steps)
        kind = "bf16" if train.bf16 else "float32"
        print(f"\nbatch {b}, {kind}: training {base:.1f} img/s ({b / max(steps):.1f}-{b / min(steps):.1f})")
        print(f"{'loader':<34}{'img/s':>9}{'min-max':>16}{'/ training':>12}")
        for x in loaders:
            v = speed[x.name]
            mid = statistics.median(v)
            print(f"{x.name:<34}{mid:9.0f}{min(v):9.0f}-{max(v):<6.0f}{mid / base:12.1f}")
        enough &= statistics.median(speed[loaders[0].name]) / base >= DEMANDED
    return enough


def million(folder: Path, images: int, size: int, workers: int) -> bool:
    "Stream `images` pictures once; True when all came and the memory stayed."
    import pyarrow.parquet as pq

    root = build_dataset("critters", folder / "small", n=1200, size=size)
    table = pq.read_table(write_shards(root, folder / "one", per_shard=10**6) / "train-00000-of-00001.parquet")
    links = folder / "million"
    links.mkdir()
    shards = -(-images // 1000)
    for k in range(shards):
        f = links / f"train-{k:05}-of-{shards:05}.parquet"
        if k < 4:  # a thousand of the painted pictures, drawn anew
            rows = torch.randint(len(table), (1000,), generator=torch.Generator().manual_seed(k)).numpy()
            pq.write_table(table.take(rows), f, row_group_size=256, compression="zstd")
        else:
            os.link(links / f"train-{k % 4:05}-of-{shards:05}.parquet", f)
    expected, disk = 1000 * shards, sum(f.stat().st_size for f in sorted(links.iterdir())[:4]) / 2**20
    print(f"\n{expected:,} pictures of {size} px in {shards:,} shard files, hard links to four of {disk:.1f} MiB")
    start = time.perf_counter()
    ds = StreamedDataset(links, size=size, batch_size=64, buffer=1000, epochs=1)
    seen, mark, warm, peak = 0, images // 20, None, 0.0
    for batch in DataLoader(ds, batch_size=None, num_workers=workers):
        assert batch["x0"].shape[1:] == (4, size, size) and batch["x0"].dtype == torch.float32
        seen += len(batch["x0"])
        if seen >= mark:
            now = resident_mib()
            warm = now if warm is None and seen >= images // 10 else warm
            peak = max(peak, now) if warm else 0.0
            passed = time.perf_counter() - start
            speed = seen / passed
            print(f"{seen:>10,} pictures {passed:6.0f} s {speed:7.0f} img/s   resident {now:6.0f} MiB", flush=True)
            mark += images // 20
    growth = peak - warm
    print(f"seen {seen:,} of {expected:,}; growth after the first tenth {growth:.1f} MiB (allowed: {BOUND_MIB})")
    return seen == expected and growth <= BOUND_MIB


@call_parse
def main(
    part: Param("what to measure", str, choices=["all", "ratio", "million"]) = "all",  # noqa: F821
    batch: Param("batch sizes of the ratio", int, nargs="*") = (8, 16),  # noqa: F821
    rounds: int = 9,  # windows per loader; the median counts
    window: int = 40,  # batches per window
    images: int = 1_000_000,  # of the second part
    size: int = 32,  # side of the pictures of the second part, pixels
    workers: int = 0,  # loader processes of the second part; the memory printed is that of the main process
    threads: int = 0,  # CPU threads; 0 = torch's own choice
):
    "Print loader and training throughput, and the memory of a long stream."
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {os.cpu_count()} cores")
    good = True
    with tempfile.TemporaryDirectory() as folder:
        if part in ("all", "ratio"):
            good &= ratio(Path(folder), batch, rounds, window)
        if part in ("all", "million"):
            good &= million(Path(folder), images, size, workers)
    sys.exit(0 if good else 1)
