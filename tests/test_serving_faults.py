"""What happens to a running server when things go wrong around it: the real command, real sockets, loopback only."""

import json
import os
import resource
import signal
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("httpx")
import httpx
from serving_tools import SERVE, apart, free_port, picture, tiny_checkpoint

pytestmark = pytest.mark.slow


class Server:
    "The command on a free port."

    def __init__(self, checkpoint, *options):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        command = [SERVE, "--port", str(self.port), "--checkpoint", checkpoint, "--device", "cpu", "--rate", ""]
        self.log = open(checkpoint.parent / f"{self.port}.log", "w+")
        self.process = subprocess.Popen([*command, *options], stdout=self.log, stderr=subprocess.STDOUT)
        try: self.wait_ready(300)
        except AssertionError:
            self.end()
            raise

    def wait_ready(self, seconds):
        end = time.time() + seconds
        while time.time() < end:
            try:
                if httpx.get(f"{self.url}/readyz").status_code == 200: return
            except httpx.TransportError: pass
            assert self.process.poll() is None, self.said()
            time.sleep(.1)
        raise AssertionError("not ready: " + self.said())

    def said(self):
        self.log.seek(0)
        return self.log.read()

    def ask(self, **keys):
        return httpx.post(f"{self.url}/generate", json={"prompt": "a red bird"} | keys, timeout=60)

    def metric(self, name):
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return next(float(k.split()[-1]) for k in lines if k.startswith(name))

    def workers(self):
        "Processes that draw: the children of the fork server, without its helpers."
        children = lambda pid: [int(k) for k in open(f"/proc/{pid}/task/{pid}/children").read().split()]
        return [g for c in children(self.process.pid) for g in children(c)]

    def end(self):
        if self.process.poll() is None: self.process.kill()
        self.process.wait()
        self.log.close()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory): return tiny_checkpoint(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def server(checkpoint):
    s = Server(checkpoint, "--no_page")
    yield s
    s.end()


def raw(server, data, *then, wait=5.):
    "Bytes in, bytes out; `then` are functions of the socket."
    with socket.create_connection(("127.0.0.1", server.port), timeout=wait) as s:
        s.sendall(data)
        for f in then: f(s)
        out = b""
        try:
            while part := s.recv(65536): out += part
        except (TimeoutError, ConnectionResetError): pass
        return out


def head(body, more=""):
    return (f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{more}"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n").encode()


BODY = json.dumps(dict(prompt="a red bird", seed=1)).encode()


def test_kill_9_of_the_worker_costs_503_and_no_more(server):
    before = server.ask(seed=5).content
    (worker,) = server.workers()
    with ThreadPoolExecutor(30) as pool:
        asked = [pool.submit(server.ask, seed=i, steps=90, n=2) for i in range(30)]
        while not server.metric("pokemon_waiting_pictures"): time.sleep(.01)
        os.kill(worker, signal.SIGKILL)
        answers = [a.result() for a in asked]
    codes = sorted(a.status_code for a in answers)
    assert set(codes) <= {200, 503, 429} and 503 in codes and 200 in codes, codes     # in flight: 503; waiting: drawn
    lost = next(a for a in answers if a.status_code == 503)
    assert lost.headers["retry-after"] and lost.json()["type"] == "urn:pokemon_nb:worker"
    server.wait_ready(60)
    assert server.ask(seed=5).content == before and server.workers() != [worker]
    assert server.metric("pokemon_worker_deaths_total") >= 1 and "a worker ended; starting another" in server.said()


def test_a_worker_killed_while_idle_is_replaced_at_once(server):
    (worker,) = server.workers()
    os.kill(worker, signal.SIGKILL)
    time.sleep(.3)
    server.wait_ready(60)
    picture(server.ask())


def test_two_workers_draw_the_same_pictures_and_one_is_enough_to_be_ready(server, checkpoint):
    both = Server(checkpoint, "--no_page", "--workers", "2")
    try:
        assert both.metric("pokemon_workers_ready") == 2
        first, second = both.workers()
        ask = lambda s: lambda i: s.ask(seed=i, steps=20, prompt=f"a {('red', 'blue')[i % 2]} bird")
        with ThreadPoolExecutor(16) as pool: together = list(pool.map(ask(both), range(32)))
        for i, answer in enumerate(together): assert apart(picture(answer), picture(ask(server)(i))) <= 1
        spent = [float(open(f"/proc/{w}/stat").read().rsplit(")", 1)[1].split()[11]) for w in (first, second)]
        assert min(spent) > 0.2 * max(spent), spent                                      # ticks: both have drawn
        os.kill(first, signal.SIGKILL)
        end = time.time() + 60
        while both.metric("pokemon_worker_deaths_total") < 1 and time.time() < end: time.sleep(.02)
        assert httpx.get(f"{both.url}/readyz").status_code == 200                        # the other one draws on
        picture(both.ask())
        while both.metric("pokemon_workers_ready") < 2 and time.time() < end: time.sleep(.1)
        assert both.metric("pokemon_workers_ready") == 2 and second in both.workers()
    finally: both.end()


def test_whoever_hangs_up_is_not_drawn_for(server):
    drawn = server.metric('pokemon_pictures_total{outcome="drawn"}')
    body = json.dumps(dict(prompt="x", n=16, steps=100)).encode()
    raw(server, head(body) + body, wait=.3)                                           # gives up after 0.3 s
    picture(server.ask(steps=1))
    assert server.metric('pokemon_pictures_total{outcome="drawn"}') == drawn + 1
    assert server.metric("pokemon_waiting_pictures") == 0


def test_a_half_closed_socket_is_a_caller_who_has_gone(server):
    got = raw(server, head(BODY) + BODY, lambda s: s.shutdown(socket.SHUT_WR))
    assert got == b"" or got.startswith(b"HTTP/1.1 200")
    picture(server.ask())


def test_a_slow_body_is_given_up(server):
    start = time.time()
    got = raw(server, head(BODY) + BODY[:5], wait=30)
    assert b"408" in got[:20] and b"problem+json" in got and 8 < time.time() - start < 15


def test_a_slow_reader_holds_nobody_up(server):
    with socket.create_connection(("127.0.0.1", server.port)) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        body = json.dumps(dict(prompt="x", n=16, steps=20)).encode()
        s.sendall(head(body) + body)
        time.sleep(.5)
        start = time.time()
        picture(server.ask(steps=1))
        assert time.time() - start < 10


@pytest.mark.parametrize("data, says", [
    (head(b'{"prompt": ') + b'{"prompt": ', b"422"), (b"GARBAGE\r\n\r\n", b"400"),
    (b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: nonsense\r\n\r\n", b"400"),
    (b"GET /" + b"a"*100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", b"4"),
    (head(b"x"*10_000_000)[:-1] + b"\n", b"413")])
def test_malformed_requests(server, data, says):
    got = raw(server, data, wait=12)
    assert got.split(b" ")[1].startswith(says), got[:200]
    assert server.process.poll() is None


def test_ten_megabytes_are_refused_unread(server):
    used = lambda: int(open(f"/proc/{server.process.pid}/statm").read().split()[1])*4096
    before = used()
    try: answer = httpx.post(f"{server.url}/generate", content=b"x"*10_000_000, timeout=20).status_code
    except httpx.TransportError: answer = "connection closed"
    assert answer in (413, "connection closed") and used() - before < 20e6
    parts = (b"x"*10_000 for _ in range(1000))
    try: answer = httpx.post(f"{server.url}/generate", content=parts, timeout=20).status_code
    except httpx.TransportError: answer = "connection closed"
    assert answer in (413, "connection closed")


def test_a_thousand_idle_connections(server):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2500: pytest.skip("needs 2500 open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (2500, hard))
    idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(1000)]
    try:
        picture(server.ask())
        assert httpx.get(f"{server.url}/healthz").status_code == 200
    finally:
        for s in idle: s.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    picture(server.ask())


def test_sigterm_under_load_answers_everything_that_was_accepted(checkpoint):
    server = Server(checkpoint, "--waiting", "200", "--no_page")
    try:
        reference = server.ask(seed=3, steps=30)
        with ThreadPoolExecutor(40) as pool:
            asked = [pool.submit(server.ask, seed=i, steps=30) for i in range(40)]
            while server.metric("pokemon_waiting_pictures") < 10: time.sleep(.01)
            time.sleep(.3)                                                            # all forty are inside
            server.process.send_signal(signal.SIGTERM)
            answers = [a.result() for a in asked]
        assert {a.status_code for a in answers} == {200}
        assert apart(picture(answers[3]), picture(reference)) <= 1
        assert server.process.wait(20) in (0, -signal.SIGTERM, 128 + signal.SIGTERM)
        with pytest.raises(httpx.TransportError): server.ask()
        assert "Traceback" not in server.said(), server.said()
    finally: server.end()


def test_an_open_page_does_not_hold_up_the_end(checkpoint):
    server = Server(checkpoint)
    try:
        def watch():
            try:
                with httpx.stream("GET", f"{server.url}/gradio_api/heartbeat/abc", timeout=30) as r: r.read()
            except httpx.TransportError: pass
        visitor = threading.Thread(target=watch)
        visitor.start()
        time.sleep(.5)
        start = time.time()
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(20)
        assert time.time() - start < 8
        visitor.join(10)
    finally: server.end()


def test_a_server_killed_leaves_no_worker_behind(checkpoint):
    server = Server(checkpoint, "--no_page")
    workers = server.workers()
    assert workers
    server.process.kill()
    server.process.wait()
    end = time.time() + 10
    lives = lambda p: os.path.exists(f"/proc/{p}") and ") Z" not in open(f"/proc/{p}/stat").read()
    while any(map(lives, workers)):
        assert time.time() < end, "a worker outlives its server"
        time.sleep(.1)
    server.end()
