"""Guards for chapter 08: the HTTP interface in process, and the real command in a process of its own."""
import asyncio, base64, io, json, os, re, signal, subprocess, threading, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("httpx")
import httpx
from fastapi.testclient import TestClient
from PIL import Image
from serving_tools import SERVE, apart, free_port, picture, tiny_checkpoint

from pokemon_nb.captioning import check_prompt
from pokemon_nb.ddpm import load_pipeline
from pokemon_nb.serving import (
    Ask, Batcher, Failure, GenerateRequest, Limits, Painter, Picture, QueueFull, Worker, create_app, draw_card,
    invent_name, new_seed, next_seed, read_recipe)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory): return tiny_checkpoint(tmp_path_factory.mktemp("serving"))


def app_of(checkpoint, **options):
    options = dict(page=False, limits=Limits(rate="")) | options
    return create_app(checkpoint, "cpu", process=False, **options)


@pytest.fixture(scope="module")
def client(checkpoint):
    with TestClient(app_of(checkpoint, page=True)) as c: yield c


def ask(client, **keys): return client.post("/generate", json={"prompt": "a red bird"} | keys)


def problem(answer, status):
    assert answer.status_code == status and answer.headers["content-type"] == "application/problem+json", answer.text
    body = answer.json()
    assert {"type", "title", "status", "detail", "instance", "request_id"} <= set(body) and body["status"] == status
    assert body["request_id"] == answer.headers["x-request-id"]
    assert "Traceback" not in answer.text and "/work" not in answer.text and "site-packages" not in answer.text
    return body


# the interface, in process

def test_a_prompt_becomes_a_png_that_equals_the_pipelines(client, checkpoint):
    im = picture(ask(client, prompt="Pikachu", seed=7, steps=2, guidance=1.5))
    direct = load_pipeline(checkpoint, "cpu")("Pikachu", seed=7, num_inference_steps=2, guidance_scale=1.5).images[0]
    assert im.mode == "RGBA" and im.size == (16, 16) and im.tobytes() == direct.tobytes()
    assert json.loads(im.text["pokemon_nb"]) == dict(prompt="Pikachu", seed=7, steps=2, guidance_scale=1.5,
                                                     sampler="dpmpp_2m", checkpoint="tiny/checkpoint")


def test_a_drawn_seed_is_sent_back_and_repeats_the_picture(client):
    first, other = ask(client), ask(client)
    assert first.headers["x-seed"] != other.headers["x-seed"] and first.content != other.content
    assert ask(client, seed=int(first.headers["x-seed"])).content == first.content


def test_ends_of_ranges_are_allowed(client):
    for keys in (dict(prompt=""), dict(prompt="a"*1000), dict(prompt="Flabébé 👩‍🚀"), dict(steps=1), dict(guidance=0),
                 dict(guidance=30), dict(seed=2**53 - 1), dict(seed=None, steps=None, guidance=None), dict(size=32)):
        picture(ask(client, **keys))


def test_the_three_shapes_of_an_answer(client):
    png = picture(ask(client, seed=4))
    webp = ask(client, seed=4, format="webp")
    assert webp.headers["content-type"] == "image/webp"
    assert Image.open(io.BytesIO(webp.content)).convert("RGBA").tobytes() == png.tobytes()
    several = ask(client, seed=3, n=3).json()["images"]
    assert [k["seed"] for k in several] == [3, 4, 5]
    assert apart(Image.open(io.BytesIO(base64.b64decode(several[1]["image"]))), png) <= 1
    one = ask(client, seed=4, answer="json").json()["images"][0]
    assert base64.b64decode(one["image"]) == ask(client, seed=4).content
    assert "answer must be json" in problem(ask(client, n=2, answer="image"), 422)["detail"]


