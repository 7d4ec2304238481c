"""Guards for what is sent elsewhere: every file is checked by the tool that will read it, nothing is sent."""

import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml

from pokemon_nb.deploy import cloud_run_service, deploy_commands, make_mar
from pokemon_nb.serving import Limits

ROOT = Path(__file__).resolve().parent.parent
TARGETS = ["data", "train", "finetune", "test", "serve"]


def run(tool, *arguments):
    "A tool beside this Python, or on the path; skipped where it is not."
    where = Path(sys.executable).with_name(tool)
    where = str(where) if where.exists() else shutil.which(tool)
    if not where: pytest.skip(f"needs {tool}")
    done = subprocess.run([where, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_dockerfile_has_its_targets_and_is_clean():
    text = (ROOT/"Dockerfile").read_text()
    stages = re.findall(r"^FROM \S+ AS (\w+)", text, re.M)
    assert stages[-1] == "serve" and set(TARGETS) <= set(stages)
    for stage in text.split("\nFROM ")[3:]: assert "USER 10001" in stage, "every image runs without rights"
    run("hadolint", "Dockerfile")
    run("hadolint", "deploy/space/Dockerfile")


def test_no_artwork_enters_an_image():
    ignored = (ROOT/".dockerignore").read_text().split()
    assert {"data", "runs", ".git", ".venv", "samples"} <= set(ignored)


def test_compose_and_prometheus():
    run("check-jsonschema", "--builtin-schema", "vendor.compose-spec", "deploy/compose.yaml")
    run("promtool", "check", "config", "deploy/prometheus.yml")
    services = yaml.safe_load((ROOT/"deploy/compose.yaml").read_text())["services"]
    assert all(p.startswith("127.0.0.1:") for s in services.values() for p in s["ports"]), "only this machine is served"
    (target,) = yaml.safe_load((ROOT/"deploy/prometheus.yml").read_text())["scrape_configs"][0]["static_configs"]
    assert target["targets"] == ["pokemon:8080"]


def test_the_dry_run_sends_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))                             # no docker, no gcloud: it must not matter
    monkeypatch.chdir(tmp_path)
    command = [Path(sys.executable).with_name("pokemon_deploy"), "my-project", "--dry-run"]
    command += ["--key-secret", "pokemon-key"]
    said = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True).stdout
    service = yaml.safe_load(said[:said.index("would run")])
    assert service == cloud_run_service("europe-west1-docker.pkg.dev/my-project/pokemon/serve:latest",
                                        key_secret="pokemon-key")
    assert said.count("would run") == 5 and not list(tmp_path.iterdir())
    spec = service["spec"]["template"]["spec"]
    assert spec["containerConcurrency"] == Limits().waiting and "allUsers" not in said


@pytest.mark.parametrize("what", [dict(project="a b"), dict(region="x"), dict(name="-x"), dict(tag="$(id)")])
def test_names_that_are_no_names_are_refused(what):
    given = dict(project="my-project") | what
    command = [Path(sys.executable).with_name("pokemon_deploy"), given.pop("project"), "--dry-run"]
    command += [k for key, v in given.items() for k in (f"--{key}={v}",)]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "must look like" in done.stderr


def test_no_shell_sees_a_command():
    for command in deploy_commands("p", "r", "h/p/i:t", "n", "f"): assert all(isinstance(k, str) for k in command)


def test_the_archive_for_torchserve(tmp_path):
    import json
    import zipfile

    from serving_tools import tiny_checkpoint
    z = zipfile.ZipFile(make_mar(tiny_checkpoint(tmp_path), tmp_path/"pokemon.mar"))
    manifest = json.loads(z.read("MAR-INF/MANIFEST.json"))
    assert manifest["model"]["modelName"] == "pokemon"
    assert {"model_index.json", "pokemon_handler.py"} <= set(z.namelist())
    compile(z.read("pokemon_handler.py"), "pokemon_handler.py", "exec")
    properties = dict(row.split("=", 1) for row in (ROOT/"deploy/torchserve/config.properties").read_text().splitlines()
                      if "=" in row and not row.startswith("#"))
    models = json.loads(properties["models"])
    assert models["pokemon"]["1.0"]["batchSize"] <= Limits().batch and properties["inference_address"].startswith("http://127.")


def test_the_space_serves_where_it_says():
    front = yaml.safe_load((ROOT/"deploy/space/README.md").read_text().split("---")[1])
    assert front["sdk"] == "docker" and f"PORT={front['app_port']}" in (ROOT/"deploy/space/Dockerfile").read_text()


def test_extras_that_the_dockerfile_names_exist():
    ini = ConfigParser(delimiters=["="])
    ini.read(ROOT/"settings.ini")
    for extra in ("data", "dvc", "finetune", "dev", "offline"): assert f"{extra}_requirements" in ini["DEFAULT"]
