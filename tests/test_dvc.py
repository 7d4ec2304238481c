"data.dvc and its remotes: a round trip through a folder and through a Cloud Storage emulator, and the way out."
import contextlib
import csv
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

pytest.importorskip("dvc")
from local_repos import free_port, make_repository, sources, split_facts  # noqa: E402

from pokemon_nb.data import build_dataset, dataset_hash, write_atomic  # noqa: E402
from pokemon_nb.sources import (  # noqa: E402
    dvc, dvc_remotes, fetch_pokemon, folder_md5, pull_data, run_git, unreachable, verify_data,
)

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared/pokemon"
BUCKET = "pokemon-nb-test"


@contextlib.contextmanager
def configuration(folder):
    "DVC with a cache and a configuration of its own."
    with pytest.MonkeyPatch.context() as at:
        for key in ("GLOBAL", "SYSTEM", "SITE_CACHE"): at.setenv(f"DVC_{key}_CONFIG_DIR", str(folder / "config"))
        at.setenv("DVC_SITE_CACHE_DIR", str(folder / "site"))
        yield


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    "A repository with a small build under DVC, made once; and the folder `store` to which it was pushed."
    top = tmp_path_factory.mktemp("dvc")
    folder = top / "repo"
    with configuration(top):
        build_dataset("critters", folder / "data", n=60, size=16)
        run_git("init", "-q", folder=folder)
        dvc("init", "-q", root=folder)
        dvc("add", "-q", "data", root=folder)
        shutil.copytree(folder, top / "pushed")
        (top / "store").mkdir()
        dvc("remote", "add", "-d", "local", str(top / "store"), root=top / "pushed")
        dvc("push", "-q", root=top / "pushed")
    return top


@pytest.fixture
def repo(original, tmp_path):
    "A copy of the repository."
    with configuration(tmp_path): yield Path(shutil.copytree(original / "repo", tmp_path / "repo"))


def lose(repo):
    for folder in ("data", ".dvc/cache"): shutil.rmtree(repo / folder)


