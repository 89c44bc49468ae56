"""The rules of the house, read from the sources: levels, sizes, exceptions, lean imports, no pickles."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "hfprune"
FILES = sorted(ROOT.rglob("*.py"))

# A module imports only from its own level or a lower one.
LEVELS = {
    **dict.fromkeys(("errors", "registry", "secrets", "stopping"), 1),
    **dict.fromkeys(("strict", "granularity", "target", "drop", "schedules", "methods"), 2),
    **dict.fromkeys(("config", "strategy", "grid", "study", "recipe"), 2),
    **dict.fromkeys(
        ("bits", "weights", "units", "selection", "masks", "originals", "offloading", "sharding", "criteria"), 3
    ),
    **dict.fromkeys(("counts", "pruner", "sharded", "profiling", "structure", "lowrank"), 4),
    **dict.fromkeys(("speech",), 4),
    **dict.fromkeys(("checkpoint", "loader", "report", "hub", "inspection"), 5),
    **dict.fromkeys(("oneshot", "streaming"), 5.5),
    **dict.fromkeys(("data", "models", "processing", "metrics", "scratch", "scratch_speech", "training"), 6),
    **dict.fromkeys(("pipeline", "folders", "preview", "streamed", "cli"), 7),
    **dict.fromkeys(("terminal", "analysis", "remeasure", "wild"), 7),
}


def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def room(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path):
    """The rooms of hfprune that a file imports from, in functions too, except for type checkers."""
    tree = tree_of(path)
    typing = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    skipped = {id(inner) for node in typing for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            parts = (node.module or "").split(".")
            if parts[0] == "hfprune":
                yield from [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                if parts[0] == "hfprune" and len(parts) > 1:
                    yield parts[1]


def named(path):
    return str(path.relative_to(ROOT))


every_file = pytest.mark.parametrize("path", FILES, ids=named)


def test_every_room_has_a_level():
    assert {room(path) for path in FILES} - {"__init__", "__main__"} == set(LEVELS)


@every_file
def test_imports_go_down(path):
    if room(path) in ("__init__", "__main__"):
        assert not list(imports(path))
        return
    for other in imports(path):
        if other in LEVELS:
            assert LEVELS[other] <= LEVELS[room(path)], f"{named(path)} imports {other}"


@every_file
def test_files_and_functions_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= 60, f"{named(path)}: {node.name} has {length} lines"


@every_file
def test_no_exception_is_caught_blindly(path):
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "everything"
            again = any(isinstance(inner, ast.Raise) and inner.exc is None for inner in ast.walk(node))
            assert caught not in ("Exception", "everything"), f"{named(path)}:{node.lineno} catches {caught}"
            assert caught != "BaseException" or again, f"{named(path)}:{node.lineno} swallows {caught}"


@every_file
def test_nothing_is_pickled(path):
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        else:
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not {m.split(".")[0] for m in modules} & {"pickle", "cPickle", "dill", "cloudpickle", "joblib"}
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in ("torch.save", "torch.load"), f"{named(path)}:{node.lineno}"


def test_importing_hfprune_imports_little():
    code = "import sys, hfprune; hfprune.__version__; dir(hfprune); print(' '.join(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    heavy = {
        "torch",
        "transformers",
        "transformers.trainer",
        "datasets",
        "evaluate",
        "timm",
        "torchvision",
        "matplotlib",
    }
    heavy |= {"pydantic", "sklearn", "scipy", "typer", "rich", "hfprune.pipeline", "hfprune.training", "hfprune.cli"}
    assert not heavy & set(done.stdout.split())


def test_pruning_imports_no_training():
    code = "import sys, hfprune; hfprune.prune, hfprune.PruningConfig; print(' '.join(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    heavy = {"transformers.trainer", "datasets", "evaluate", "timm", "torchvision", "matplotlib", "hfprune.pipeline"}
    assert not heavy & set(done.stdout.split())