@pytest.mark.parametrize("body, says", [
    (b"{}", "prompt must be given"), (b"", "body"), (b"no json", "body must be JSON"), (b"[]", "the body"),
    (b'{"prompt": 5}', "prompt must be a valid string, got '5'"), (b'{"prompt": null}', "prompt"),
    (b'{"prompt": "a\\u0000b"}', "at position 1"), (b'{"prompt": "\\ud83d"}', "prompt"),
    (b'{"prompt": "' + b"a"*1001 + b'"}', "at most 1000 characters"),
    (b'{"prompt": "x", "guidence": 5}', "guidence is no known key; allowed: prompt, n, seed, steps, guidance"),
    (b'{"prompt": "x", "steps": 0}', "steps must be greater than or equal to 1, got '0'"),
    (b'{"prompt": "x", "steps": 101}', "got '101'"), (b'{"prompt": "x", "steps": 2.5}', "steps"),
    (b'{"prompt": "x", "steps": "8"}', "got '8'"), (b'{"prompt": "x", "steps": true}', "got 'True'"),
    (b'{"prompt": "x", "seed": -1}', "seed must be greater"), (b'{"prompt": "x", "n": 17}', "n must be less"),
    (b'{"prompt": "x", "seed": 1' + b"0"*30 + b"}", "seed"), (b'{"prompt": "x", "size": 17}', "size must be one that"),
    (b'{"prompt": "x", "guidance": NaN}', "guidance"),
    (b'{"prompt": "x", "n": 16, "steps": 50, "size": 64}', "at most 1600 times"),
    (b'{"prompt": "x", "format": "gif"}', "format must be"),
    (b'{"prompt": "x", "guidance": -0.1}', "got '-0.1'"), (b'{"\\ud83d": 1, "prompt": ""}', "unicode"),
    (b"\xff", "body")])
def test_bad_input_is_refused_in_one_line(client, body, says):
    answer = client.post("/generate", content=body, headers={"Content-Type": "application/json"})
    detail = problem(answer, answer.status_code)["detail"]
    assert answer.status_code in (400, 422) and says in detail and len(detail) < 500 and "\n" not in detail


def test_several_faults_have_a_pointer_each(client):
    errors = problem(ask(client, steps=0, n=0, colour="red"), 422)["errors"]
    assert {e["pointer"] for e in errors} == {"#/steps", "#/n", "#/colour"}


def test_other_addresses_and_methods_are_problems_too(client, checkpoint):
    assert problem(client.put("/generate"), 405) and problem(client.get("/generate"), 405)
    assert client.post("/version").headers["allow"] == "GET" and problem(client.get("/nowhere"), 404)
    with TestClient(app_of(checkpoint)) as c: assert problem(c.get("/nowhere"), 404) and problem(c.get("/"), 404)


def test_health_version_metrics_and_description(client, checkpoint):
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").json() == {"status": "ready", "waiting": 0}
    version = client.get("/version").json()
    assert version["checkpoint"] == "tiny/checkpoint" and "16 px" in version["model"] and 16 in version["sizes"]
    assert str(checkpoint) not in json.dumps(version)
    schema = client.get("/openapi.json").json()
    assert set(schema["paths"]) == {"/generate", "/generate/stream", "/healthz", "/readyz", "/version"}
    docs, metrics = client.get("/docs").text, client.get("/metrics").text
    for word in ("POST /generate", "GET /healthz", *GenerateRequest.model_fields): assert word in docs
    for name in ("pokemon_batch_pictures_bucket", "pokemon_waiting_pictures", "pokemon_workers_ready 1.0",
                 'http_requests_total{handler="/generate"'): assert name in metrics


def test_nothing_is_loaded_from_other_hosts(client):
    assert not re.findall(r"https?://[^\s\"'<]+", client.get("/docs").text)
    home = client.get("/")
    hosts = set(re.findall(r"https?://([^/\s\"'<\\]+)", home.text))
    # left: links and preview pictures for social networks in Gradio's own page head; no request goes there
    assert hosts <= {"testserver", "gradio.app", "raw.githubusercontent.com", "github.com"}, hosts
    elsewhere = r"<(?:script|link)[^>]+(?:src|href)=\"https?://(?!testserver)[^\"]+\"[^>]*>"
    assert not re.findall(elsewhere, home.text) and "default-src 'self'" in home.headers["content-security-policy"]


