"The network source where it hurts: other people's Git settings, lines that always break, stray files, two at once."
import csv
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlparse

import pytest
from local_repos import Cutter, critter_world, git_daemon, git_http, make_repository, sources

from pokemon_nb import sources as s
from pokemon_nb.sources import FACTS, GitSource, fetch_files, fetch_pokemon, join_facts, list_files, run_git


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return folder, *critter_world(folder)


def pictures(folder): return {f"images/{p.name}": p.read_bytes() for p in (folder / "images").iterdir()}


def test_a_git_hook_around_us_is_left_alone(world, tmp_path, monkeypatch):
    "Git sets GIT_DIR and GIT_INDEX_FILE for its hooks; a fetch inside one must not write into the hook's repository."
    folder, a, f, art = world
    make_repository(tmp_path / "mine", {"x": "x"})
    before = (tmp_path / "mine/.git/config").read_bytes()
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "mine/.git"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(tmp_path / "mine/.git/index"))
    monkeypatch.setenv("GIT_WORK_TREE", str(tmp_path / "mine"))
    got = fetch_pokemon(tmp_path / "got", *sources(folder.as_uri(), a, f), wait=0)
    assert pictures(got) == art
    assert (tmp_path / "mine/.git/config").read_bytes() == before and not (tmp_path / "mine/.git/shallow").exists()


@pytest.mark.parametrize("serve", [git_daemon, git_http])
def test_a_line_that_always_breaks_is_crossed_in_smaller_steps(world, tmp_path, serve, capsys):
    folder, a, _, art = world

    class Weak(Cutter):
        "Hangs up after `limit` bytes of every single connection."
        def copy(self, x, y, counted):
            left, self.sent = self.limit, self.sent
            try:
                while data := x.recv(4096):
                    if counted:
                        self.sent, left = self.sent + len(data), left - len(data)
                        if left < 0: break
                    y.sendall(data)
            except OSError: pass
            for sock in (x, y):
                try: sock.shutdown(2)
                except OSError: pass

    largest = max(map(len, art.values()))
    assert sum(map(len, art.values())) > 4 * largest
    with serve(folder) as base:
        weak = Weak(urlparse(base).port)
        weak.limit = 2 * largest + 4000
        source = GitSource(f"{urlparse(base).scheme}://127.0.0.1:{weak.port}/art", a, ("images/",))
        done = fetch_files(source, tmp_path / "copy", batch=12, attempts=4, wait=0)
    assert done["fetched"] == len(art) and pictures(tmp_path / "copy") == art
    assert "trying again" in capsys.readouterr().err


def test_what_no_retry_can_mend_is_said_at_once(world, tmp_path, capsys):
    folder, a, f, _ = world
    art, facts = sources(folder.as_uri(), a, f)
    nowhere = dict(attempts=9, wait=60)                                  # would take hours if it were tried again
    with pytest.raises(OSError, match="no such commit.*0000.*pokemon_data --source FOLDER"):
        fetch_pokemon(tmp_path / "1", replace(art, commit="0" * 40), facts, **nowhere)
    with pytest.raises(OSError, match="pokemon_data --source FOLDER"):
        fetch_pokemon(tmp_path / "2", replace(art, url=(folder / "nowhere").as_uri()), facts, **nowhere)
    assert "trying again" not in capsys.readouterr().err