@contextlib.contextmanager
def cloud_storage(folder):
    "The emulator of Google Cloud Storage, over HTTP on loopback; yields its URL."
    port = free_port()
    run = "from gcp_storage_emulator.__main__ import main; import sys; sys.exit(main(sys.argv[1:]))"
    server = subprocess.Popen([sys.executable, "-c", run, f"--data-dir={folder}", "start", "--host=127.0.0.1",
                               f"--port={port}", f"--default-bucket={BUCKET}"],
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1): break
            time.sleep(.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


@pytest.mark.slow
def test_push_lose_pull_through_a_folder(repo, tmp_path):
    built = dataset_hash(repo / "data")
    (tmp_path / "store").mkdir()
    dvc("remote", "add", "-d", "local", str(tmp_path / "store"), root=repo)
    dvc("push", "-q", root=repo)
    lose(repo)
    assert "changed outs" in dvc("status", root=repo)
    assert pull_data(repo) == "local"
    assert "up to date" in dvc("status", root=repo) and dataset_hash(repo / "data") == built
    next((repo / "data/train").glob("*.png")).write_bytes(b"another picture")
    assert "modified" in dvc("status", root=repo)                        # the hash is a check that can fail


@pytest.mark.slow
def test_push_lose_pull_through_cloud_storage(repo, tmp_path, monkeypatch):
    pytest.importorskip("dvc_gs")
    pytest.importorskip("gcp_storage_emulator")
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    built = dataset_hash(repo / "data")
    with cloud_storage(tmp_path / "cloud") as url:
        dvc("remote", "add", "-d", "gcs", f"gs://{BUCKET}/dvc", root=repo)
        for key, value in (("endpointurl", url), ("allow_anonymous_login", "true")):
            dvc("remote", "modify", "gcs", key, value, root=repo)
        dvc("push", "-q", root=repo)
        lose(repo)
        assert pull_data(repo) == "gcs"
        assert "up to date" in dvc("status", root=repo) and dataset_hash(repo / "data") == built
        lose(repo)
    with pytest.raises(OSError, match="127.0.0.1 does not answer"): pull_data(repo)          # the server is gone


@pytest.mark.slow
def test_the_next_remote_is_tried_aloud_and_the_way_out_is_named(repo, tmp_path, capsys):
    store = tmp_path / "store"
    dvc("remote", "add", "-d", "nas", str(tmp_path / "unplugged"), root=repo)
    dvc("remote", "add", "local", str(store), root=repo)
    assert list(dvc_remotes(repo)) == ["nas", "local"]
    store.mkdir()
    dvc("push", "-q", "-r", "local", root=repo)
    lose(repo)
    assert pull_data(repo) == "local"
    assert f"remote nas ({tmp_path / 'unplugged'}): there is no folder" in capsys.readouterr().err
    lose(repo)
    shutil.rmtree(store)
    with pytest.raises(OSError) as e: pull_data(repo)
    for words in ("nas (", "local (", "pokemon_data --source pokemon", "--source FOLDER", "dvc status"):
        assert words in str(e.value)
    assert not (repo / "data").exists()


@pytest.mark.slow
def test_an_empty_remote_is_no_success(repo, tmp_path):
    (tmp_path / "store").mkdir()
    dvc("remote", "add", "-d", "local", str(tmp_path / "store"), root=repo)
    lose(repo)
    with pytest.raises(OSError, match="no remote has the data"): pull_data(repo)


def test_the_projects_own_remotes():
    remotes = dvc_remotes(ROOT)
    assert list(remotes) == ["gcs", "local"] and remotes["gcs"]["url"].startswith("gs://")
    committed = run_git("ls-files", ".dvc", "data.dvc", ".dvcignore", folder=ROOT).split()
    assert sorted(committed) == [".dvc/.gitignore", ".dvc/config", ".dvcignore", "data.dvc"]
    with pytest.raises(FileNotFoundError, match="data.dvc"): pull_data(ROOT / "tests")
    with pytest.raises(ValueError, match="allowed: gcs, local"): pull_data(ROOT, "s3")


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="the artworks are not beside this checkout")
def test_data_dvc_describes_the_artworks(repo):
    shutil.rmtree(repo / "data")
    build_dataset(SHARED, repo / "data")
    dvc("add", "-q", "data", root=repo)
    assert (repo / "data.dvc").read_text() == (ROOT / "data.dvc").read_text()
    assert yaml.safe_load((ROOT / "data.dvc").read_text())["outs"][0]["nfiles"] == 813


def test_without_the_extra(monkeypatch):
    import importlib.util
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'pokemon_nb\[dvc\]'"): dvc("version")


@pytest.mark.slow
def test_the_command_line(repo, tmp_path):
    if not (tool := shutil.which("pokemon_pull", path=Path(sys.executable).parent)): pytest.skip("not installed")
    shutil.rmtree(repo / "data")
    dvc("remote", "add", "-d", "gcs", "gs://x/dvc", root=repo)
    dvc("remote", "modify", "gcs", "endpointurl", "http://127.0.0.1:9", root=repo)
    done = subprocess.run([tool, "--root", str(repo), "--bucket", "ours"], capture_output=True, text=True,
                          env=os.environ)
    assert done.returncode == 2 and "gcs (gs://ours/dvc): 127.0.0.1 does not answer" in done.stderr
    assert "pokemon_data --source" in done.stderr and "Traceback" not in done.stderr


# --- where it hurts ----------------------------------------------------------------------
@pytest.fixture
def stored(repo, original, tmp_path):
    "`repo`, pushed to a folder."
    shutil.copytree(original / "store", tmp_path / "store")
    said = (original / "pushed/.dvc/config").read_text()
    assert str(original / "store") in said
    (repo / ".dvc/config").write_text(said.replace(str(original / "store"), str(tmp_path / "store")))
    return repo


def damage(tmp_path):
    victim = max((p for p in (tmp_path / "store").rglob("*") if p.is_file() and p.suffix != ".dir"),
                 key=lambda p: p.stat().st_size)
    victim.chmod(0o644)
    victim.write_bytes(b"evil")


@pytest.mark.slow
@pytest.mark.parametrize("verify", ["true", "false"])
def test_a_damaged_remote_is_no_source(stored, tmp_path, verify):
    "Without `verify`, DVC itself calls such a pull a success, and the copy clean."
    dvc("remote", "modify", "local", "verify", verify, root=stored)
    damage(tmp_path)
    lose(stored)
    with pytest.raises(OSError, match="no remote has the data: local "): pull_data(stored)
    assert verify_data(stored)
    if verify == "false": assert "up to date" in dvc("status", root=stored)


