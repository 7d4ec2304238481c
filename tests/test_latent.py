"""Guards for the codec and for training on its latents."""

import json

import pytest
import torch

from pokemon_nb.ddpm import load_pipeline
from pokemon_nb.latent import LitCodec, load_codec, train_codec
from pokemon_nb.train import publish, resolve_config, train

NET = dict(widths=(32, 32, 32), depths=(1, 1, 1), latent_channels=4)
SMALL = dict(batch_size=8, size=16, recolour=0.0, rest_from=0.5, device="cpu") | NET
TINY = (
    "model=latent diffusion=latent model.widths=[64] model.depths=[1] model.emb_dim=64 data.size=16 wandb=disabled "
    "training_params.val_every=5 training_params.val_levels=2 training_params.grid_prompts=2 "
    "diffusion_steps.num_inference_steps=2 training_params.batch_size=8 data.prompts=['a red creature','a blue fish'] "
)


@pytest.fixture(scope="module")
def codec(critters, tmp_path_factory):
    return train_codec(critters, tmp_path_factory.mktemp("codec") / "run", 8, val_every=4, **SMALL)


class Stopped(Exception):
    pass


def test_an_interrupted_codec_run_resumes_bit_for_bit(critters, codec, tmp_path, monkeypatch):
    "Stopped between two snapshots, once before and once after the encoder came to rest at step 4."
    out, step = tmp_path / "run", LitCodec.training_step
    for last in (5, 7):

        def stop(self, batch, i, last=last):
            if batch["step"] == last:
                raise Stopped
            return step(self, batch, i)

        monkeypatch.setattr(LitCodec, "training_step", stop)
        with pytest.raises(Stopped):
            train_codec(critters, out, 8, val_every=2, **SMALL)
    monkeypatch.setattr(LitCodec, "training_step", step)
    again = train_codec(critters, out, 8, val_every=2, **SMALL)
    whole, parts = (load_codec(f, size=16).state_dict() for f in (codec, again))
    assert all(torch.equal(whole[k], parts[k]) for k in whole)
    rows = [json.loads(r) for r in (again.parent / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [2, 4, 6, 8]


def test_the_encoder_rests(critters, codec, tmp_path):
    "From the share of steps on that is asked for, and always where a decoder learns on."

    def trained(name, **settings):
        folder = train_codec(critters, tmp_path / name, 4, val_every=4, **SMALL | settings)
        return load_codec(folder, size=16).state_dict()

    parts = ("stem", "enc1", "down", "enc2", "to_latent", "mean_in")
    fresh = LitCodec(4, **NET).codec.state_dict()
    encoder = [k for k in fresh if k.split(".")[0] in parts]
    never, half = trained("never", rest_from=0.0), trained("half", rest_from=0.5)
    assert encoder and all(torch.equal(fresh[k], never[k]) for k in encoder)
    assert any(not torch.equal(fresh[k], half[k]) for k in encoder)
    assert not torch.equal(fresh["head.weight"], never["head.weight"])
    old, on = load_codec(codec, size=16).state_dict(), trained("on", init=str(codec))
    assert all(torch.equal(old[k], on[k]) for k in encoder) and not torch.equal(old["head.weight"], on["head.weight"])


def test_a_model_learns_latents_and_its_checkpoint_holds_the_codec(critters, codec, tmp_path):
    cfg = resolve_config(str(critters), steps=10, out=str(tmp_path / "run"), overrides=f"{TINY} model.codec={codec}")
    run = train(cfg)
    pipe = load_pipeline(run)
    assert (pipe.unet.config.in_channels, pipe.channels, pipe.factor) == (4, 4, 8)
    seen = []
    out = pipe("a red creature", 2, seed=3, callback_on_step_end=lambda p, i, s, state: seen.append(state))
    assert [i.size for i in out.images] == [(16, 16)] * 2 and out.images[0].mode == "RGBA"
    assert seen[0]["latents"].shape == (2, 4, 2, 2) and seen[0]["x0"].shape == (2, 4, 16, 16)
    shipped = load_codec(run, size=16).state_dict()
    assert all(torch.equal(v, shipped[k]) for k, v in load_codec(codec, size=16).state_dict().items())
    alone, batch = pipe("a red creature", seed=4), pipe(["a blue fish", "a red creature"], seed=[9, 4])
    assert alone.images[0].tobytes() == batch.images[1].tobytes()


def test_a_decoder_that_learned_on_replaces_the_old_one(critters, codec, tmp_path):
    "One with the same encoder may, one of another seed may not."
    cfg = resolve_config(str(critters), steps=1, out=str(tmp_path / "run"), overrides=f"{TINY} model.codec={codec}")
    run = train(cfg)
    torch.nn.init.zeros_((newer := load_codec(codec, size=16)).head.weight)
    newer.save_pretrained(tmp_path / "newer")
    out = publish(run, tmp_path / "out", codec=tmp_path / "newer")
    assert not load_pipeline(out, "cpu").codec.head.weight.any()
    other = train_codec(critters, tmp_path / "other", 2, val_every=2, seed=5, **SMALL)
    with pytest.raises(ValueError, match="encodes pictures otherwise"):
        publish(run, tmp_path / "out", codec=other)


def test_what_does_not_fit_is_refused(critters, codec, tmp_path):
    for wrong, message in (
        (f"model.codec={tmp_path}", "must name a folder with a codec"),
        (f"model.codec={codec} data.channels=3", "the 4 of the codec"),
        (f"model.codec={codec} data.size=20", "multiple of 8"),
        (f"model.codec={codec} model.base={codec}", "must be empty for latents"),
    ):
        with pytest.raises(ValueError, match=message):
            train(resolve_config(str(critters), steps=2, out=str(tmp_path / "run"), overrides=f"{TINY} {wrong}"))
    assert not (tmp_path / "run/config.yaml").exists()
