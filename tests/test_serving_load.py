"""A hundred mixed arrivals draw what each would draw alone; what the table of outcomes of a load run must hold."""

import asyncio
import random

import pytest

pytest.importorskip("httpx")
import io

from PIL import Image
from serving_tools import apart, tiny_checkpoint

from pokemon_nb.serving import Ask, Batcher, Limits, Painter, Worker


def hundred():
    "Mixed prompts, seeds, steps and guidance; every tenth asks for a preview."
    rng = random.Random(0)
    words = ["a red bird", "a blue turtle", "", "Flabébé", "a small fire creature on four legs"]
    pick = rng.choice
    return [Ask(pick(words), rng.randrange(2**40), pick([3, 4, 8]), pick([1., 2., 5.]), preview=not i % 10)
            for i in range(100)]


def mixed(painter, options, asks):
    "Pictures of `asks` sent at odd moments, those sent alone, and the sizes of the batches."
    async def together():
        batcher, rng = Batcher([Worker(options, process=False)], Limits(waiting=200)), random.Random(1)
        await batcher.start()
        orders = []
        for a in asks:
            orders.append(batcher.submit([a]))
            await asyncio.sleep(rng.choice([0, 0, .002]))
        made = await asyncio.gather(*(o.result for o in orders))
        await batcher.stop()
        return [m[0] for m in made], [o.batch for o in orders]
    made, batches = asyncio.run(together())
    return made, [painter.paint([a])[0] for a in asks], batches


def compare(made, alone):
    "Largest difference in levels, and how many files are equal byte for byte."
    as_image = lambda p: Image.open(io.BytesIO(p.data))
    assert [m.recipe for m in made] == [a.recipe for a in alone]
    pairs = list(zip(made, alone))
    return max(apart(as_image(m), as_image(a)) for m, a in pairs), sum(m.data == a.data for m, a in pairs)


def test_a_hundred_mixed_arrivals_draw_what_each_would_draw_alone(tmp_path):
    options = dict(checkpoint=tiny_checkpoint(tmp_path), device="cpu")
    made, alone, batches = mixed(Painter(**options), options, hundred())
    most, equal = compare(made, alone)
    assert max(batches) >= 4 and most <= 1, (max(batches), most)
    print(f"{equal} of 100 files equal, the others differ by at most {most} level; batches up to {max(batches)}")


@pytest.mark.slow
def test_the_same_with_the_shipped_weights():
    from pathlib import Path

    import pokemon_nb
    shipped = next((Path(pokemon_nb.__file__).parent/"weights").glob("*/model_index.json")).parent
    options = dict(checkpoint=shipped, device="cpu")
    made, alone, batches = mixed(Painter(**options), options, hundred())
    most, equal = compare(made, alone)
    assert max(batches) >= 4 and most <= 1, (max(batches), most)
    print(f"{equal} of 100 files equal, the others differ by at most {most} level; batches up to {max(batches)}")