@pytest.mark.slow
def test_the_projects_settings_verify(repo, tmp_path):
    "The committed configuration, with only the folder of the remote replaced."
    shutil.copyfile(ROOT / ".dvc/config", repo / ".dvc/config")
    (tmp_path / "store").mkdir()
    dvc("remote", "modify", "--local", "local", "url", str(tmp_path / "store"), root=repo)
    dvc("push", "-q", "-r", "local", root=repo)
    damage(tmp_path)
    lose(repo)
    with pytest.raises(OSError): pull_data(repo, "local")
    assert not (repo / "data").exists()                                   # nothing wrong was checked out


@pytest.mark.slow
def test_changes_of_ones_own_survive(stored):
    mine = next((stored / "data/train").glob("*.png"))
    mine.write_bytes(b"mine")
    with pytest.raises(ValueError, match="move the folder away"): pull_data(stored)
    assert mine.read_bytes() == b"mine"


@pytest.mark.slow
def test_a_build_from_elsewhere_needs_no_remote(stored, tmp_path, capsys):
    "The way out that the error names: build, then ask."
    shutil.rmtree(stored / ".dvc/cache")
    shutil.rmtree(tmp_path / "store")
    assert pull_data(stored) is None and "already holds" in capsys.readouterr().out
    right = dvc("status", root=stored)
    next((stored / "data/train").glob("*.png")).unlink()
    assert "not in cache" in right and dvc("status", root=stored) == right      # right or wrong: why we look ourselves
    assert "has the hash" in verify_data(stored)


@pytest.mark.slow
def test_a_pull_that_was_interrupted_goes_on(stored):
    shutil.rmtree(stored / "data/train")
    shutil.rmtree(stored / ".dvc/cache/files/md5" / next((stored / ".dvc/cache/files/md5").iterdir()).name)
    assert pull_data(stored) == "local" and not verify_data(stored)


@pytest.mark.slow
def test_not_a_dvc_repository(tmp_path):
    write_atomic(tmp_path / "data.dvc", "outs:\n- {md5: 0.dir, nfiles: 1, path: data}\n")
    run_git("init", "-q", folder=tmp_path)
    with pytest.raises(ValueError, match="must be a DVC repository"): pull_data(tmp_path)


@pytest.mark.slow
def test_no_remote_at_all(repo):
    shutil.rmtree(repo / "data")
    with pytest.raises(OSError, match="none is configured.*--source pokemon"): pull_data(repo)


def test_a_folders_hash_is_dvcs(repo):
    write_atomic(repo / "data/train/ü/ß b.png", b"x")                     # names beyond ASCII sort and quote alike
    dvc("add", "-q", "data", root=repo)
    assert folder_md5(repo / "data") in (repo / "data.dvc").read_text() and verify_data(repo) == ""
    (repo / "data/train/ü/ß b.png").rename(repo / "data/train/c.png")
    assert folder_md5(repo / "data") in verify_data(repo)


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="the artworks are not beside this checkout")
def test_git_and_folder_give_the_hash_of_data_dvc(tmp_path):
    rows = list(csv.DictReader((SHARED / "pokedex.csv").open(encoding="utf-8", newline="")))
    commits = (make_repository(tmp_path / "art", {f"images/{p.name}": p for p in (SHARED / "images").iterdir()}),
               make_repository(tmp_path / "facts", split_facts(rows)))
    shutil.copyfile(ROOT / "data.dvc", tmp_path / "data.dvc")
    build_dataset(fetch_pokemon(tmp_path / "got", *sources(tmp_path.as_uri(), *commits)), tmp_path / "data")
    assert verify_data(tmp_path) == ""


def test_a_proxy_knows_the_way(monkeypatch):
    for key in ("HTTPS_PROXY", "https_proxy", "NO_PROXY", "no_proxy"): monkeypatch.delenv(key, raising=False)
    where = ("gs://x/dvc", "https://127.0.0.1:9")
    assert "does not answer" in unreachable(*where)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:8")
    assert unreachable(*where) == ""
    assert unreachable("s3://x") == "" and "no folder" in unreachable(str(Path("/no/such")))