def test_news_comes_step_by_step_and_ends_with_the_picture(client):
    with client.stream("POST", "/generate/stream", json=dict(prompt="a red bird", seed=5, steps=8)) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = re.findall(r"event: (\w+)\ndata: (.*)\n", answer.read().decode())
    kinds = [k for k, _ in events]
    assert kinds[0] == "queued" and kinds[-1] == "done" and kinds.count("step") >= 4
    shown = [k["preview"] for k in (json.loads(d) for n, d in events if n == "step") if k["preview"]]
    assert shown and Image.open(io.BytesIO(base64.b64decode(shown[0]))).size == (16, 16)
    done = json.loads(events[-1][1])
    assert base64.b64decode(done["images"][0]["image"]) == ask(client, seed=5, steps=8).content
    refused = client.post("/generate/stream", json=dict(prompt="a\0bird")).text
    assert "event: problem" in refused and "plain text" in refused
    problem(client.post("/generate/stream", json=dict(prompt="x", n=0)), 422)


# the door

def test_request_ids_go_all_the_way(client, caplog):
    caplog.set_level("INFO", "pokemon_nb.serving")
    assert ask(client).headers["x-request-id"] != ask(client).headers["x-request-id"]
    answer = client.post("/generate", json={"prompt": "my secret"}, headers={"X-Request-ID": "trace-7"})
    assert answer.headers["x-request-id"] == "trace-7"
    lines = [r.getMessage() for r in caplog.records if "trace-7" in r.getMessage()]
    assert any("draws 1 of" in k for k in lines) and any("/generate 200" in k for k in lines)
    assert "my secret" not in caplog.text
    evil = client.get("/healthz", headers={"X-Request-ID": "a b<script>" + "x"*100}).headers["x-request-id"]
    assert re.fullmatch("[0-9a-f]{16}", evil)


def test_a_key_is_asked_for(checkpoint):
    with TestClient(app_of(checkpoint, page=True, key="open sesame")) as c:
        for path in ("/", "/version", "/metrics", "/docs", "/openapi.json", "/config", "/gradio_api/info"):
            assert "Basic" in c.get(path).headers["www-authenticate"], path
        assert problem(ask(c), 401)
        assert c.get("/healthz").status_code == c.get("/readyz").status_code == 200
        for headers in ({"X-API-Key": "open sesame"}, {"Authorization": "Bearer open sesame"}):
            assert c.get("/", headers=headers).status_code == 200
        assert c.get("/", auth=("anyone", "open sesame")).status_code == 200
        assert c.get("/", headers={"X-API-Key": "open sesam\xe9".encode("latin-1")}).status_code == 401


def test_large_bodies_are_refused(client):
    large = json.dumps(dict(prompt="x"*70_000)).encode()
    assert problem(client.post("/generate", content=large), 413)
    assert problem(client.post("/generate", content=(large[i:i + 1000] for i in range(0, len(large), 1000))), 413)


def test_other_origins_get_no_headers_unless_named(client, checkpoint):
    assert "access-control-allow-origin" not in client.get("/healthz", headers={"Origin": "https://a.example"}).headers
    with TestClient(app_of(checkpoint, cors=["https://a.example"])) as c:
        named = [c.get("/healthz", headers={"Origin": f"https://{h}.example"}).headers for h in "ab"]
    assert [h.get("access-control-allow-origin") for h in named] == ["https://a.example", None]


def test_too_many_requests_of_one_client(checkpoint):
    with TestClient(app_of(checkpoint, limits=Limits(rate="3/minute"))) as c:
        assert [ask(c).status_code for _ in range(5)] == [200, 200, 200, 429, 429]
        last = ask(c)
        assert 1 <= int(last.headers["retry-after"]) <= 60 and problem(last, 429)["type"] == "urn:pokemon_nb:rate"
        assert c.get("/healthz").status_code == 200


def test_our_own_fault_says_nothing_of_us(checkpoint, monkeypatch, caplog):
    def broken(self, asks, on_step=None):
        if asks[0].prompt != "a warm-up": raise RuntimeError("/secret/path")
    monkeypatch.setattr(Painter, "draw", broken)
    with TestClient(app_of(checkpoint)) as c: said = problem(ask(c), 500)
    assert "secret" not in json.dumps(said) and "/secret/path" in caplog.text


# the batcher

