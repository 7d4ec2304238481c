"""Guards for the project's shape: notebooks and modules agree, imports flow one way, nothing broken is stored."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").glob("*.ipynb"))
CHAPTERS = [p for p in NOTEBOOKS if re.match(r"\d\d", p.name)]
MODULES = sorted(p for p in (ROOT / "pokemon_nb").glob("*.py") if not p.name.startswith("_"))


def cells(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def source(cell):
    return "".join(cell["source"])


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "A copy of what export and clean work on, so that a dirty working tree is left alone."
    folder = tmp_path_factory.mktemp("project")
    for name in ("nbs", "pokemon_nb"):
        shutil.copytree(
            ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "weights")
        )
    for name in ("settings.ini", "README.md"):
        shutil.copy(ROOT / name, folder)
    return folder


def tool(name, cwd):
    done = subprocess.run([Path(sys.executable).with_name(name)], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_notebooks_are_clean(copy):
    tool("nbdev_clean", copy)
    for path in NOTEBOOKS:
        assert (copy / "nbs" / path.name).read_bytes() == path.read_bytes(), (
            f"{path.name} is not clean; mend it: nbdev_clean"
        )


def test_export_is_current(copy):
    tool("nbdev_export", copy)
    for path in sorted((ROOT / "pokemon_nb").glob("*.py")):
        assert (copy / "pokemon_nb" / path.name).read_text() == path.read_text(), (
            f"{path.name} is stale; mend it: nbdev_export"
        )
    made = {p.name for p in (copy / "pokemon_nb").glob("*.py")}
    assert made == {p.name for p in (ROOT / "pokemon_nb").glob("*.py")}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_no_module_outlives_its_notebook(path):
    stated = re.search(r"File to edit: \.\./(nbs/[\w./-]+?\.ipynb)", path.read_text()[:800])
    assert stated and (ROOT / stated[1]).is_file(), f"{path.name} has no notebook"


def test_imports_flow_one_way():
    "A chapter imports only from chapters before it; nbdev makes our imports relative, except inside functions."
    order = {}
    for path in CHAPTERS:
        for c in cells(path):
            if m := re.search(r"#\|\s*default_exp\s+(\w+)", source(c)):
                order[m[1]] = path.name
    for path in MODULES:
        for name in re.findall(r"from (?:\.|pokemon_nb\.)(\w+) import", path.read_text()):
            assert order[name] < order[path.stem], f"{path.stem} imports {name}, which comes after it"


def test_the_training_notebook_keeps_its_parameters_tag():
    tagged = [c for c in cells(ROOT / "nbs/05_train.ipynb") if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1, "papermill would silently ignore -p; check allowed_cell_metadata_keys in settings.ini"
    assert all(re.fullmatch(r"\w+ = .*#.*", line) for line in source(tagged[0]).splitlines()), (
        "one literal and one comment a line"
    )


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_a_chapter_reads_like_a_chapter(path):
    all_cells = cells(path)
    words = [c for c in all_cells if c["cell_type"] == "markdown"]
    assert len(words) >= 0.25 * len(all_cells), "at least a quarter of the cells is prose"
    first = next(c for c in all_cells if c["cell_type"] == "markdown")
    assert re.match(r"# .+\n\n> .+", source(first)), "a chapter opens with its title and a one-line summary"
    exported = [c for c in all_cells if re.match(r"#\|\s*export", source(c))]
    shown = [c for c in all_cells if c["cell_type"] == "code" and not source(c).startswith("#|")]
    assert len(shown) >= 0.7 * len(exported), "exported cells are shown or tested"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_stored_outputs_are_small_and_sound(path):
    assert path.stat().st_size < 2**20, "no notebook over 1 MiB"
    for c in cells(path):
        for o in c.get("outputs", []):
            assert o["output_type"] != "error", f"a stored error in {path.name}"
            assert o.get("name") != "stderr", f"a stored progress bar or warning in {path.name}; delete that output"
            for kind, data in o.get("data", {}).items():
                assert not kind.startswith("image/") or len("".join(data)) < 270_000, (
                    f"a stored picture over 200 kB in {path.name}"
                )
                assert "widget" not in kind, f"a stored widget in {path.name}"


FRESH = """
import importlib, os, sys
import diffusers.pipelines.pipeline_utils, lightning, torch, transformers   # loaded once for all the children
EXTRA = {"nbdev", "execnb", "pytest", "datasets", "httpx", "imagehash", "jupyterlab", "dvc"} - set(sys.modules)
for name in sys.argv[1:]:
    child = os.fork()
    if not child:
        try:
            importlib.import_module(f"pokemon_nb.{name}")
            assert not (more := EXTRA & set(sys.modules)), f"{name} needs development extras: {more}"
        except BaseException: sys.excepthook(*sys.exc_info()); sys.stderr.flush(); os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]: sys.exit(f"pokemon_nb.{name} cannot be imported by itself")
"""


@pytest.mark.slow
def test_every_module_can_be_imported_by_itself():
    "Each in a process of its own, so that none leans on what another imported; and none pulls in development extras."
    command = [sys.executable, "-c", FRESH, *(m.stem for m in MODULES)]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr


def test_every_console_script_is_there():
    from importlib.metadata import entry_points

    ours = {e.name: e for e in entry_points(group="console_scripts") if e.value.startswith("pokemon_nb.")}
    assert {"pokemon_data", "pokemon_report", "pokemon_pull", "pokemon_caption", "pokemon_train", "pokemon_generate",
            "pokemon_metrics", "pokemon_serve"} <= set(ours)
    for e in ours.values():
        assert e.load().__doc__, f"{e.name} has no help"


def test_versions_are_pinned_in_one_place():
    "settings.ini has lower bounds, constraints.txt has the exact versions of all of them."
    from configparser import ConfigParser

    ini = ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini")
    pins = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    wanted = " ".join(v for k, v in ini["DEFAULT"].items() if k.endswith("requirements")).split()
    for want in wanted:
        name = re.split(r"[<>=!~\[]", want)[0].lower().replace("_", "-")
        assert name in pins, f"{want} has no exact version in constraints.txt"
    assert "torch==2.13.0" in (ROOT / "constraints.txt").read_text().splitlines()


def readme_from_index():
    "The front notebook as Markdown, with links as they are seen from the top folder."
    from nbconvert import MarkdownExporter

    exporter = MarkdownExporter(exclude_output_prompt=True, exclude_input_prompt=True)
    text, _ = exporter.from_filename(str(ROOT / "nbs/index.ipynb"))
    return re.sub(r"\]\((images/|\d\d)", r"](nbs/\1", text).strip() + "\n"


def test_readme_is_the_front_notebook(request):
    if request.config.getoption("--write-readme"):
        (ROOT / "README.md").write_text(readme_from_index(), encoding="utf-8")
    assert (ROOT / "README.md").read_text(encoding="utf-8") == readme_from_index(), (
        "README.md is stale; mend it: make readme"
    )
