"""Guards for chapter 08: the HTTP interface in process, and the real command in a process of its own."""
import io, json, os, re, signal, socket, subprocess, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image

pytest.importorskip("httpx")
import httpx
from fastapi.testclient import TestClient

from pokemon_nb.ddpm import NoiseProcess, PokemonPipeline, load_pipeline
from pokemon_nb.serving import LIMITS, Painter, create_app, new_seed
from pokemon_nb.unet import UNet

SERVE = Path(sys.executable).with_name("pokemon_serve")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    "A run folder with a small untrained network: its pictures are noise, everything around them is real."
    torch.manual_seed(0)
    pipe = PokemonPipeline(UNet(widths=(64, 128), depths=(1, 1)), NoiseProcess(), sample_size=16, num_inference_steps=3)
    folder = tmp_path_factory.mktemp("serving")/"tiny"
    pipe.save_pretrained(folder/"checkpoint")
    return folder


@pytest.fixture(scope="module")
def client(checkpoint): return TestClient(create_app(checkpoint, "cpu"))


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def picture(answer):
    assert answer.status_code == 200 and answer.headers["content-type"] == "image/png", answer.text
    return Image.open(io.BytesIO(answer.content))


# the interface, in process

def test_a_prompt_becomes_a_png_that_equals_the_pipelines(client, checkpoint):
    answer = client.post("/generate", json={"prompt": "Pikachu", "seed": 7, "steps": 2, "guidance": 1.5})
    im = picture(answer)
    direct = load_pipeline(checkpoint, "cpu")("Pikachu", seed=7, num_inference_steps=2, guidance_scale=1.5).images[0]
    assert im.mode == "RGBA" and im.size == (16, 16) and im.tobytes() == direct.tobytes()
    recipe = json.loads(im.text["pokemon_nb"])
    assert recipe == dict(prompt="Pikachu", seed=7, steps=2, guidance_scale=1.5, sampler="dpmpp_2m",
                          checkpoint="tiny/checkpoint")


def test_a_drawn_seed_is_sent_back_and_repeats_the_picture(client):
    first, other = (client.post("/generate", json={"prompt": "Pikachu"}) for _ in range(2))
    assert first.headers["x-seed"] != other.headers["x-seed"] and first.content != other.content
    again = client.post("/generate", json={"prompt": "Pikachu", "seed": int(first.headers["x-seed"])})
    assert again.content == first.content


def test_ends_of_ranges_are_allowed(client):
    for body in (dict(prompt=""), dict(prompt="a"*1000), dict(prompt="Flabébé 👩‍🚀"), dict(prompt="x", steps=1),
                 dict(prompt="x", guidance=0), dict(prompt="x", guidance=30), dict(prompt="x", seed=2**53 - 1),
                 dict(prompt="x", seed=None, steps=None, guidance=None)):
        picture(client.post("/generate", json=body))


@pytest.mark.parametrize("body, says", [
    (b"{}", "prompt must be given"), (b"", "body"), (b"no json", "body must be JSON"), (b"[]", "the body"),
    (b'{"prompt": 5}', "prompt: Input should be a valid string, got 5"), (b'{"prompt": null}', "prompt"),
    (b'{"prompt": "a\\u0000b"}', "at position 1"), (b'{"prompt": "\\ud83d"}', "plain text"),
    (b'{"prompt": "' + b"a"*1001 + b'"}', "at most 1000 characters, got 1001"),
    (b'{"prompt": "x", "guidence": 5}', "guidence is no known key; allowed: prompt, seed, steps, guidance"),
    (b'{"prompt": "x", "steps": 0}', "steps must be a whole number from 1 to 1000, got 0"),
    (b'{"prompt": "x", "steps": 1001}', "got 1001"), (b'{"prompt": "x", "steps": 2.5}', "steps"),
    (b'{"prompt": "x", "steps": "8"}', "got '8'"), (b'{"prompt": "x", "steps": true}', "got True"),
    (b'{"prompt": "x", "seed": -1}', "seed must be a whole number from 0 to"),
    (b'{"prompt": "x", "seed": 1' + b"0"*30 + b"}", "seed"),
    (b'{"prompt": "x", "guidance": NaN}', "guidance must be a number from 0.0 to 30.0, got nan"),
    (b'{"prompt": "x", "guidance": -0.1}', "got -0.1"), (b'{"\\ud83d": 1, "prompt": ""}', "generate"),
    (b"\xff", "body")])
def test_bad_input_is_refused_in_one_line(client, body, says):
    answer = client.post("/generate", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 422), answer.text
    detail = answer.json()["detail"]
    assert isinstance(detail, str) and says in detail and len(detail) < 400, detail


def test_health_and_description(client, checkpoint):
    health = client.get("/healthz").json()
    assert health == dict(status="ok", checkpoint=str(checkpoint/"checkpoint"), device="cpu", busy=False,
                          model=health["model"]) and "16 px" in health["model"]
    schema = client.get("/openapi.json").json()
    assert set(schema["paths"]) == {"/generate", "/healthz"}
    docs = client.get("/docs").text
    for word in ("POST /generate", "GET /healthz", *schema["components"]["schemas"]["GenerateRequest"]["properties"]):
        assert word in docs


def test_nothing_is_loaded_from_other_hosts(client):
    assert not re.findall(r"https?://[^\s\"'<]+", client.get("/docs").text)
    home = client.get("/").text
    hosts = set(re.findall(r"https?://([^/\s\"'<\\]+)", home))
    # left: a link to Gradio and preview pictures for social networks in Gradio's own page head; no request goes there
    assert hosts <= {"testserver", "gradio.app", "raw.githubusercontent.com"}, hosts
    assert not re.findall(r"<(?:script|link)[^>]+(?:src|href)=\"https?://(?!testserver)[^\"]+\"[^>]*>", home)


