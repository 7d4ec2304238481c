"Git repositories laid out like the public ones, and servers for them on the loopback interface."
import contextlib
import csv
import io
import os
import shutil
import socket
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from pokemon_nb.data import critter_family, paint_critter
from pokemon_nb.sources import FACTS, GitSource, run_git


def make_repository(folder, files):
    "Commit `files` ({path: str, bytes or a Path to copy}) and allow partial clones; returns the commit id."
    for name, data in files.items():
        to = folder / name
        to.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(data, Path): shutil.copyfile(data, to)
        else: to.write_bytes(data.encode() if isinstance(data, str) else data)
    run_git("init", "-q", folder=folder)
    for key in ("allowFilter", "allowAnySHA1InWant"): run_git("config", f"uploadpack.{key}", "true", folder=folder)
    run_git("config", "http.uploadpack", "true", folder=folder)
    run_git("add", ".", folder=folder)
    run_git("-c", "user.name=n", "-c", "user.email=e@example.org", "commit", "-qm", "data", folder=folder)
    return run_git("rev-parse", "HEAD", folder=folder).strip()


def as_csv(head, rows):
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([head.split(","), *rows])
    return out.getvalue()


def split_facts(rows):
    "A pokedex.csv's rows as PokéAPI keeps them, over ten tables, with rows for others than species 1-809 left in."
    ids = lambda values: {w: str(i) for i, w in enumerate(sorted({v for v in values if v}), 1)}
    column = lambda *keys: [r[k] for r in rows for k in keys]
    colours, shapes, habitats, types = (ids(column(*k)) for k in (("color",), ("shape",), ("habitat",),
                                                                  ("type_1", "type_2")))
    groups = ids(g for r in rows for g in r["egg_groups"].split())
    words = lambda d: as_csv("id,identifier", [(i, w) for w, i in d.items()])
    form = {r["id"]: str(10_000 - int(r["id"])) for r in rows}               # a form's number is not its species'
    mega = [("20001", "mega", rows[0]["id"], "999", "999", "0")]             # a form that is not the default one
    return {f"data/v2/csv/{k}.csv": v for k, v in dict(
        pokemon_colors=words(colours), pokemon_shapes=words(shapes), pokemon_habitats=words(habitats),
        types=words(types), egg_groups=words(groups),
        pokemon_species=as_csv(
            "id,identifier,generation_id,evolves_from_species_id,color_id,shape_id,habitat_id,is_baby,is_legendary,"
            "is_mythical", [(r["id"], "x", r["generation"], r["evolves_from"], colours[r["color"]], shapes[r["shape"]],
                             habitats.get(r["habitat"], ""), r["is_baby"], r["is_legendary"], r["is_mythical"])
                            for r in rows[::-1]]),
        pokemon=as_csv("id,identifier,species_id,height,weight,is_default",
                       mega + [(form[r["id"]], "x", r["id"], r["height_dm"], r["weight_hg"], "1") for r in rows]),
        pokemon_types=as_csv("pokemon_id,type_id,slot", [(form[r["id"]], types[r[f"type_{k}"]], k) for r in rows
                                                         for k in ("2", "1") if r[f"type_{k}"]]),
        pokemon_species_names=as_csv("pokemon_species_id,local_language_id,name,genus", [
            row for r in rows for row in ((r["id"], "1", "フシギ", ""), (r["id"], "9", r["name"], r["genus"]))]),
        pokemon_egg_groups=as_csv("species_id,egg_group_id",
                                  [(r["id"], groups[g]) for r in rows for g in r["egg_groups"].split()])).items()}


