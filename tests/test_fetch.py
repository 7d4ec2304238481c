"The network source: real Git transfers over loopback, broken, killed and tampered with."
import csv
import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlparse

import pytest
from local_repos import Cutter, critter_world, git_daemon, git_http, make_repository, sources, split_facts

from pokemon_nb.data import build_dataset
from pokemon_nb.sources import GitSource, blob_id, fetch_files, fetch_pokemon, list_files, open_source

SHARED = Path(__file__).parents[2] / "shared/pokemon"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return folder, *critter_world(folder)


def through(base, cutter): return f"{urlparse(base).scheme}://127.0.0.1:{cutter.port}"


@pytest.mark.parametrize("serve", [git_daemon, git_http])
def test_both_protocols_bring_the_same_files_and_nothing_else(world, tmp_path, serve):
    folder, a, f, art = world
    with serve(folder) as base:
        cutter = Cutter(urlparse(base).port)
        got = fetch_pokemon(tmp_path / "got", *sources(through(base, cutter), a, f), wait=0)
    assert {f"images/{p.name}": p.read_bytes() for p in (got / "images").iterdir()} == art
    assert not (got / "thumbnails").exists() and not list(got.rglob("moves.csv"))
    needed = sum(map(len, art.values()))
    assert needed < cutter.sent < needed + 60_000             # the 300 kB of random thumbnail never travelled
    rows = list(csv.DictReader((got / "pokedex.csv").open(encoding="utf-8", newline="")))
    assert [r["name"] for r in rows[:2]] == ["Critter, 1", "Critter, 2"] and rows[0]["height_dm"] == "7"


def test_a_broken_transfer_goes_on_where_it_stopped(world, tmp_path, capsys):
    folder, a, _, art = world
    with git_daemon(folder) as base:
        cutter = Cutter(urlparse(base).port)
        source, into = GitSource(through(base, cutter) + "/art", a, ("images/",)), tmp_path / "copy"
        list_files(source, into / f".git-{a[:12]}")
        before, cutter.limit = cutter.sent, cutter.sent + sum(map(len, art.values())) // 2
        with pytest.raises(OSError): fetch_files(source, into, batch=2, attempts=2, wait=0)
        here = {p.name for p in (into / "images").glob("*.png")}
        assert 2 <= len(here) < len(art)                      # whole batches arrived, each file whole
        assert all(blob_id((into / "images" / n).read_bytes()) == blob_id(art[f"images/{n}"]) for n in here)
        assert "trying again" in capsys.readouterr().err
        cutter.limit, start = None, cutter.sent
        done = fetch_files(source, into, batch=2, wait=0)
        rest = sum(len(v) for k, v in art.items() if Path(k).name not in here)
        assert (done["there"], done["fetched"]) == (len(here), len(art) - len(here))
        assert cutter.sent - start < rest + 20_000 and before > 0
        start = cutter.sent
        assert fetch_files(source, into)["fetched"] == 0 and cutter.sent == start          # complete: no network at all


@pytest.mark.slow
def test_a_killed_fetch_goes_on(world, tmp_path):
    folder, a, _, art = world
    code = ("import sys; from pokemon_nb import sources as s\n"
            "write = s.write_atomic\n"
            "def slow(path, data):\n"
            "    r = write(path, data); print(path.name, flush=True)\n"
            "    import time; time.sleep(.2); return r\n"
            "s.write_atomic = slow\n"
            "s.fetch_files(s.GitSource(*sys.argv[1:3], ('images/',)), sys.argv[3])\n")
    with git_daemon(folder) as base:
        args = [sys.executable, "-c", code, f"{base}/art", a, str(tmp_path / "copy")]
        child = subprocess.Popen(args, stdout=subprocess.PIPE, text=True)
        for line in child.stdout:
            if line.startswith("003"): break
        child.send_signal(signal.SIGKILL)
        child.wait()
        done = fetch_files(GitSource(f"{base}/art", a, ("images/",)), tmp_path / "copy")
    assert done["there"] >= 3 and done["there"] + done["fetched"] == len(art) and done["repaired"] == 0
    assert {f"images/{p.name}": p.read_bytes() for p in (tmp_path / "copy/images").iterdir()} == art