def run(options, f, limits=None):
    "Run `f(batcher)` on a loop of its own."
    async def inside():
        batcher = Batcher([Worker(options, process=False)], limits or Limits())
        await batcher.start()
        try: return await f(batcher)
        finally: await batcher.stop()
    return asyncio.run(inside())


@pytest.fixture(scope="module")
def options(checkpoint): return dict(checkpoint=checkpoint, device="cpu")


def test_a_full_queue_says_when_to_come_back(options):
    async def f(batcher):
        orders = [batcher.submit([Ask("x", i)]) for i in range(8)]
        with pytest.raises(QueueFull) as e: batcher.submit([Ask("x", 9)])
        assert 1 <= e.value.seconds <= 60
        await asyncio.gather(*(o.result for o in orders))
        await batcher.submit([Ask("x", 9)]).result
        assert max(o.batch for o in orders) == 4
    run(options, f, Limits(waiting=8, batch=4))


def test_pictures_of_different_settings_share_no_batch(options):
    async def f(batcher):
        orders = [batcher.submit([Ask("x", i, steps=2 + i % 3, guidance=1. + i % 2)]) for i in range(12)]
        await asyncio.gather(*(o.result for o in orders))
        assert {o.batch for o in orders} == {2}
        for o in orders: assert o.made[0].recipe["steps"] == o.asks[0].steps
    run(options, f)


def test_a_cancelled_order_costs_nothing_more(options):
    async def f(batcher):
        long = batcher.submit([Ask("x", i, steps=100) for i in range(16)])
        while not batcher.running: await asyncio.sleep(.01)
        waits = batcher.submit([Ask("x", 1, steps=99)])
        batcher.cancel(waits); batcher.cancel(long); batcher.cancel(long)
        start = time.perf_counter()
        await batcher.submit([Ask("x", 1, steps=1)]).result
        assert time.perf_counter() - start < 2 and not batcher.queue
    run(options, f)


def test_one_of_two_leaves_and_the_other_still_gets_the_picture(options):
    async def f(batcher):
        a, b = (batcher.submit([Ask("x", i, steps=20)]) for i in range(2))
        while not batcher.running: await asyncio.sleep(.001)
        batcher.cancel(a)
        assert isinstance((await b.result)[0], Picture) and a.result.cancelled()
    run(options, f)


def test_poison_harms_only_whoever_sends_it(options, monkeypatch, caplog):
    real = Painter.draw
    def draw(self, asks, on_step=None):
        if any(a.prompt == "poison" for a in asks): raise RuntimeError("a bug")
        return real(self, asks, on_step)
    monkeypatch.setattr(Painter, "draw", draw)
    async def f(batcher):
        orders = [batcher.submit([Ask(p, i)]) for i, p in enumerate(["a", "poison", "b", "c\0", "d"])]
        return await asyncio.gather(*(o.result for o in orders), return_exceptions=True)
    made = run(options, f)
    assert [type(m).__name__ for m in made] == ["list", "OrderFailed", "list", "OrderFailed", "list"]
    assert made[1].failure.kind == "failed" and made[3].failure.kind == "refused"


def test_slow_readers_get_the_newest_news(options):
    async def f(batcher):
        order = batcher.submit([Ask("x", 1, steps=60, preview=True)])
        await order.result
        assert order.news.qsize() <= 8
        kinds = [order.news.get_nowait()[0] for _ in range(order.news.qsize())]
        assert kinds[-1] == "end"
    run(options, f)


def test_stopping_answers_everybody(options):
    async def f(batcher):
        orders = [batcher.submit([Ask("x", i, steps=100)]) for i in range(40)]
        await asyncio.sleep(.05)
        await batcher.stop()
        said = await asyncio.gather(*(o.result for o in orders), return_exceptions=True)
        assert all(e.failure.kind in ("died", "cancelled") for e in said)
        with pytest.raises(QueueFull): batcher.submit([Ask("x", 1)])
    run(options, f)


def test_callers_share_the_worker_and_get_their_own_picture(client):
    one = lambda s: picture(ask(client, seed=s))
    alone = [one(s) for s in range(8)]
    with ThreadPoolExecutor(8) as pool: together = list(pool.map(one, range(8)))
    assert max(apart(a, b) for a, b in zip(alone, together)) <= 1