def critter_world(folder, n=12):
    "Two repositories with n critters; returns (art commit, facts commit, {path: bytes} of the pictures)."
    critters, art = [c for s in range(n) for c in critter_family(s)][:n], {}
    for i, c in enumerate(critters, 1):
        file = io.BytesIO()
        paint_critter(c, 48).save(file, "PNG")
        art[f"images/{i:03}.png"] = file.getvalue()
    rows = [dict(id=str(i), name=f"Critter, {i}", genus="Paw Pokémon", type_1=c.types[0], type_2=(*c.types, "")[1],
                 color=c.colour, shape=c.shape, habitat="forest" if i % 2 else "", generation="1",
                 egg_groups="plant monster" if i % 3 else "", height_dm="7", weight_hg="69",
                 evolves_from=str(i - 1) if i % 3 == 0 else "", is_baby="0", is_legendary="0", is_mythical="0")
            for i, c in enumerate(critters, 1)]
    return (make_repository(folder / "art", art | {"thumbnails/001.png": os.urandom(300_000), "README.md": "x"}),
            make_repository(folder / "facts", split_facts(rows) | {"data/v2/csv/moves.csv": "id\n"}), art)


def sources(base, art_commit, facts_commit):
    "The two sources below a server's base URL."
    return (GitSource(f"{base}/art", art_commit, ("images/",)), GitSource(f"{base}/facts", facts_commit, FACTS.paths))


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def git_daemon(folder):
    "Serve all repositories below `folder` over git://; yields the base URL."
    port = free_port()
    server = subprocess.Popen(["git", "daemon", f"--port={port}", "--listen=127.0.0.1", "--reuseaddr", "--export-all",
                               f"--base-path={folder}", str(folder)], stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        for _ in range(100):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1): break
            time.sleep(.05)
        yield f"git://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, 15)
        server.wait()


@contextlib.contextmanager
def git_http(folder):
    "Serve all repositories below `folder` over smart HTTP, as GitHub does (git http-backend); yields the base URL."
    class Backend(BaseHTTPRequestHandler):
        def log_message(self, *_): pass
        def do_GET(self): self.answer(b"")
        def do_POST(self): self.answer(self.rfile.read(int(self.headers["Content-Length"])))
        def answer(self, body):
            path, _, query = self.path.partition("?")
            repo, _, rest = path.lstrip("/").partition("/")
            env = dict(os.environ, GIT_PROJECT_ROOT=str(folder), GIT_HTTP_EXPORT_ALL="1", QUERY_STRING=query,
                       PATH_INFO=f"/{repo}/.git/{rest}", REQUEST_METHOD=self.command, REMOTE_ADDR="127.0.0.1",
                       CONTENT_TYPE=self.headers.get("Content-Type", ""), CONTENT_LENGTH=str(len(body)),
                       GIT_PROTOCOL=self.headers.get("Git-Protocol", ""),
                       HTTP_CONTENT_ENCODING=self.headers.get("Content-Encoding", ""))
            out = subprocess.run(["git", "http-backend"], input=body, capture_output=True, env=env).stdout
            head, _, content = out.partition(b"\r\n\r\n")
            lines = dict(line.split(": ", 1) for line in head.decode().splitlines())
            self.send_response(int(lines.pop("Status", "200").split()[0]))
            for k, v in lines.items(): self.send_header(k, v)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Backend)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield f"http://127.0.0.1:{server.server_address[1]}"
    finally: server.shutdown()


class Cutter:
    "A proxy in front of a port that hangs up after so many bytes of answer (None = never); counts the bytes."
    def __init__(self, port):
        self.target, self.limit, self.sent = port, None, 0
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.socket.accept()
                server = socket.create_connection(("127.0.0.1", self.target))
                threading.Thread(target=self.copy, args=(client, server, False), daemon=True).start()
                threading.Thread(target=self.copy, args=(server, client, True), daemon=True).start()

    def copy(self, a, b, counted):
        with contextlib.suppress(OSError):
            while data := a.recv(4096):
                if counted:
                    self.sent += len(data)
                    if self.limit is not None and self.sent > self.limit: break
                b.sendall(data)
        for s in (a, b):
            with contextlib.suppress(OSError): s.shutdown(socket.SHUT_RDWR)
