"""The shape of the kit: what lies where, which file imports what, and how long it is."""

import ast
import fnmatch
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

from conftest import ROOT, STAGES

SCRIPTS = [f"{stage}.py" for stage in STAGES]
FOLDERS = ["bench", "configs", "data", "eval", "recipes", "tests"]
# Modules of these libraries that their documentation names; all else of them is private.
PUBLIC = {
    "transformers": {"transformers", "transformers.utils", "transformers.utils.logging"},
    "accelerate": {"accelerate", "accelerate.utils"},
    "huggingface_hub": {"huggingface_hub", "huggingface_hub.errors", "huggingface_hub.utils"},
}


def ignored(name: str) -> bool:
    patterns = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().split()]
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def sources(*folders: str) -> list[Path]:
    """The Python files at the top level and in `folders`; never none."""
    found = [*ROOT.glob("*.py"), *(path for folder in folders for path in (ROOT / folder).glob("*.py"))]
    assert len(found) >= 7 + len(folders), "nothing to look at"
    return found


def imports(path: Path) -> set[str]:
    """Every module that a file imports, at the top or inside a function; importlib.import_module's too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or ".")
            # `from transformers import masking_utils` is a module too; names of classes are no modules
            found |= {f"{node.module}.{name.name}" for name in node.names if name.name == name.name.lower()}
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("import_module", "importorskip"):
            found |= {a.value for a in node.args[:1] if isinstance(a, ast.Constant)}
    return found


def texts() -> dict[Path, str]:
    """The text files of the kit."""
    files = [path for folder in (".ci", *FOLDERS) for path in (ROOT / folder).rglob("*") if path.is_file()]
    files += [path for path in ROOT.iterdir() if path.is_file() and path.name != ".git"]  # a worktree's
    suffixes = {".py", ".sh", ".md", ".txt", ".toml", ".ini", ".yaml", ".html", ".j2", ""}
    return {path: path.read_text(encoding="utf-8") for path in files if path.suffix in suffixes}


def test_the_top_level_holds_these_and_no_more():
    names = {path.name for path in ROOT.iterdir() if not path.name.startswith(".") and not ignored(path.name)}
    assert names == {*SCRIPTS, "common.py", "README.md", "requirements.txt", *FOLDERS}
    assert all(map(ignored, ("models", "runs", ".venv")))


def test_stages_are_plain_files_of_a_light_kit():
    lines = {name: len((ROOT / name).read_text().splitlines()) for name in ["common.py", *SCRIPTS]}
    assert min(lines.values()) > 40, lines
    assert sum(lines.values()) <= 3900, lines  # 4,324 before the light kit; its aim is 2,400


def test_stages_never_import_each_other_or_the_evaluation():
    for name in ["common.py", *SCRIPTS]:
        found = imports(ROOT / name)
        assert name == "common.py" or "common" in found
        assert not [m for m in found if re.match(r"\d\d_|eval\b|shared$", m)], name


def is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def test_only_public_modules_of_libraries_are_imported():
    checked = 0
    for path in sources("eval", "recipes", "bench"):
        # what is imported, and what is reached as an attribute (transformers.masking_utils)
        dotted = re.findall(r"\b(?:transformers|accelerate|huggingface_hub)(?:\.[a-z_]+)+\b", path.read_text())
        for module in {*imports(path), *dotted}:
            assert module.startswith("__") or not re.search(r"(^|\.)_", module), f"{path.name}: {module}"
            package = module.split(".")[0]
            if package in PUBLIC and is_module(module):
                checked += 1
                assert module in PUBLIC[package], f"{path.name}: {module}"
    assert checked > 5


def test_what_is_imported_is_pinned_and_what_is_pinned_is_used():
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    rows = [re.fullmatch(r"([A-Za-z0-9_.-]+)(==|~=)([0-9][0-9.]*)", line) for line in lines]
    assert all(rows), "a line without a pin"
    assert "torch==2.13.0" in lines
    pinned, used = {row[1].lower().replace("_", "-") for row in rows}, set()
    ours = {path.stem for path in sources("eval", "tests", "bench", "recipes")}
    distributions = importlib.metadata.packages_distributions()
    for path in sources("eval", "tests", "bench", "recipes"):
        for package in {module.split(".")[0] for module in imports(path)} - ours - {"", *sys.stdlib_module_names}:
            names = {name.lower().replace("_", "-") for name in distributions.get(package, [package])}
            assert not names or names & pinned, f"{path.name} imports {package}"
            used |= names
    # called by name, not imported: the formatter, the tests, the reader of the small model's file
    everything, by_name = "\n".join(texts().values()), {"ruff", "gguf", "pytest", "pytest-xdist"}
    unused = [name for name in pinned - used if name not in by_name or name not in everything]
    assert not unused and len(used) > 10


def test_denoising_and_pairing_need_no_torch():
    code = """import importlib, sys
for stage in ("04_denoise", "05_pairs"):
    importlib.import_module(stage)
print([m for m in ("torch", "transformers", "accelerate", "datasets") if m in sys.modules])"""
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) == "[]\n"


def test_texts_name_files_that_are_there_and_no_host_or_machine():
    found, hosts = 0, ["pypi" + ".org", "python" + "hosted", "registry." + "npm", "deb." + "debian"]
    hosts += ["/" + "work/", "/opt/" + "wheels", "/" + "root/"]
    for path, text in texts().items():
        assert not [host for host in hosts if host in text], path
        # a path of the kit that is written somewhere: recipes/quickstart.sh, 04_denoise.py
        names = r"(?<![\w/.{-])(?:(?:recipes|eval|bench|configs|tests|data)/[\w./-]+\.\w+|0\d_[a-z]+\.py)\b"
        for name in re.findall(names, text):
            found += 1
            assert (ROOT / name).exists(), f"{path.relative_to(ROOT)} names {name}"
    assert found > 50