def test_a_changed_file_is_named_and_repaired(world, tmp_path, capsys):
    folder, a, _, art = world
    source = GitSource((folder / "art").as_uri(), a, ("images/",))
    fetch_files(source, tmp_path)
    (tmp_path / "images/004.png").write_bytes(art["images/004.png"][:-1])
    assert fetch_files(source, tmp_path) == dict(there=11, fetched=1, repaired=1)
    assert "images/004.png is not what the commit says" in capsys.readouterr().out
    assert (tmp_path / "images/004.png").read_bytes() == art["images/004.png"]


def test_a_server_without_filters_still_works(world, tmp_path):
    folder, a, _, art = world
    plain = make_repository(tmp_path / "plain", art)
    for key in ("allowFilter", "allowAnySHA1InWant"):
        subprocess.run(["git", "config", "--unset", f"uploadpack.{key}"], cwd=tmp_path / "plain", check=True)
    source = GitSource((tmp_path / "plain").as_uri(), plain, ("images/",))
    assert fetch_files(source, tmp_path / "copy")["fetched"] == len(art)


def test_what_goes_wrong_is_said(world, tmp_path, monkeypatch):
    folder, a, f, _ = world
    art, facts = sources(folder.as_uri(), a, f)
    with pytest.raises(OSError, match="pokemon_data --source FOLDER"):
        fetch_pokemon(tmp_path / "1", replace(art, commit="0" * 40), facts, attempts=1)
    with pytest.raises(OSError, match="Connection refused"):
        fetch_pokemon(tmp_path / "2", art, replace(facts, url="git://127.0.0.1:9/facts"), attempts=1)
    with pytest.raises(ValueError, match="must hold 'sprites/'"):
        fetch_pokemon(tmp_path / "3", replace(art, paths=("sprites/",)), facts, attempts=1)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OSError, match="git must be installed"): fetch_pokemon(tmp_path / "4", art, facts, attempts=1)


def test_the_word_pokemon_means_the_network_and_the_cache_is_named(world, tmp_path, monkeypatch, capsys):
    import pokemon_nb.sources as s
    folder, a, f, _ = world
    art, facts = sources(folder.as_uri(), a, f)
    monkeypatch.setattr(s.fetch_pokemon, "__defaults__", (None, art, facts, 50, 4, 1.0))
    monkeypatch.setenv("POKEMON_NB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pokemon").mkdir()
    got = open_source("pokemon")
    out = capsys.readouterr().out
    assert got == tmp_path / f"cache/pokemon-{a[:7]}-{f[:7]}" and (got / "pokedex.csv").is_file()
    assert str(got) in out and "./pokemon" in out and a[:12] in out
    assert open_source("./pokemon") == Path("pokemon") == open_source(Path("pokemon"))


@pytest.mark.skipif(not SHARED.is_dir(), reason="the artworks are not beside this checkout")
@pytest.mark.slow
def test_809_artworks_are_the_same_build_from_git_and_from_a_folder(tmp_path):
    rows = list(csv.DictReader((SHARED / "pokedex.csv").open(encoding="utf-8", newline="")))
    commits = (make_repository(tmp_path / "art", {f"images/{p.name}": p for p in (SHARED / "images").iterdir()}),
               make_repository(tmp_path / "facts", split_facts(rows)))
    with git_http(tmp_path) as base:
        got = fetch_pokemon(tmp_path / "got", *sources(base, *commits), batch=200)
    assert (got / "pokedex.csv").read_bytes() == (SHARED / "pokedex.csv").read_bytes()
    build_dataset(got, tmp_path / "a")
    build_dataset(SHARED, tmp_path / "b")
    files = lambda r: {p.relative_to(r): p.read_bytes() for p in sorted(r.rglob("*")) if p.is_file()}
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert json.loads((tmp_path / "a/dataset.json").read_text())["images"] == 809
