"""The shape of the house: which way imports point, how large files are, what ``import mixcomp`` brings along."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).parent.parent
MAX_LINES = 400
#: of code: blank lines, comments and docstrings are free; 8,000 was the aim before three papers' strategies, a
#: transform, a kernel that spells out what each lane of a warp does and products of 8-bit integers moved in
MAX_CODE_LINES = 11_430

#: folder -> package
FOLDERS = {
    "mixcomp": "mixcomp",
    "mixcomp/data": "mixcomp.data",
    "passes": "mixcomp.passes",
    "lowering": "mixcomp.lowering",
    "kernels": "mixcomp.kernels",
}

#: types and laws; they know nothing of what is built on them
CORE = {
    "errors", "format", "profiles", "ops", "packed", "quant", "float_grid", "budget", "config", "patterns", "program",
    "protocol", "plans", "files", "shards", "records", "printer", "snapshot", "graph_laws", "table_laws", "verify",
    "dumps", "manager",
}  # fmt: skip
#: what a pass may know besides mathematics of its own folder
FOR_PASSES = {
    "errors", "format", "profiles", "ops", "packed", "quant", "float_grid", "budget", "config", "program", "protocol",
    "plans",
}  # fmt: skip
FOR_LOWERING = {"config", "errors", "format", "ops", "packed", "program", "protocol"}
FOR_KERNELS = {"errors", "format", "packed"}
#: only these may be imported from the front door
ABOVE_API = {"__init__", "__main__", "backend", "cli", "demo"}
#: at the bottom everything is spelled out
BOTTOM = {
    "errors": set(),
    "ops": set(),
    "format": {"errors"},
    "profiles": {"format"},
    "packed": {"errors", "format", "profiles"},
    "program": {"errors", "format"},
    "protocol": {"program"},
}
PASS_MODULES = {
    "assign_blocks", "assign_features", "assign_mixes", "follow", "keep_samples", "precision", "quantize", "reorder",
    "salience", "scale", "score_features", "side_branch", "statistics", "tune_blocks", "tune_clipping", "tune_model",
}  # fmt: skip
#: where passes are put in a row
LISTS = {"passes", "passes.strategies"}

#: library -> modules (prefixes) that may import it at all, and those that may do so when they are imported themselves
ONLY_IN = {
    "triton": ({"mixcomp.kernels"}, {"mixcomp.kernels"}),
    "networkx": ({"mixcomp.passes"}, {"mixcomp.passes"}),
    "transformers": (
        {"mixcomp." + m for m in ("artifact", "capture", "calibration", "cli", "hf", "restore", "skeleton", "sources")},
        {"mixcomp.hf"},
    ),
    "typer": ({"mixcomp.cli", "mixcomp.terminal"}, {"mixcomp.cli", "mixcomp.terminal"}),
    "rich": ({"mixcomp.cli", "mixcomp.progress", "mixcomp.report", "mixcomp.terminal"}, {"mixcomp.progress"}),
}

BANNED_MODULES = {"pickle", "cPickle", "dill", "marshal", "shelve", "random"}
BANNED_CALLS = {
    "eval", "exec", "compile", "__import__", "torch.load", "torch.manual_seed", "torch.nan_to_num", "torch.seed",
    "os._exit", "os.system", "numpy.random.seed", "np.random.seed", "sys.exit",
}  # fmt: skip
#: where text for people is written
TALKING = {"mixcomp.cli", "mixcomp.demo", "mixcomp.__main__"}


@dataclass(frozen=True)
class Import:
    """One import: ``eager`` when it runs as the importing module is imported."""

    source: str
    target: str
    eager: bool


@cache
def modules() -> dict[str, Path]:
    """Every shipped module by its dotted name."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).glob("*.py")):
            found[package if path.stem == "__init__" else f"{package}.{path.stem}"] = path
    return found


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(modules()[name].read_text(encoding="utf-8"))


def eager_nodes(body: ast.AST) -> Iterator[ast.AST]:
    """What runs on import: neither function bodies nor ``if TYPE_CHECKING``."""
    for node in ast.iter_child_nodes(body):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        yield node
        yield from eager_nodes(node)


