"""Load on the service, loopback only and bounded: clients, faults of the clock, memory.

    python benchmarks/load.py --clients 4 16 64 --seconds 60           # throughput, percentiles, batches or not
    python benchmarks/load.py --requests 10000                         # growth of memory
    python benchmarks/load.py --cold 5                                 # from process start to the first picture

The command is started here, on a free port of 127.0.0.1, with the default settings of the checkpoint; numbers are
printed as a table and appended to runs/load.jsonl together with what they were measured on.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import subprocess
import sys
import time
from pathlib import Path

import httpx

from pokemon_nb.deploy import memory_mib

SERVE = Path(sys.executable).with_name("pokemon_serve")
PROMPTS = ["a blue water pokemon with wings", "a small red fire creature", "a yellow electric mouse", "a purple ghost"]


class Server:
    "The command on a free port; ready when entered."

    def __init__(self, options):
        self.started = time.perf_counter()
        self.process = subprocess.Popen([SERVE, "--port", "0", "--rate", "", "--no_page", *options], text=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)

    def __enter__(self):
        self.url = next(line.split()[1] for line in self.process.stdout if line.startswith("page "))
        while True:
            try:
                if httpx.get(f"{self.url}readyz").status_code == 200: return self
            except httpx.TransportError: time.sleep(.05)

    def __exit__(self, *error):
        self.process.terminate()
        self.process.wait(60)


def percentile(times, q): return sorted(times)[min(len(times) - 1, int(q*len(times)))] if times else float("nan")


async def load(url, clients, seconds=None, requests=None, steps=None):
    "Closed loop: each client asks, waits, asks again; 429 is obeyed. Answers times by status, and seconds in all."
    said, left, start = {}, [requests or 10**9], time.perf_counter()
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as http:
        async def one(rng):
            while left[0] > 0 and (seconds is None or time.perf_counter() - start < seconds):
                left[0] -= 1
                body = dict(prompt=rng.choice(PROMPTS), seed=rng.randrange(2**31))
                if steps: body["steps"] = steps
                began = time.perf_counter()
                try:
                    answer = await http.post("generate", json=body)
                    status = answer.status_code
                except httpx.TransportError as e: status, answer = type(e).__name__, None
                said.setdefault(status, []).append(time.perf_counter() - began)
                if status == 429: await asyncio.sleep(float(answer.headers["retry-after"]))
        await asyncio.gather(*(one(random.Random(i)) for i in range(clients)))
    return said, time.perf_counter() - start


def row(name, said, seconds, **more):
    ok, others = said.get(200, []), {str(k): len(v) for k, v in said.items() if k != 200}
    return dict(what=name, images_per_s=round(len(ok)/seconds, 2), ok=len(ok), other=others,
                **{f"p{q}": round(percentile(ok, q/100), 3) for q in (50, 95, 99)}) | more


def keep(rows, out="runs/load.jsonl"):
    "Print, and append with what was measured on."
    here = dict(when=time.strftime("%F %T"), cpu=platform.processor() or platform.machine(), cores=os.cpu_count(),
                load_before=round(os.getloadavg()[0], 2))
    Path(out).parent.mkdir(exist_ok=True)
    with open(out, "a") as f: f.writelines(json.dumps(r | here) + "\n" for r in rows)
    heads = list(dict.fromkeys(k for r in rows for k in r))
    print("| " + " | ".join(heads) + " |\n|" + " --- |"*len(heads))
    for r in rows: print("| " + " | ".join(str(r.get(h, "")) for h in heads) + " |")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--clients", type=int, nargs="*", default=[])
    p.add_argument("--seconds", type=float, default=60)
    p.add_argument("--requests", type=int, default=0, help="so many requests by 16 clients, memory before and after")
    p.add_argument("--cold", type=int, default=0, help="so many starts")
    p.add_argument("--steps", type=int, default=None, help="sampler steps; left out = the checkpoint's own")
    p.add_argument("serve", nargs="*", help="options for pokemon_serve, after --")
    a, rows = p.parse_args(), []
    if a.clients:
        for name, batch in (("batches of up to 16", "16"), ("one by one", "1")):
            with Server(["--batch", batch, *a.serve]) as s:
                asyncio.run(load(s.url, 4, requests=16, steps=a.steps))                         # warm
                once = lambda n, seconds, url=s.url: asyncio.run(load(url, n, seconds, steps=a.steps))
                if batch == "16": rows.append(row("alone", *once(1, a.seconds/2)))
                for n in a.clients if batch == "16" else [16]:
                    rows.append(row(f"{n} clients, {name}", *once(n, a.seconds)))
    if a.requests:
        with Server(a.serve) as s:
            asyncio.run(load(s.url, 16, requests=max(200, a.requests//20), steps=a.steps))      # caches fill
            before = memory_mib(s.process.pid)
            said, seconds = asyncio.run(load(s.url, 16, requests=a.requests, steps=a.steps))
            after = memory_mib(s.process.pid)
            rows.append(row(f"{a.requests} requests", said, seconds, mib_before=round(before), mib_after=round(after),
                            growth=f"{100*(after/before - 1):.1f} %"))
    for _ in range(a.cold):
        server = Server(a.serve)
        with server as s:
            httpx.post(f"{s.url}generate", json=dict(prompt="a red bird"), timeout=120).raise_for_status()
            rows.append(dict(what="cold start to first picture", seconds=round(time.perf_counter() - s.started, 2)))
    keep(rows)


if __name__ == "__main__": main()