def test_callers_wait_for_each_other_and_get_their_own_picture(client):
    ask = lambda seed: client.post("/generate", json={"prompt": "a red bird", "seed": seed}).content
    alone = [ask(s) for s in range(4)]
    with ThreadPoolExecutor(4) as pool: assert list(pool.map(ask, range(4))) == alone


def test_health_answers_while_painting(client):
    painter = client.app.state.painter
    done = []
    with painter.lock:
        waiting = threading.Thread(target=lambda: done.append(client.post("/generate", json={"prompt": "x"})))
        waiting.start()
        time.sleep(.2)
        assert client.get("/healthz").json()["busy"] and not done
    waiting.join(30)
    assert done[0].status_code == 200 and not client.get("/healthz").json()["busy"]


def test_a_failure_frees_the_painter(checkpoint):
    painter = Painter(checkpoint, "cpu")
    def fail(i): raise RuntimeError("the caller broke")
    with pytest.raises(RuntimeError): painter("a cat", on_step=fail)
    assert len(painter("a cat", n=2, steps=1).images) == 2


def test_limits_of_a_series(checkpoint):
    painter = Painter(checkpoint, "cpu")
    assert painter("a cat", n=16, seed=3, steps=1).seeds == list(range(3, 19))
    for n in (0, 17, 2.0, "2", None):
        with pytest.raises(ValueError, match="n must be a whole number from 1 to 16"): painter("a cat", n=n)
    assert 0 <= new_seed() <= LIMITS["seed"][1]


def test_wrong_checkpoints_are_refused(tmp_path, checkpoint):
    with pytest.raises(ValueError, match="does not exist"): create_app(tmp_path/"none")
    (tmp_path/"model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(ValueError, match="StableDiffusionPipeline"): create_app(tmp_path)
    with pytest.raises(ValueError, match="tpu"): create_app(checkpoint, "tpu")


def test_without_a_page_only_the_interface_is_there(checkpoint):
    bare = TestClient(create_app(checkpoint, "cpu", page=False))
    assert bare.get("/").status_code == 404 and bare.get("/healthz").status_code == 200
    assert bare.get("/generate").status_code == 405


# the command, in a process of its own

@pytest.fixture(scope="module")
def served(checkpoint):
    port = free_port()
    p = subprocess.Popen([SERVE, "--checkpoint", checkpoint, "--device", "cpu"], stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT, text=True, env=os.environ | {"PORT": str(port)})
    url, start = f"http://127.0.0.1:{port}", time.time()
    while True:
        try:
            if httpx.get(f"{url}/healthz").status_code == 200: break
        except httpx.TransportError: pass
        assert p.poll() is None and time.time() < start + 90, p.stdout.read() if p.poll() is not None else "too slow"
        time.sleep(.2)
    yield p, url
    if p.poll() is None: p.kill()
    p.wait()


def press(url, handler, data):
    "What the page in a browser does when a button is pressed: join the queue, read events until the answer is there."
    body = dict(data=data, fn_index=handler, session_hash="test", event_data=None, trigger_id=None)
    httpx.post(f"{url}/gradio_api/queue/join", json=body).raise_for_status()
    with httpx.stream("GET", f"{url}/gradio_api/queue/data", params=dict(session_hash="test"), timeout=60) as events:
        for line in events.iter_lines():
            event = json.loads(line[5:]) if line.startswith("data:") else {}
            if event.get("msg") == "process_completed": return event


@pytest.mark.slow
def test_the_page_paints(served):
    _, url = served
    config = httpx.get(f"{url}/config").json()
    ids = {c["id"]: c for c in config["components"]}
    handler = next(d["id"] for d in config["dependencies"]
                   if any(ids[o]["type"] == "gallery" for o in d["outputs"]) and len(d["inputs"]) == 5)
    event = press(url, handler, ["a blue turtle", 2, 5, 2, 1.0])
    gallery, note, seed = event["output"]["data"]
    assert event["success"] and seed == 5 and "2 pictures" in note and "seed 5 to 6" in note
    shown = gallery["value"] if isinstance(gallery, dict) else gallery
    files = [httpx.get(g["image"]["url"] if g["image"].get("url") else f"{url}/gradio_api/file={g['image']['path']}")
             for g in shown]
    ims = [Image.open(io.BytesIO(f.content)) for f in files]
    asked = picture(httpx.post(f"{url}/generate", json=dict(prompt="a blue turtle", seed=6, steps=2, guidance=1.0)))
    assert [g["caption"] for g in shown] == ["seed 5", "seed 6"] and ims[1].tobytes() == asked.tobytes()
    refused = press(url, handler, ["bad\0prompt", 2, 5, 2, 1.0])
    assert not refused["success"] and "plain text" in refused["output"]["error"]


@pytest.mark.slow
def test_a_port_in_use_is_a_clear_error(served, checkpoint):
    port = served[1].rsplit(":", 1)[1]
    done = subprocess.run([SERVE, "--port", port, "--checkpoint", checkpoint], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ") and f"127.0.0.1:{port}" in done.stderr and "--port" in done.stderr


@pytest.mark.slow
def test_it_ends_when_told(served):
    p, url = served
    httpx.post(f"{url}/generate", json={"prompt": "one more"}).raise_for_status()
    p.send_signal(signal.SIGTERM)
    said = p.communicate(timeout=20)[0]
    assert p.returncode in (0, -signal.SIGTERM, 128 + signal.SIGTERM) and "Traceback" not in said
    assert said.count("using checkpoint") == 1 and f"page {url}/" in said
