"""Guards for chapter 04b: distances with known answers, readers that can be wrong, copies that must not get through."""
import json
import math
from pathlib import Path

import pytest
import torch

from pokemon_nb.captioning import caption_dataset
from pokemon_nb.data import COLOURS, PokemonDataset, augment, build_dataset, draw_coats, recolour
from pokemon_nb.metrics import (
    AttributeNet, CopyDetector, Judge, attributes, bootstrap, colour_histogram, copy_rate, correct, describe_form,
    fit_logistic, frechet_distance, inception_features, jackknife, kid, load_reader, make_reader, plain,
    pokemon_metrics, precision_recall, reader_card, save_reader, table, unseen_prompts)

SHARED = Path(__file__).parents[2] / "shared/pokemon"
needs_real = pytest.mark.skipif(not SHARED.is_dir(), reason="the artworks are not beside this checkout")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    "Enough critters that each split can be measured."
    root = build_dataset("critters", tmp_path_factory.mktemp("zoo") / "data", n=320, size=16)
    caption_dataset(root)
    return root


def normal(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# figures

def test_intervals_have_the_width_that_statistics_gives_them():
    x = normal(400)
    for figure in (bootstrap(torch.mean, x, rounds=800), jackknife(torch.mean, x, rounds=800)):
        assert figure.low < x.mean() < figure.high and math.isclose(figure.high - figure.low, 4 * .98 / 20, rel_tol=.12)
    assert bootstrap(torch.mean, x, seed=1) == bootstrap(torch.mean, x, seed=1) != bootstrap(torch.mean, x, seed=2)


def test_an_interval_of_a_set_distance_holds_its_value():
    """The bootstrap would not: a sample with twins looks further away than it is."""
    a, b = normal(120, 6), normal(90, 6, seed=1) + .3
    for measure in (kid, frechet_distance):
        figure = jackknife(measure, a, b)
        assert figure.low < figure.value < figure.high


def test_frechet_of_gaussians_is_the_formula():
    a = normal(40_000, 3)
    b = normal(40_000, 3, seed=1) * torch.tensor([1., 2., .5]) + torch.tensor([1., 0., 0.])
    assert math.isclose(frechet_distance(a, b), 1 + 1 + .25, rel_tol=.05)
    assert frechet_distance(a[:5], b[:5]) >= 0                              # fewer rows than columns is no crash


def test_kid_is_unbiased_and_symmetric():
    values = [kid(normal(40, 8, seed=2 * k), normal(60, 8, seed=2 * k + 1)) for k in range(150)]
    assert abs(sum(values) / 150) < 3 * torch.tensor(values).std() / 150**.5
    a, b = normal(50, 8), normal(70, 8, seed=3) + 1
    assert math.isclose(kid(a, b), kid(b, a)) and kid(a, b) > 1


def test_precision_and_recall_tell_quality_from_variety():
    real = torch.cat([normal(100, 2), normal(100, 2, seed=1) + 20])
    one_mode = normal(200, 2, seed=2)
    noise = 40 * (torch.rand(200, 2, generator=torch.Generator().manual_seed(3)) - .5)
    precision, recall = precision_recall(real, one_mode)
    assert precision > .8 and recall < .6
    assert precision_recall(real, noise)[0] < precision


# readers

def test_pixels_are_counted_by_area_and_alpha():
    red = torch.full((1, 4, 8, 8), -1.)
    red[:, [0, 3], :4] = 1
    blue = torch.full((1, 4, 8, 8), -1.)
    blue[:, [2, 3]] = 1
    h = colour_histogram(torch.cat([red, blue]))
    assert (h > 0).sum(1).tolist() == [1, 1] and not torch.equal(h[0], h[1])       # half of the square, all of it
    both = torch.full((1, 4, 8, 8), -1.)
    both[:, [0, 3], :4] = 1
    both[:, [2, 3], 4:] = 1
    assert torch.allclose(colour_histogram(both)[0].square(), (h.square().sum(0)) / 2, atol=1e-5)


def test_logistic_regression_finds_the_known_boundary():
    x = normal(3000, 2)
    w = fit_logistic(x, (x[:, 0] > .5).long(), 2, l2=1e-6)
    at = torch.tensor([[.5, 0.], [.9, 3.], [.1, -3.]])
    p = (at @ w[:-1] + w[-1]).softmax(1)[:, 1]
    assert abs(p[0] - .5) < .1 and p[1] > .95 and p[2] < .05


def test_right_and_wrong_are_counted():
    wanted = attributes([dict(colour="red", shape="fish", types=["water", "ice"]), dict(colour="blue", shape="wings")])
    read = dict(colour=torch.tensor([COLOURS.index("red"), 0]), pixels=torch.tensor([0, COLOURS.index("blue")]),
                shape=wanted.shape.clone(), type=torch.tensor([14, 3]))             # 14 is ice, one of the two
    got = {k: v.tolist() for k, v in correct(read, wanted).items()}
    assert got == dict(colour=[1., 0.], pixels=[0., 1.], shape=[1., 1.], type=[1., 0.])


@pytest.mark.slow
def test_a_reader_learns_and_is_repeatable(critters, tmp_path):
    a, b = (make_reader(critters, 12, 16, 16, (16, 32), seed=3, progress=False) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))
    x0 = PokemonDataset(critters, "val", 16).batch(range(4))
    save_reader(a, tmp_path / "reader")
    again = load_reader(tmp_path / "reader")
    assert (again.features(x0) - a.features(x0)).abs().max() < .02
    (tmp_path / "reader/diffusion_pytorch_model.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="cannot be read"): load_reader(tmp_path / "reader")


def test_pictures_without_attributes_are_refused(tmp_path, critters):
    from PIL import Image
    for k in range(40):
        (tmp_path / "art").mkdir(exist_ok=True)
        Image.new("RGBA", (16, 16), (k * 6, 0, 0, 255)).save(tmp_path / f"art/{k}.png")
    root = build_dataset(tmp_path / "art", tmp_path / "data")
    with pytest.raises(ValueError, match="must have a colour and a shape"): make_reader(root, 1, progress=False)
    with pytest.raises(ValueError, match="without config.json"): load_reader(tmp_path)


# copies

def disguised(x0, own, seed):
    "Training pictures in another coat, mirrored, moved, zoomed, turned, under noise."
    g = torch.Generator().manual_seed(seed)
    coat = draw_coats(own, 1., g)
    x0 = augment(recolour(x0, own, torch.where(coat < 0, own, coat)), g, shift=.06, zoom=.1, rotate=4)
    return (x0 + .05 * torch.randn(x0.shape, generator=g)).clamp(-1, 1)


@needs_real
@pytest.mark.slow
def test_the_planted_copier_is_caught_on_the_artworks(tmp_path):
    root = build_dataset(SHARED, tmp_path / "data")
    sets = [PokemonDataset(root, s, 64) for s in ("train", "val", "test")]
    train, val, test = (s.batch(range(len(s))) for s in sets)
    detector = CopyDetector(train, torch.cat([val, test]))
    planted = disguised(train, sets[0].colours, seed=5)
    similarity, nearest = detector.similarity(planted)
    assert (nearest == torch.arange(len(train))).float().mean() > .99
    assert copy_rate(detector, planted).value >= .99
    assert copy_rate(detector, torch.cat([val, test])).value <= .05 + 1 / 161
    assert detector.percentile(similarity.median()[None]).item() == 1


def test_a_form_is_recognised_in_another_coat_but_not_in_another_form(critters):
    ds = PokemonDataset(critters, "train", 32)
    x0 = ds.batch(range(12))
    d = describe_form(x0)
    other = describe_form(recolour(x0, ds.colours[:12], (ds.colours[:12] + 4) % 10))
    assert torch.allclose(d.norm(dim=1), torch.ones(12), atol=1e-4) and ((d * other).sum(1) > .8).all()
    assert describe_form(torch.full((1, 4, 32, 32), -1.)).isfinite().all()           # an empty picture is no crash


# prompts and the whole

def test_unseen_prompts_are_unseen_and_say_what_they_want(critters):
    records = PokemonDataset(critters, "train", 16).records
    seen = {(r["colour"], r["shape"], t) for r in records for t in r["types"]}
    asked = unseen_prompts(records, 50)
    assert len({(w.colour, w.shape, w.type) for w in asked} - seen) == 50
    assert all(w.colour in w.prompt and w.type in w.prompt for w in asked)
    assert unseen_prompts(records, 50, seed=1) != asked == unseen_prompts(records, 50)


def test_the_judge_knows_perfection_and_memory(zoo):
    torch.manual_seed(0)
    judge = Judge(zoo, AttributeNet(widths=(16, 32), size=16).eval(), 16, rounds=20)
    same = judge.faithfulness(judge.pictures["test"], attributes(judge.records["test"]))
    assert all(f.value in (0., 1.) for f in same.values())                            # relative to itself
    rows = judge.references(40)
    assert rows["copies of train"]["copy_rate"].value > rows["real: val"]["copy_rate"].value
    assert judge.likeness(judge.pictures["test"])["precision"].value == 1
    assert "| real: val |" in table(rows) and json.dumps(plain(rows))


def test_without_torch_fidelity(critters):
    try: import torch_fidelity  # noqa: F401
    except ModuleNotFoundError:
        with pytest.raises(ModuleNotFoundError, match="inception"):
            inception_features(torch.zeros(1, 4, 8, 8))


@pytest.mark.slow
def test_the_command_line_judges_a_checkpoint(zoo, tmp_path, capsys):
    from pokemon_nb.ddpm import NoiseProcess, PokemonPipeline
    from pokemon_nb.unet import UNet
    save_reader(make_reader(zoo, 4, 8, 16, (16, 32), progress=False), tmp_path / "reader")
    net = UNet(widths=(64,), depths=(1,), emb_dim=64)
    PokemonPipeline(net, NoiseProcess(), "minilm", 16, "dpmpp_2m", 2, 1.).save_pretrained(tmp_path / "checkpoint")
    pokemon_metrics(str(zoo), str(tmp_path / "checkpoint"), reader=str(tmp_path / "reader"), n=24, unseen=16,
                    out=str(tmp_path / "metrics.json"))
    said = capsys.readouterr().out
    assert "| checkpoint |" in said and "| shuffled prompts |" in said and "copies of train" in said
    judged = json.loads((tmp_path / "metrics.json").read_text())
    assert judged["settings"]["steps"] == 2 and len(judged["likeness"]["kid"]) == 3
    with pytest.raises(SystemExit) as e: pokemon_metrics(str(zoo), str(tmp_path / "none"))
    assert e.value.code == 2 and "does not exist" in capsys.readouterr().err


@needs_real
@pytest.mark.slow
def test_the_shipped_readers_do_what_their_card_says(tmp_path):
    root = build_dataset(SHARED, tmp_path / "data")
    import pokemon_nb
    card = (Path(pokemon_nb.__file__).parent / "weights/reader/README.md").read_text(encoding="utf-8")
    assert reader_card(load_reader(), root) == card


def test_a_published_checkpoint_says_how_it_was_judged(zoo, tmp_path):
    "Figures in the card are those of metrics.json; the grid and the number of calls are there."
    from pokemon_nb.train import publish, resolve_config, train

    tiny = ("model=tiny data.size=16 wandb=disabled training_params.val_every=5 diffusion_steps.num_inference_steps=2 "
            "training_params.val_levels=2 training_params.grid_prompts=2")
    run = train(resolve_config(str(zoo), 5, 8, 0, str(tmp_path/"run"), tiny))
    out = publish(run, tmp_path/"shipped", data=zoo, n=16, unseen=16, steps=3, guidance=2.)
    judged, card = json.loads((out/"metrics.json").read_text())["judged"], (out/"README.md").read_text()
    value, low, high = judged["likeness"]["kid"]
    assert f"{value:.3f} [{low:.3f}, {high:.3f}]" in card and "6 network calls a picture" in card
    assert judged["settings"]["steps"] == 3 and str(tmp_path) not in card + (out/"metrics.json").read_text()
    assert "![" in card and (out/"grid.png").read_bytes().startswith(b"\x89PNG")
    assert "![" not in (run/"checkpoint/README.md").read_text()
