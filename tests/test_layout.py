"""The layout: util/ imports nothing from the top level, flags have help, commands exist."""

import ast
import graphlib
import re
import shlex
import sys
from pathlib import Path

import pytest
from helpers.tiny import SCRIPTS

ROOT = Path(__file__).parent.parent
TOP = sorted(path.stem for path in ROOT.glob("*.py"))
UTIL = sorted(path.stem for path in (ROOT / "util").glob("[!_]*.py"))
FILES = {name: ROOT / f"{name}.py" for name in TOP} | {
    f"util.{name}": ROOT / "util" / f"{name}.py" for name in UTIL
}
STANDARD = set(sys.stdlib_module_names)
LIBRARIES = {
    "torch", "torchvision", "PIL", "numpy", "tqdm", "requests", "tyro", "safetensors", "filelock",
    "matplotlib", "pycocoevalcap", "onnx", "onnxscript", "onnxruntime", "flask", "waitress",
    "webdataset", "nltk", "pandas",
}  # fmt: skip
# Libraries that not everybody installs: which file asks for them, and who alone may use them.
EXTRAS = {
    "requirements-app.txt": {"flask", "waitress"},
    "requirements-onnx.txt": {"onnx", "onnxscript", "onnxruntime"},
    "requirements-shards.txt": {"webdataset"},
    "requirements-dev.txt": {"pycocoevalcap"},
}


def imported(path: Path) -> set[str]:
    """Return the modules that a module imports anywhere, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "util":
            names |= {f"util.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


def libraries(path: Path) -> set[str]:
    """Return the packages outside the project that a module imports."""
    return {name.split(".")[0] for name in imported(path) - FILES.keys()}


@pytest.mark.parametrize("name", UTIL)
def test_util_imports_nothing_from_the_top_level(name):
    assert not imported(FILES[f"util.{name}"]) & set(TOP)


def test_no_module_imports_itself_by_a_detour():
    graph = {name: imported(path) & FILES.keys() for name, path in FILES.items()}
    assert list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


@pytest.mark.parametrize("name", FILES)
def test_a_module_imports_only_known_libraries(name):
    assert libraries(FILES[name]) <= STANDARD | LIBRARIES


def test_only_the_image_side_names_torchvision():
    named = {name for name, path in FILES.items() if "torchvision" in libraries(path)}
    assert named == {"backbones", "encoder"}


def flags_without_help(path: Path) -> list[str]:
    """Return the fields of configuration classes that no docstring follows."""
    bare = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not (isinstance(node, ast.ClassDef) and node.name.endswith("Config")):
            continue
        for field, after in zip(node.body, [*node.body[1:], None], strict=True):
            is_group = isinstance(field, ast.AnnAssign) and "Config" in ast.unparse(
                field.annotation
            )
            if isinstance(field, ast.AnnAssign) and not is_group:
                text = getattr(getattr(after, "value", None), "value", None)
                if not (isinstance(text, str) and len(text.split()) >= 3):
                    bare.append(f"{node.name}.{field.target.id}")
    return bare


@pytest.mark.parametrize("name", FILES)
def test_every_flag_has_help(name):
    assert flags_without_help(FILES[name]) == []


@pytest.mark.parametrize("module", SCRIPTS)
def test_every_script_prints_its_flags(module, capsys):
    script = __import__(module)
    with pytest.raises(SystemExit) as stop:
        script.main(["--help"])
    assert stop.value.code == 0
    assert "--help" in capsys.readouterr().out


def commands() -> list[list[str]]:
    """Return the project's commands in the README and the other pages, each once, as arguments."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "weights/README.md"]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    text = re.sub(r"\\\n\s*", " ", text)
    blocks = "\n".join(re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.DOTALL))
    lines = re.findall(r"python (?:{})\.py[^\n&|#]*".format("|".join(SCRIPTS)), blocks)
    return [shlex.split(line)[1:] for line in dict.fromkeys(map(str.strip, lines))]


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_the_readmes_commands_parse(command, monkeypatch):
    """Flags are read and found good; the work itself is stopped before it begins."""
    script = __import__(command[0].removesuffix(".py"))

    class ParsedError(Exception):
        pass

    original = script.program.parse

    def parse(*args, **keywords):
        original(*args, **keywords)
        raise ParsedError

    monkeypatch.setattr(script.program, "parse", parse)
    # The runs and models that commands name are not there; the defaults are the flags' own.
    monkeypatch.setattr("config.read_run", lambda chosen: {})
    monkeypatch.setattr("config.read_sizes", lambda checkpoint: {})
    with pytest.raises(ParsedError):
        script.main(command[1:])


def asked_for(file: str) -> set[str]:
    """Return the names of the packages in a file of requirements."""
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    return {re.split(r"[<>=]", line)[0].strip().lower() for line in lines if line[:1].isalpha()}


def test_the_requirements_are_the_libraries_used():
    used = {name.lower().replace("pil", "pillow") for name in LIBRARIES}
    assert asked_for("requirements.txt") == used - set().union(*EXTRAS.values())
    assert asked_for("requirements-app.txt") == EXTRAS["requirements-app.txt"]
    assert asked_for("requirements-onnx.txt") == EXTRAS["requirements-onnx.txt"]
    assert asked_for("requirements-shards.txt") == EXTRAS["requirements-shards.txt"]
    assert asked_for("requirements-dev.txt") >= EXTRAS["requirements-dev.txt"]


def test_the_web_page_alone_needs_its_libraries():
    users = {name for name, path in FILES.items() if libraries(path) & {"flask", "waitress"}}
    assert users == {"app"}


def test_conda_users_get_what_pip_users_get():
    """conda takes Python alone; the rest is requirements.txt itself, so that nothing can differ."""
    text = (ROOT / "environment.yml").read_text(encoding="utf-8")
    assert re.findall(r"-r (\S+)", text) == ["requirements.txt"]
    listed = text.split("dependencies:")[1]
    assert re.findall(r"^ +- ([a-z]+)", listed, re.MULTILINE) == ["python", "pip", "pip"]
