"Chapter 06: comparisons with a known outcome, and work that PyTorch's own counter counts too."
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pokemon_nb.profiling import Peaks, Timed, compare, count_work, median_interval, roofline, table, trace, utilisation
from pokemon_nb.unet import UNet


class Clock:
    "Time passes only when somebody works."
    def __init__(self): self.now, self.log = 0., []
    def __call__(self): return self.now
    def work(self, name, cost):
        def run():
            self.now += cost(len(self.log)) if callable(cost) else cost
            self.log.append(name)
        return run


def test_variants_take_turns_and_the_first_rounds_do_not_count():
    clock = Clock()
    cold = lambda k: 9. if k < 4 else 1.                         # two rounds of two
    a, b = compare({"a": clock.work("a", cold), "b": clock.work("b", .25)}, 10, 2, clock=clock)
    assert (a.seconds, b.ratio, b.low, b.high, b.verdict) == (1., 4., 4., 4., "4.00 × as fast")
    rounds = [set(clock.log[i:i + 2]) for i in range(0, 24, 2)]
    assert all(r == {"a", "b"} for r in rounds)
    assert {tuple(clock.log[i:i + 2]) for i in range(0, 24, 2)} == {("a", "b"), ("b", "a")}    # nobody is always first
    again = Clock()
    compare({"a": again.work("a", 1), "b": again.work("b", 1)}, 10, 2, clock=again)
    assert again.log == clock.log                                                            # the seed decides


def test_slower_is_said_and_few_rounds_say_nothing():
    clock = Clock()
    _, b = compare({"a": clock.work("a", 1), "b": clock.work("b", 2)}, 10, clock=clock)
    assert b.verdict == "2.00 × as slow"
    _, b = compare({"a": clock.work("a", 1), "b": clock.work("b", 2)}, 5, clock=clock)
    assert b.verdict == "no difference" and math.isinf(b.high)


@pytest.mark.parametrize("bad", [dict(rounds=0), dict(warmup=-1)])
def test_numbers_that_make_no_sense_are_refused(bad):
    with pytest.raises(ValueError, match="compare"): compare({"a": lambda: None}, **bad)


@pytest.mark.parametrize("bad", [0, 1, -.5])
def test_confidence_is_a_share(bad):
    with pytest.raises(ValueError, match="confidence"): median_interval([1.], bad)


@pytest.mark.parametrize("n, k", [(8, 1), (11, 1), (12, 2), (20, 4), (21, 5)])
def test_intervals_are_those_of_the_printed_tables(n, k):        # sign test, 99 %: Conover 1999, table A3
    low, high = median_interval(list(range(1, n + 1)))
    assert (low, high) == (k, n + 1 - k)


def test_quality_stands_beside_speed():
    rows = [Timed("a", 1., 1., 1., 1., 0.), Timed("b", .5, 2., 1.9, 2.1, 3.)]
    text = table(rows, {"b": {"KID": .0123}})
    assert text.splitlines()[0].endswith("| verdict | KID |") and "| 2.00 × as fast | 0.0123 |" in text
    assert all(line.count("|") == text.splitlines()[0].count("|") for line in text.splitlines())


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_flops_are_those_of_torchs_own_counter(mode):
    torch.manual_seed(0)
    net = UNet(widths=(64,), depths=(1,), emb_dim=64)
    args = torch.randn(2, 4, 32, 32), torch.rand(2), torch.randn(2, 384)
    def call():
        with mode(): return net(*args)
    with FlopCounterMode(display=False) as counter: call()
    rows = count_work(call)
    assert sum(w.flops for w in rows) == counter.get_total_flops() > 1e6
    assert all(w.calls > 0 and w.bytes >= 0 for w in rows) and rows == sorted(rows, key=lambda w: -w.seconds)
    assert 0 < utilisation(rows, 1., Peaks(1e12, 1e10)) < 1
    assert roofline(rows, Peaks(1e12, 1e10)).axes[0].get_xlabel() == "FLOPs a byte"


def test_a_view_moves_no_bytes():
    x = torch.randn(8, 8)
    rows = {w.name: w for w in count_work(lambda: x.t().reshape(-1) + 1)}
    assert rows["aten.t"].bytes == 0 and rows["aten.add"].bytes == 2*4*64


def test_a_trace_is_written_whole(tmp_path):
    import json
    x = torch.randn(32, 32)
    seen = trace(lambda: x @ x, tmp_path/"trace.json", warmup=1)
    assert any("mm" in e.key for e in seen)
    assert json.loads((tmp_path/"trace.json").read_text())["traceEvents"]
