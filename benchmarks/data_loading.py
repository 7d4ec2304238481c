"""Does data loading starve training? Loaders against training in one process; a million pictures in constant memory.

    python benchmarks/data_loading.py                       # critters; --data FOLDER for a dataset of your own
    python benchmarks/data_loading.py --million             # adds the stream of 1,000,000 pictures (minutes)

A loader's figure is the median rate of batches of 16 at 64 px, augmented; training is the step of the default network
for folders (`model=fast`) and of the benchmark's (`model=base`), in bf16 where the CPU has it.
Rounds of all contestants alternate. The ratio is loader / training images per second of the same run.
"""

import itertools
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from fastcore.script import call_parse, store_true
from train_throughput import Runner, call_ours

from pokemon_nb.captioning import caption_dataset
from pokemon_nb.data import PokemonData, build_dataset, paint_critter, random_critter
from pokemon_nb.shards import ShardData, StreamedDataset, write_shards
from pokemon_nb.unet import UNet

BATCH = 16


def rate(batches, n: int) -> float:
    "Images per second over `n` batches."
    start = time.perf_counter()
    seen = sum(len(b["x0"]) for b in itertools.islice(batches, n))
    return seen / (time.perf_counter() - start)


def rss() -> float:
    "Resident memory of this process in MiB."
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def ratios(root: Path, shards: dict[str, Path], rounds: int):
    "Alternate loaders and training steps; print medians and ratios."
    from pokemon_nb.train import best_precision

    bf16 = best_precision("cpu") == "bf16-mixed"
    nets = {"training model=fast": UNet(patch_size=4, widths=(128, 192), depths=(1, 2)), "training model=base": UNet()}
    runners = {k: Runner(k, net, call_ours, bf16) for k, net in nets.items()}
    memory = lambda **k: iter(PokemonData(root, size=64, batch_size=BATCH, **k).train_dataloader())
    stream = lambda at, w: iter(ShardData(at, size=64, batch_size=BATCH, num_workers=w).train_dataloader())
    loaders = {"memory (default)": memory(), "memory, half recoloured": memory(recoloured=.5)}
    loaders |= {f"stream, {k}, {w} workers": stream(at, w) for k, at in shards.items() for w in (0, 1, 2)}
    seen = {k: [] for k in [*loaders, *runners]}
    for r in runners.values(): r.step(BATCH)                                          # warm up
    for it in loaders.values(): rate(it, 20)
    for _ in range(rounds):
        for k, it in loaders.items(): seen[k].append(rate(it, 20))
        for k, r in runners.items(): seen[k].append(BATCH / r.step(BATCH))
    median = {k: statistics.median(v) for k, v in seen.items()}
    train = {k: median[k] for k in runners}
    print(f"\n{torch.get_num_threads()} threads, {'bf16' if bf16 else 'fp32'}, {rounds} rounds, batch {BATCH}, 64 px")
    print("| | images/s | " + " | ".join(f"/ {k}" for k in train) + " |\n| --- | --- |" + " --- |" * len(train))
    for k, v in median.items():
        print(f"| {k} | {v:,.0f} | " + " | ".join(f"{v / t:.1f}" for t in train.values()) + " |")


def stream_million(folder: Path, total: int = 1_000_000, per_file: int = 1000):
    "Stream `total` pictures, each decoded to a tensor; the list names one small file over and over by hard links."
    import io

    import datasets

    rows = []
    for k in range(per_file):
        out = io.BytesIO()
        paint_critter(random_critter(k % 200), 16).save(out, "PNG")
        rows.append({"file_name": f"{k:05}.png", "text": "a critter", "image": {"bytes": out.getvalue(), "path": None}})
    first = folder / "train-00000.parquet"
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows).cast_column("image", datasets.Image()).to_parquet(first)
    files = [first]
    for k in range(1, total // per_file):
        files.append(folder / f"train-{k:05}.parquet")
        os.link(first, files[-1])
    stream = iter(StreamedDataset(files, size=16, batch_size=250, augment=False))
    print(f"\n{total:,} pictures of 16 px in {len(files)} files, every one decoded:")
    start, memory = time.perf_counter(), []
    for k, _ in enumerate(itertools.islice(stream, total // 250), 1):
        if k * 250 % (total // 10) == 0 or k == 40:
            memory.append(rss())
            speed = k * 250 / (time.perf_counter() - start)
            print(f"{k * 250:>9,} pictures  {memory[-1]:7.1f} MiB  {speed:,.0f} images/s", flush=True)
    grown = memory[-1] - memory[1]
    print(f"growth from {total // 10:,} to {total:,} pictures: {grown:.1f} MiB")
    if grown > 64: raise SystemExit("memory is not constant: more than 64 MiB of growth")


@call_parse
def main(
    data: str = "",                # dataset folder; empty = 600 critters of 128 px
    rounds: int = 15,              # rounds of alternation
    million: store_true = False,   # stream 1,000,000 pictures as well
):
    "Measure loading against training."
    with tempfile.TemporaryDirectory() as d:
        root = Path(data) if data else build_dataset("critters", Path(d) / "data", n=600, size=128)
        if not data: caption_dataset(root)
        shards = {"as they are": Path(d) / "full", "packed at 64 px": Path(d) / "small"}
        write_shards(root, shards["as they are"], per_shard=50)
        write_shards(root, shards["packed at 64 px"], per_shard=50, size=64)
        ratios(root, shards, rounds)
        if million:
            (Path(d) / "million").mkdir()
            stream_million(Path(d) / "million")