def targets(node: ast.AST) -> Iterator[str]:
    """Modules an import statement names; ``from mixcomp import data`` names ``mixcomp.data``."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:
        inner = [f"{node.module}.{alias.name}" for alias in node.names]
        found = [name for name in inner if name in modules()]
        yield from found
        if len(found) < len(inner):
            yield node.module


@cache
def imports() -> tuple[Import, ...]:
    found = []
    for name in modules():
        eager = {t for node in eager_nodes(tree(name)) for t in targets(node)}
        every = {t for node in ast.walk(tree(name)) for t in targets(node)}
        found += [Import(name, target, target in eager) for target in sorted(every)]
    return tuple(found)


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def ours() -> Iterator[Import]:
    return (i for i in imports() if inside(i.target, "mixcomp"))


def short(name: str) -> str:
    return name.partition(".")[2] or "__init__"


def is_arrow_allowed(arrow: Import) -> bool:
    """The drawing of section 4.5 of the architecture, as a function."""
    source, target = short(arrow.source), short(arrow.target)
    area = source.partition(".")[0]
    if target == "api":
        return source in ABOVE_API
    if area == "passes":
        helper = inside(target, "passes") and target.partition(".")[2] not in PASS_MODULES
        launches = (source, target, arrow.eager) == ("passes.columns", "kernels.columns", False)
        return target in FOR_PASSES or helper or launches or source in LISTS
    if area == "lowering":
        lazily = inside(target, "kernels") and not arrow.eager
        return target in FOR_LOWERING or inside(target, "lowering") or lazily
    if area == "kernels":
        return target in FOR_KERNELS or inside(target, "kernels")
    if source in BOTTOM:
        return target in BOTTOM[source]
    if source in CORE:
        return target in CORE
    return not inside(target, "kernels")


def test_imports_follow_the_arrows() -> None:
    wrong = [f"{a.source} -> {a.target}" for a in ours() if a.source != a.target and not is_arrow_allowed(a)]
    assert not wrong, "these imports point the wrong way: " + ", ".join(wrong)


def test_the_arrows_forbid_something() -> None:
    forbidden = [
        ("passes.quantize", "lowering.lower"),
        ("passes.quantize", "kernels.launch"),
        ("passes.reorder", "passes.precision"),
        ("kernels.launch", "program"),
        ("lowering.lower", "passes.quantize"),
        ("verify", "passes.coupling"),
        ("program", "printer"),
        ("format", "packed"),
        ("capture", "api"),
        ("artifact", "kernels.launch"),
    ]
    for source, target in forbidden:
        assert not is_arrow_allowed(Import(f"mixcomp.{source}", f"mixcomp.{target}", True)), (source, target)
    assert not is_arrow_allowed(Import("mixcomp.lowering.ops", "mixcomp.kernels.launch", True))
    assert is_arrow_allowed(Import("mixcomp.lowering.ops", "mixcomp.kernels.launch", False))


def test_no_import_cycles() -> None:
    graph = nx.DiGraph((i.source, i.target) for i in ours() if i.eager and i.source != i.target)
    assert not list(nx.simple_cycles(graph))


@pytest.mark.parametrize("library", ONLY_IN)
def test_libraries_stay_in_their_rooms(library: str) -> None:
    anywhere, eagerly = ONLY_IN[library]
    for found in imports():
        if not inside(found.target, library):
            continue
        rooms = eagerly if found.eager else anywhere
        assert any(inside(found.source, room) for room in rooms), f"{found.source} imports {found.target}"


@pytest.mark.parametrize("name", modules())
def test_files_are_short(name: str) -> None:
    assert len(modules()[name].read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def code_lines(text: str) -> int:
    """Lines that are neither empty nor comment nor docstring."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    lines = {i for i, line in enumerate(text.splitlines(), 1) if line.strip() and not line.strip().startswith("#")}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            lines -= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return len(lines)


def test_the_whole_is_small() -> None:
    assert code_lines('"""Doc\n\nmore."""\n\n# why\nx = 1\n') == 1
    assert sum(code_lines(path.read_text(encoding="utf-8")) for path in modules().values()) <= MAX_CODE_LINES


def banned(text: ast.AST, extra: set[str]) -> set[str]:
    """Banned functions that are called and banned modules that are imported."""
    functions = [n.func for n in ast.walk(text) if isinstance(n, ast.Call)]
    called = {ast.unparse(f) for f in functions if isinstance(f, (ast.Name, ast.Attribute))}
    named = {t.partition(".")[0] for n in ast.walk(text) for t in targets(n)}
    return called & (BANNED_CALLS | extra) | named & BANNED_MODULES


@pytest.mark.parametrize("name", modules())
def test_nothing_banned_is_used(name: str) -> None:
    found = banned(tree(name), set() if name in TALKING else {"print"})
    assert not found - ({"sys.exit"} if name in TALKING else set())


@pytest.mark.parametrize(
    "text", ["import pickle", "from random import choice", "eval('1')", "torch.load(f)", "print(1)"]
)
def test_what_is_banned_is_found(text: str) -> None:
    assert banned(ast.parse(text), {"print"})


@pytest.mark.parametrize("name", modules())
def test_public_names_say_what_they_are(name: str) -> None:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    assert ast.get_docstring(tree(name)), f"{name} has no docstring"
    for node in tree(name).body:
        if isinstance(node, kinds) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{name}.{node.name} has no docstring"


PROBE = """
import importlib.util, json, sys, time
import torch
known, start = set(sys.modules), time.process_time()
import mixcomp
seconds = time.process_time() - start
new = {name.partition(".")[0] for name in set(sys.modules) - known}
sys.modules["triton"] = None  # from here on, importing it fails
mixcomp.compile, mixcomp.save, mixcomp.load, mixcomp.Budget
import mixcomp.lowering.lower, mixcomp.manager, mixcomp.passes
spec = importlib.util.find_spec("kernels")
print(json.dumps({"new": sorted(new), "seconds": seconds, "kernels": spec.origin if spec else None}))
"""


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What a fresh process finds that has nothing to do with the repository's folder."""
    command = [sys.executable, "-c", PROBE]
    done = subprocess.run(command, cwd=tmp_path_factory.mktemp("away"), capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_import_is_light(probe: dict[str, object]) -> None:
    assert not set(probe["new"]) & {"triton", "transformers", "networkx", "scipy", "rich", "typer", "safetensors"}
    assert probe["seconds"] < 1, "seconds of processor time beyond torch's own"


def test_no_folder_of_ours_is_a_top_level_package(probe: dict[str, object]) -> None:
    """``kernels`` would shadow a package that transformers imports."""
    assert not probe["kernels"] or not Path(str(probe["kernels"])).is_relative_to(ROOT)