def test_health_answers_while_drawing(client):
    done = []
    waiting = threading.Thread(target=lambda: done.append(ask(client, n=16, steps=40)))
    waiting.start()
    time.sleep(.1)
    start = time.perf_counter()
    assert client.get("/healthz").status_code == 200 and time.perf_counter() - start < 1
    waiting.join(60)
    assert done[0].status_code == 200


# copies

class AlwaysNear:
    "Finds every second seed too near."
    names, species = ["Pikachu"], ["Pikachu"]
    def __init__(self, better): self.better, self.calls = better, 0
    def __call__(self, x0):
        self.calls += 1
        first = self.calls == 1
        row = dict(nearest="Pikachu", percentile=99 if first else 20, copy=first or not self.better, file=None)
        return [row | dict(similarity=.9 if first else .1 if self.better else .95) for _ in x0]


@pytest.mark.parametrize("better", [True, False])
def test_a_copy_is_drawn_again_then_labelled(checkpoint, better):
    painter = Painter(checkpoint, "cpu")
    painter.near = AlwaysNear(better)
    made = painter.paint([Ask("a mouse", 7)])[0]
    assert made.redrawn and made.near["copy"] is not better
    assert made.recipe["seed"] == (next_seed(7) if better else 7)
    painter.near = AlwaysNear(True)
    painter.guard = False
    assert painter.paint([Ask("a mouse", 7)])[0].recipe["seed"] == 7
    if better:
        painter.near = None
        again = painter.paint([Ask("a mouse", made.recipe["seed"])])[0]
        assert Image.open(io.BytesIO(again.data)).tobytes() == Image.open(io.BytesIO(made.data)).tobytes()


def test_the_shipped_table_is_quick_and_knows_every_name():
    import torch

    import pokemon_nb
    from pokemon_nb.serving import load_neighbours
    near = load_neighbours(Path(pokemon_nb.__file__).parent/"weights/neighbours.safetensors")
    assert len(near.species) == 809 and len(near.names) == 648 and near.forms.shape == (648, 64)
    x0 = torch.rand(8, 4, 64, 64)*2 - 1
    near(x0[:1])
    start = time.process_time()
    rows = near(x0)
    assert (time.process_time() - start)/8 < .1 and not any(r["copy"] for r in rows)
    taken = {n.casefold() for n in near.species}
    names = [invent_name(dict(prompt=f"a {t} one", seed=s), near.species) for t in ("fire", "odd") for s in range(200)]
    assert not taken & {n.casefold() for n in names} and len(set(names)) > 200


# cards

def test_a_card_carries_its_recipe_through_a_png(client):
    answer = ask(client, prompt="a fiery ghost", seed=9)
    im = picture(answer)
    recipe = json.loads(im.text["pokemon_nb"])
    card, out = draw_card(im, recipe, None, []), io.BytesIO()
    from gradio.processing_utils import encode_pil_to_bytes
    old = read_recipe(encode_pil_to_bytes(card))
    assert old == read_recipe(answer.content) and old.pop("checkpoint") == "tiny/checkpoint"
    assert ask(client, **old).content == answer.content
    card.save(out, "PNG")                                                        # metadata lost: a plain sentence
    with pytest.raises(ValueError, match="has none"): read_recipe(out.getvalue())


@pytest.mark.parametrize("recipe", [
    '{"prompt": "x"}', "[]", "{", "9"*5000, '{"prompt": "x", "seed": -1, "steps": 5, "guidance_scale": 1}',
    '{"prompt": "x", "seed": 1, "steps": 100000, "guidance_scale": 1}'])
def test_a_strangers_recipe_is_checked(recipe):
    from PIL.PngImagePlugin import PngInfo
    info, out = PngInfo(), io.BytesIO()
    info.add_itxt("pokemon_nb", recipe)
    Image.new("RGBA", (4, 4)).save(out, "PNG", pnginfo=info)
    with pytest.raises(ValueError, match="within limits"): read_recipe(out.getvalue())


# what is refused before anything is served