def test_an_old_git_is_named(world, tmp_path, monkeypatch):
    folder, a, f, _ = world
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin/git"
    fake.write_text("#!/bin/sh\necho git version 2.17.1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    with pytest.raises(OSError, match=r"git must be 2\.\d+ or newer, got 2\.17\.1.*--source FOLDER"):
        fetch_pokemon(tmp_path / "got", *sources(folder.as_uri(), a, f))


def test_strangers_in_the_folder_are_refused_by_name(world, tmp_path):
    "A picture that the commit does not have would go into the data set with facts of its own."
    folder, a, f, art = world
    art_source, facts = sources(folder.as_uri(), a, f)
    fetch_pokemon(tmp_path / "got", art_source, facts)
    few = make_repository(tmp_path / "few", {k: v for k, v in art.items() if k < "images/009"})
    with pytest.raises(ValueError, match="009.png.*010.png"):
        fetch_pokemon(tmp_path / "got", GitSource((tmp_path / "few").as_uri(), few, ("images/",)), facts)


def test_only_pictures_and_the_table_are_to_be_seen(world, tmp_path):
    folder, a, f, _ = world
    got = fetch_pokemon(tmp_path / "got", *sources(folder.as_uri(), a, f))
    assert sorted(p.name for p in got.iterdir() if not p.name.startswith(".")) == ["images", "pokedex.csv"]


def test_a_changed_table_is_named_and_mended(world, tmp_path, capsys):
    folder, a, f, _ = world
    where = sources(folder.as_uri(), a, f)
    table = fetch_pokemon(tmp_path / "got", *where) / "pokedex.csv"
    good, stamp = table.read_bytes(), table.stat().st_mtime_ns
    fetch_pokemon(tmp_path / "got", *where)
    assert table.stat().st_mtime_ns == stamp                             # a good one is not even touched
    capsys.readouterr()
    table.write_bytes(good.replace(b"forest", b"cave", 1))
    fetch_pokemon(tmp_path / "got", *where)
    assert table.read_bytes() == good and "pokedex.csv is not what" in capsys.readouterr().out


def test_leftovers_of_a_kill_do_no_harm(world, tmp_path):
    folder, a, f, art = world
    where = sources(folder.as_uri(), a, f)
    got = fetch_pokemon(tmp_path / "got", *where)
    (got / "images/.001.png.4711.part").write_bytes(b"half")             # write_atomic, killed
    (got / "images/003.png").unlink()
    for work in got.glob("**/HEAD"):
        (work.parent / "shallow.lock").write_bytes(b"")                  # git, killed
        (work.parent / "config.lock").write_bytes(b"")
        (work.parent / "objects/pack/tmp_pack_x").write_bytes(b"half")
    fetch_pokemon(tmp_path / "got", *where, attempts=1)
    assert pictures(got) == art and not list(got.glob("**/tmp_pack_*"))


@pytest.mark.parametrize("what", ["*.pack", "*.idx", "HEAD", "objects", "config"])
def test_a_damaged_repository_is_made_again(world, tmp_path, capsys, what):
    folder, a, f, art = world
    where = sources(folder.as_uri(), a, f)
    got = fetch_pokemon(tmp_path / "got", *where)
    for lost in list(got.glob(f"**/{what}")):
        if lost.is_dir():
            shutil.rmtree(lost)
            continue
        lost.chmod(0o644)
        lost.write_bytes(dict(HEAD=b"", config=b"[core").get(what, lost.read_bytes()[:60]))
    (got / "images/003.png").unlink()
    fetch_pokemon(tmp_path / "got", *where, attempts=1)
    assert pictures(got) == art
    assert "is damaged, making it again" in capsys.readouterr().out


def test_a_users_own_git_settings_do_no_harm(world, tmp_path, monkeypatch):
    folder, a, f, art = world
    (tmp_path / ".gitconfig").write_text(
        "[safe]\n bareRepository = explicit\n[core]\n autocrlf = true\n quotePath = true\n[protocol]\n version = 0\n"
        "[fetch]\n fsckObjects = true\n prune = true\n writeCommitGraph = true\n[init]\n defaultBranch = x\n"
        "[transfer]\n fsckObjects = true\n[gc]\n auto = 1\n[remote]\n pushDefault = y\n[color]\n ui = always\n"
        "[fetch]\n recurseSubmodules = true\n[submodule]\n recurse = true\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    with git_http(folder) as base:
        assert pictures(fetch_pokemon(tmp_path / "got", *sources(base, a, f), attempts=1)) == art


@pytest.mark.slow
def test_two_at_once(world, tmp_path):
    folder, a, f, art = world
    code = ("import sys; from pokemon_nb.sources import *\n"
            "u, a, f, out = sys.argv[1:]\n"
            "fetch_pokemon(out, GitSource(u + '/art', a, ('images/',)), GitSource(u + '/facts', f, FACTS.paths), "
            "batch=1, attempts=1)\n")
    run = [sys.executable, "-c", code, folder.as_uri(), a, f, str(tmp_path / "got")]
    both = [subprocess.Popen(run, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for p in both: assert p.wait() == 0, p.stderr.read()
    assert pictures(tmp_path / "got") == art


def test_a_server_without_filters_is_named(world, tmp_path, capsys):
    folder, a, f, art = world
    plain = make_repository(tmp_path / "plain", art | {"big.bin": os.urandom(50_000)})
    for key in ("allowFilter", "allowAnySHA1InWant"): run_git("config", "--unset", f"uploadpack.{key}",
                                                              folder=tmp_path / "plain")
    source = GitSource((tmp_path / "plain").as_uri(), plain, ("images/",))
    assert fetch_files(source, tmp_path / "copy")["fetched"] == len(art)
    assert "cannot filter" in capsys.readouterr().out


def test_a_mirror_may_keep_its_files_elsewhere(world, tmp_path):
    folder, a, f, art = world
    here = folder / "facts/data/v2/csv"
    flat = {f"tables/{p.name}": p.read_bytes() for p in here.iterdir()}
    commit = make_repository(tmp_path / "flat", flat)
    facts = GitSource((tmp_path / "flat").as_uri(), commit, tuple(f"tables/{Path(p).name}" for p in FACTS.paths))
    got = fetch_pokemon(tmp_path / "got", sources(folder.as_uri(), a, f)[0], facts)
    assert len(list(csv.DictReader((got / "pokedex.csv").open(encoding="utf-8")))) == len(art)


def test_facts_that_lack_something_are_named():
    rows = lambda text: list(csv.DictReader(text.split()))
    tables = dict(
        pokemon_species=rows("id,generation_id,evolves_from_species_id,color_id,shape_id,habitat_id,is_baby,"
                             "is_legendary,is_mythical 1,1,,5,8,3,0,0,0 2,1,1,5,8,3,0,0,0"),
        pokemon=rows("id,species_id,height,weight,is_default 10033,2,24,1555,0 2,2,10,130,1 1,1,7,69,1"),
        pokemon_types=rows("pokemon_id,type_id,slot 1,4,2 1,12,1 2,12,1 10033,4,1"),
        types=rows("id,identifier 4,poison 12,grass"), pokemon_colors=rows("id,identifier 5,green"),
        pokemon_shapes=rows("id,identifier 8,quadruped"), pokemon_habitats=rows("id,identifier 3,grassland"),
        pokemon_species_names=rows("pokemon_species_id,local_language_id,name,genus 1,1,Fushigi,Tane 1,9,A,Seed "
                                   "2,9,B,Seed 2,11,C,Tane"),
        pokemon_egg_groups=rows("species_id,egg_group_id 1,1 1,7"), egg_groups=rows("id,identifier 1,monster 7,plant"))
    assert join_facts(tables, [2, 1]).splitlines()[1:] == [
        "1,A,Seed,grass,poison,green,quadruped,grassland,1,monster plant,7,69,,0,0,0",
        "2,B,Seed,grass,,green,quadruped,grassland,1,,10,130,1,0,0,0"]
    with pytest.raises(ValueError, match="species 3"): join_facts(tables, [3])
    with pytest.raises(ValueError, match="egg_groups.*missing"):
        join_facts({k: v for k, v in tables.items() if k != "egg_groups"}, [1])
    broken = tables | dict(pokemon=[{k: v for k, v in r.items() if k != "is_default"} for r in tables["pokemon"]])
    with pytest.raises(ValueError, match="pokemon.*is_default"): join_facts(broken, [1])
    bare = tables | dict(types=tables["types"][:1])
    with pytest.raises(ValueError, match="types.*'12'"): join_facts(bare, [1])


def test_a_tree_that_climbs_out_is_refused(tmp_path):
    "Git itself would not make such a tree; a server may."
    work = tmp_path / "evil"
    make_repository(work, {"images/x": "x"})
    blob = run_git("hash-object", "-w", "--stdin", folder=work, stdin="owned").strip()
    tree = lambda rows: subprocess.run(["git", "hash-object", "-w", "-t", "tree", "--literally", "--stdin"], cwd=work,
                                       input=rows, capture_output=True, check=True).stdout.decode().strip()
    up = tree(b"100644 owned.txt\0" + bytes.fromhex(blob))
    images = tree(b"40000 ..\0" + bytes.fromhex(up))
    root = tree(b"40000 images\0" + bytes.fromhex(images))
    commit = run_git("-c", "user.name=n", "-c", "user.email=e@e.e", "commit-tree", root, "-m", "x", folder=work).strip()
    run_git("update-ref", "refs/heads/evil", commit, folder=work)
    with pytest.raises((ValueError, OSError)):
        fetch_files(GitSource(work.as_uri(), commit, ("images/",)), tmp_path / "a/b", attempts=1)
    assert not list(tmp_path.rglob("owned.txt"))


def test_a_source_is_checked_when_it_is_written():
    for bad, why in ((dict(url=""), "url"), (dict(url="--upload-pack=touch x"), "url"), (dict(paths=()), "paths"),
                     (dict(paths="images/"), "paths"), (dict(commit="17d33dc"), "full id")):
        with pytest.raises(ValueError, match=f"GitSource: .*{why}"):
            GitSource(**(dict(url="https://example.org/r", commit="0" * 40, paths=("images/",)) | bad))


def test_a_relative_xdg_folder_is_ignored(monkeypatch, tmp_path):
    "As the XDG base directory specification asks."
    monkeypatch.delenv("POKEMON_NB_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert s.cache_folder() == tmp_path / ".cache/pokemon_nb"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert s.cache_folder() == tmp_path / "x/pokemon_nb"


def test_the_list_is_not_asked_twice(world, tmp_path):
    folder, a, _, _ = world
    with git_daemon(folder) as base:
        cutter = Cutter(urlparse(base).port)
        source = GitSource(f"git://127.0.0.1:{cutter.port}/art", a, ("images/",))
        first = list_files(source, tmp_path / "w")
        sent = cutter.sent
        assert list_files(source, tmp_path / "w") == first and cutter.sent == sent
