"""Checkpoints in other forms draw the same pictures, say what they are, and refuse by name what they cannot do."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from pokemon_nb import quantization
from pokemon_nb.ddpm import NoiseProcess, PokemonPipeline, load_pipeline
from pokemon_nb.quantization import (
    ENGINES,
    Graph,
    channels_to_keep,
    load_runtime,
    new_checkpoint,
    png_recipe,
    to_bf16,
    to_int8,
    to_onnx,
    to_pruned,
)
from pokemon_nb.sampling import native_bf16
from pokemon_nb.unet import UNet

SHIPPED = Path(quantization.__file__).parent / "weights/pokemon-64"
WORDS = ["a red fire pokemon with wings", "a blue fish", "", "a green bug"]


def draw(pipe, prompts=WORDS, **kw):
    return pipe(prompts, seed=[3, 4, 5, 6][: len(prompts)], output_type="pt", **kw).images


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    "A cascade with random weights: two networks, one of them with a hint."
    torch.manual_seed(0)
    nets = [UNet(widths=(64,), depths=(1,), emb_dim=64, cond_channels=c) for c in (0, 5)]
    for net in nets:
        torch.nn.init.normal_(net.head.weight, std=0.02)
    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    PokemonPipeline(
        nets[0], NoiseProcess(), sample_size=32, num_inference_steps=3, base_size=16, upsampler=nets[1]
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def graphs(tiny, tmp_path_factory):
    return to_onnx(tiny, tmp_path_factory.mktemp("graphs") / "checkpoint")


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_the_shipped_graphs_draw_what_pytorch_draws(engine):
    ours, theirs = load_runtime(SHIPPED, engine), load_pipeline(SHIPPED, "cpu")
    for settings in ({}, {"guidance_scale": 1.0}, {"sampler": "heun"}, {"size": 96}):
        levels = (draw(ours, **settings) - draw(theirs, **settings)).abs().max().item() * 255 / 2
        assert levels < 1, f"{engine}, {settings}: {levels:.2f} levels of 255"


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_a_picture_does_not_depend_on_the_batch(engine):
    pipe = load_runtime(SHIPPED, engine)
    together = draw(pipe)
    for i, words in enumerate(WORDS):
        alone = pipe(words, seed=3 + i, output_type="pt").images
        assert (together[i] - alone[0]).abs().max() * 255 / 2 < 1


@pytest.mark.skipif(not native_bf16(), reason="needs a processor that multiplies bf16")
def test_bf16_is_asked_for_by_name():
    "Its pictures are like float32's but not the same; `openvino` alone is float32 on every processor."
    exact, coarse = (draw(load_runtime(SHIPPED, k)) for k in ("openvino", "openvino-bf16"))
    assert 1 < (exact - coarse).abs().max() * 255 / 2
    assert (exact - coarse).abs().mean() * 255 / 2 < 4


def test_bf16_is_refused_where_it_would_be_emulated(monkeypatch):
    monkeypatch.setattr(quantization, "native_bf16", lambda: False)
    with pytest.raises(ValueError, match="does not multiply bf16; use openvino"):
        load_runtime(SHIPPED, "openvino-bf16")


def test_a_cascade_is_exported_whole(tiny, graphs):
    ours, theirs = load_runtime(graphs), load_pipeline(tiny, "cpu")
    assert (ours.runtime, theirs.runtime) == ("onnxruntime", "torch")
    assert (draw(ours) - draw(theirs)).abs().max() < 1e-4
    assert ours(WORDS[0], seed=1).nfe == theirs(WORDS[0], seed=1).nfe
    with pytest.raises(ValueError, match="multiple of"):
        ours("a cat", size=33)


def test_graphs_hold_no_weights_and_no_paths(graphs):
    for file in [*graphs.rglob("model.onnx"), *SHIPPED.rglob("model.onnx")]:
        weights = file.with_name("diffusion_pytorch_model.safetensors")
        assert file.stat().st_size < 0.05 * weights.stat().st_size + 20_000
        assert b"site-packages" not in file.read_bytes() and b".py" not in file.read_bytes()


def test_weights_that_changed_under_a_graph_are_seen(tiny, tmp_path):
    from safetensors.torch import load_file, save_file

    program = quantization._onnx(load_pipeline(tiny, "cpu").unet)
    file = shutil.copy(tiny / "unet/diffusion_pytorch_model.safetensors", tmp_path)
    state = load_file(file)
    state["stem.weight"] += 1
    save_file(state, file)
    with pytest.raises(ValueError, match=r"stem\.weight .* different weights"):
        quantization.point_into(program, Path(file))
    stale = shutil.copytree(SHIPPED, tmp_path / "stale")
    weights = stale / "unet/diffusion_pytorch_model.safetensors"
    save_file({k: v * 0.9 for k, v in load_file(weights).items()}, weights)
    with pytest.raises(ValueError, match="not those that its graph was made from.*pokemon_quantize onnx"):
        load_runtime(stale, "onnxruntime")
    assert not list(to_bf16(SHIPPED, tmp_path / "bf16").rglob("model.onnx"))  # nor does a technique carry them over


def test_a_lean_command_loads_no_large_library(tmp_path):
    "What a cold start waits for is imports."
    code = (
        "import sys; from pokemon_nb.quantization import load_runtime\n"
        "load_runtime(sys.argv[1])('a red bird', seed=0)\n"
        "print(sorted({'diffusers', 'transformers', 'lightning', 'scipy', 'gradio'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, SHIPPED], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_a_signal_after_openvino_is_no_crash():
    "OpenVINO's core has signals handled on a stack of its own; were it freed, the next signal would end the process."
    code = (
        "import gc, os, signal, sys; from pokemon_nb.quantization import load_runtime\n"
        "signal.signal(signal.SIGUSR1, lambda *_: None)\n"
        "for _ in range(3):\n"
        "    load_runtime(sys.argv[1], 'openvino'); gc.collect(); [bytearray(8192) for _ in range(2000)]\n"
        "    os.kill(os.getpid(), signal.SIGUSR1)\n"
        "print('alive')"
    )
    done = subprocess.run([sys.executable, "-c", code, SHIPPED], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr


def test_auto_says_why_it_is_not_faster(tiny, graphs, monkeypatch):
    assert "has no unet/model.onnx" in load_runtime(tiny).fallback
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda name: None)
    pipe = load_runtime(graphs)
    assert pipe.runtime == "torch" and "onnxruntime is not installed" in pipe.fallback
    with pytest.raises(ValueError, match="openvino is not installed; run: pip install"):
        load_runtime(graphs, "openvino")


def test_wrong_calls_are_refused(tiny, graphs, tmp_path):
    with pytest.raises(ValueError, match=f"allowed: auto, torch, {', '.join(ENGINES)}"):
        load_runtime(graphs, "tensorrt")
    with pytest.raises(ValueError, match="runs on a CPU, got device 'cuda'"):
        load_runtime(graphs, "onnxruntime", "cuda")
    with pytest.raises(ValueError, match="does not exist yet"):
        to_bf16(tiny, tiny)
    broken = shutil.copytree(graphs, tmp_path / "broken")
    (broken / "unet/model.onnx").write_bytes(b"no graph")
    with pytest.raises(ValueError, match=f"{broken} cannot be loaded by onnxruntime"):
        load_runtime(broken)
    (broken / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match="model_index.json"):
        load_runtime(broken, "torch")


def test_a_broken_conversion_leaves_nothing(tiny, tmp_path):
    with pytest.raises(ZeroDivisionError), new_checkpoint(tiny, tmp_path / "out"):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    with new_checkpoint(tiny, tmp_path / "out", training="again"):
        pass
    assert json.loads((tmp_path / "out/model_index.json").read_text())["training"] == "again"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_bfloat16(tiny, tmp_path):
    pipe = load_pipeline(to_bf16(tiny, tmp_path / "bf16"), "cpu")
    assert {net.dtype for net in pipe.networks} == {torch.bfloat16}
    off = (draw(pipe) - draw(load_pipeline(tiny, "cpu"))).abs().mean()
    assert 0 < off < 0.05
    latent = load_pipeline(to_bf16(SHIPPED, tmp_path / "latent"), "cpu")
    assert draw(latent, WORDS[:1]).dtype == torch.float32  # pictures are, whatever drew them


def test_eight_bits(tiny, tmp_path):
    folder = to_int8(tiny, tmp_path / "int8", WORDS[:2])
    facts = json.loads((folder / "unet/graph.json").read_text())
    assert facts["weights"] == "int8" and facts["in_float"]
    for engine in ("onnxruntime", "openvino"):
        off = (draw(load_runtime(folder, engine)) - draw(load_pipeline(tiny, "cpu"))).abs().mean()
        assert 0 < off < 0.05
    assert load_pipeline(folder).runtime == "onnxruntime"  # the folder itself says how it is loaded
    with pytest.raises(ValueError, match="int8 graphs only"):
        load_runtime(folder, "torch")


def test_pruning_cuts_what_adds_least(tiny, tmp_path):
    old = load_pipeline(tiny, "cpu")
    block = old.unet.enc[0][0]
    energy = torch.rand(64, generator=torch.Generator().manual_seed(0))
    keep = channels_to_keep(block, energy, 32)
    adds = energy * block.conv2.weight.square().sum((0, 2, 3))
    gone = sorted(set(range(64)) - set(keep.tolist()))
    assert adds[keep].min() >= adds[gone].max() and keep.equal(keep.sort().values)
    new = load_pipeline(to_pruned(tiny, tmp_path / "half", 0.5), "cpu")
    assert list(new.unet.config.hidden) == [32] and new.unet.enc[0][0].conv1.weight.shape[0] == 32
    assert new.unet.num_parameters() < old.unet.num_parameters()
    assert (draw(load_pipeline(to_pruned(tiny, tmp_path / "same", 0.0), "cpu")) - draw(old)).abs().max() < 1e-4
    again = load_pipeline(to_pruned(tmp_path / "half", tmp_path / "quarter", 0.5), "cpu")
    assert list(again.unet.config.hidden) == [16]


def test_a_graph_serves_every_batch_and_size(tiny, graphs):
    graph, net = Graph(graphs / "unet", "onnxruntime"), load_pipeline(tiny, "cpu").unet
    for batch, side in ((1, 2), (2, 16), (5, 8), (16, 32)):
        args = torch.randn(batch, 4, side, side), torch.randn(batch), torch.zeros(batch, 384)
        with torch.inference_mode():
            assert (graph(*args) - net(*args)).abs().max() < 1e-4


def test_from_the_shell(tmp_path):
    "Drawn with one runtime, drawn again from the file with another: the same picture."

    def shell(*args):
        done = subprocess.run([Path(sys.executable).with_name(args[0]), *args[1:]], capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    code, said = shell("pokemon_generate", "a red bird", "--checkpoint", SHIPPED, "--out", tmp_path)
    assert code == 0 and "onnxruntime" in said, said
    file = tmp_path / "a-red-bird-0.png"
    assert png_recipe(file)["runtime"] == "onnxruntime"
    code, said = shell(
        "pokemon_generate", "--from", file, "--checkpoint", SHIPPED, "--out", tmp_path / "again", "--runtime", "torch"
    )
    assert code == 0 and "torch" in said, said
    a, b = (torch.tensor(list(Image.open(f).convert("RGBa").tobytes())) for f in (file, tmp_path / "again" / file.name))
    assert (a - b).abs().max() <= 1
    code, said = shell("pokemon_quantize", "int8", SHIPPED)
    assert code == 2 and "--out must name a folder" in said


@pytest.mark.slow
def test_machine_code(tiny, tmp_path):
    from pokemon_nb.quantization import to_compiled

    if not shutil.which("g++"):
        pytest.skip("needs a C++ compiler")
    pipe = load_runtime(to_compiled(tiny, tmp_path / "compiled"), "compiled")
    expected = draw(load_pipeline(tiny, "cpu"))
    assert (draw(pipe) - expected).abs().max() < 1e-4
    assert (draw(pipe, WORDS[:1]) - expected[:1]).abs().max() < 1e-4  # another batch, the same machine code
