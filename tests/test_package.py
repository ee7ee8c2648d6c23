"""The package as a whole: its names, its imports, its words."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import foveate

SOURCE = Path(foveate.__file__).parent
MODULES = sorted(SOURCE.rglob("*.py"))


def test_every_public_name_loads() -> None:
    for name in foveate.__all__:
        assert getattr(foveate, name) is not None
    assert len(foveate.__all__) <= 25


def test_unknown_name_says_what_exists() -> None:
    with pytest.raises(AttributeError, match="public names are"):
        _ = foveate.no_such_name


@pytest.mark.parametrize("statement", ["import foveate", "import foveate.cli"])
def test_import_is_light(statement: str) -> None:
    heavy = {"torch", "monai", "matplotlib", "accelerate", "jsonargparse", "cv2", "numba", "transformers", "timm"}
    code = f"import sys; {statement}; print(','.join(sorted({heavy!r} & set(sys.modules))))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_import_needs_no_extra() -> None:
    code = (
        "import sys\n"
        "for name in ('timm', 'torchvision', 'transformers', 'wandb', 'tensorboard'): sys.modules[name] = None\n"
        "import foveate\n"
        "for name in foveate.__all__: getattr(foveate, name)\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_module_is_small(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 400, f"{path.name} has {len(lines)} lines; split it by idea"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
            length = node.end_lineno - node.body[0].lineno + 1
            doc = ast.get_docstring(node, clean=False)
            body = length - (doc.count("\n") + 1 if doc else 0)
            assert body <= 60, f"{path.name}:{node.lineno} {node.name} has {body} lines; split it"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_module_has_no_debugger_no_bare_except(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{path.name}:{node.lineno} bare except"
        if isinstance(node, ast.Import):
            assert not {alias.name for alias in node.names} & {"pdb", "ipdb", "torchvision", "pickle"}


def test_one_word_one_meaning() -> None:
    """The words that docs/vocabulary.md turns away name no argument, function or class."""
    turned_away = {
        "img",
        "wsi",
        "rect",
        "coords",
        "nodes",
        "mesh",
        "policy",
        "tp_ratio",
        "fixed_length",
        "ids_keep",
        "n_x",
    }
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names: set[str] = set()
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            if isinstance(node, ast.FunctionDef):
                names |= {argument.arg for argument in [*node.args.args, *node.args.kwonlyargs]}
            assert not names & turned_away, f"{path.name}:{node.lineno} {names & turned_away}"


def test_raise_carries_text() -> None:
    """Every error raised with a FoveateError type has a message."""
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            call = node.exc if isinstance(node, ast.Raise) else None
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id.endswith("Error"):
                assert call.args, f"{path.name}:{node.lineno} {call.func.id} without a message"