def test_wrong_checkpoints_are_refused(tmp_path, checkpoint):
    with pytest.raises(ValueError, match="does not exist"): create_app(tmp_path/"none", process=False)
    (tmp_path/"model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(ValueError, match="StableDiffusionPipeline"): create_app(tmp_path, process=False)
    with pytest.raises(ValueError, match="tpu"): create_app(checkpoint, "tpu", process=False)
    with pytest.raises(ValueError, match="runtime must be known"): create_app(checkpoint, runtime="x", process=False)


def test_the_interface_and_the_pipeline_have_one_door_for_prompts(client):
    for p in ("a\tb", "a  b", "é", "\u202eabc", "a\x7fb", "\u0000"):
        try: check_prompt(p); good = True
        except ValueError: good = False
        assert (ask(client, prompt=p, steps=1).status_code == 200) is good, repr(p)


def test_seeds(): assert 0 <= new_seed() <= 2**53 and next_seed(1) != 1 and isinstance(Failure("died"), Failure)


# the command, in a process of its own

@pytest.fixture(scope="module")
def served(checkpoint):
    port = free_port()
    p = subprocess.Popen([SERVE, "--checkpoint", checkpoint, "--device", "cpu"], stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT, text=True, env=os.environ | {"PORT": str(port)})
    url, start = f"http://127.0.0.1:{port}", time.time()
    while True:
        try:
            if httpx.get(f"{url}/readyz").status_code == 200: break
        except httpx.TransportError: pass
        assert p.poll() is None and time.time() < start + 300, p.stdout.read() if p.poll() is not None else "too slow"
        time.sleep(.2)
    yield p, url
    if p.poll() is None: p.kill()
    p.wait()


@pytest.mark.slow
def test_the_page_paints_for_gradios_own_client(served):
    from gradio_client import Client
    _, url = served
    page = Client(url, verbose=False)
    _, gallery, note, seed, _, likeness = page.predict("a blue turtle", 2, 5, 2, 1.0, api_name="/paint")
    assert seed == 5 and "2 pictures" in note and likeness == ""
    gallery = gallery["value"]
    ims = [Image.open(g["image"]) for g in gallery]
    asked = picture(httpx.post(f"{url}/generate", json=dict(prompt="a blue turtle", seed=6, steps=2, guidance=1.0)))
    assert [g["caption"] for g in gallery] == ["seed 5", "seed 6"] and apart(ims[1], asked) <= 1
    assert json.loads(ims[1].text["pokemon_nb"])["seed"] == 6
    with pytest.raises(Exception, match="plain text"): page.predict("bad\0prompt", 2, 5, 2, 1.0, api_name="/paint")


@pytest.mark.slow
def test_a_port_in_use_is_a_clear_error(served, checkpoint):
    port = served[1].rsplit(":", 1)[1]
    done = subprocess.run([SERVE, "--port", port, "--checkpoint", checkpoint], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ") and f"127.0.0.1:{port}" in done.stderr and "--port" in done.stderr


@pytest.mark.slow
def test_it_ends_when_told(served):
    p, url = served
    httpx.post(f"{url}/generate", json={"prompt": "one more"}, timeout=60).raise_for_status()
    p.send_signal(signal.SIGTERM)
    said = p.communicate(timeout=20)[0]
    assert p.returncode in (0, -signal.SIGTERM, 128 + signal.SIGTERM) and "Traceback" not in said, said
    assert said.count("using checkpoint") == 1 and f"page {url}/" in said


def test_the_nearest_artwork_is_shown_from_the_users_folder(tmp_path):
    from pokemon_nb.serving import _likeness
    near = dict(nearest="A<b>", percentile=61, copy=True, file=str(tmp_path/"a.png"))
    Image.new("RGBA", (30, 20), "red").save(near["file"])
    said = _likeness(near)
    assert "A&lt;b&gt;" in said and "may be a copy" in said and str(tmp_path) not in said
    shown = Image.open(io.BytesIO(base64.b64decode(said.split("base64,")[1].split('"')[0])))
    assert shown.size == (128, 128) and shown.getpixel((64, 64)) == (255, 0, 0)
    Path(near["file"]).unlink()
    assert "not in the data folder any more" in _likeness(near) and "<img" not in _likeness(near | dict(file=None))
