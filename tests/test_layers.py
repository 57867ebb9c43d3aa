"""The house of docs/ARCHITECTURE.md: what may know what, read from the sources themselves."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "dtruntime_torch"
PAGE = ROOT / "docs" / "ARCHITECTURE.md"
CORE = ROOT / "csrc" / "core"
CUDA = ROOT / "csrc" / "cuda"
BINDINGS = ROOT / "csrc" / "bindings"

# A layer is a list of steps. A module imports only from lower steps, of its own layer or of lower ones, also inside
# functions and for types alone. Names are relative to the package; in "storage.*" each may import the others.
LAYERS: tuple[tuple[str, ...], ...] = (
    (
        "_C _version checkpoint checkpoint.cleaning checkpoint.dcp checkpoint.format checkpoint.loading checkpoint.saving checkpoint.staging checkpoint.state errors",
        "checkpoint.dtypes checkpoint.names counts",
        "checkpoint.specs retry",
    ),
    ("build op_checks storage storage.*", "ops"),
    (
        "checkpoint.staging.copy_plan checkpoint.saving.layout checkpoint.objects checkpoint.saving.places checkpoint.stack testing testing.*",
        "checkpoint.format.records checkpoint.format.strict_json checkpoint.saving.save_plan",
        "checkpoint.saving.delta checkpoint.format.checks checkpoint.format.metadata_json checkpoint.loading.load_plan checkpoint.format.part_json checkpoint.loading.read_requests checkpoint.cleaning.retention",
        "checkpoint.arguments checkpoint.format.manifest_json checkpoint.saving.lineage checkpoint.saving.policies",
        "checkpoint.loading.chunk_needs checkpoint.manifest",
        "checkpoint.info checkpoint.loading.landings checkpoint.loading.load_verdicts checkpoint.loading.node_shares checkpoint.loading.placement",
        "checkpoint.saving.messages",
    ),
    (
        "checkpoint.catalog checkpoint.loading.chunk_reader checkpoint.saving.failures checkpoint.saving.handle checkpoint.saving.health checkpoint.locks store",
        "barrier checkpoint.cleaning.look checkpoint.listing",
        "checkpoint.saving.groups checkpoint.loading.node_memory checkpoint.loading.share_reader checkpoint.cleaning.stock membership",
        "checkpoint.state.fqns checkpoint.state.local_shard checkpoint.state.nest checkpoint.state.numpy_codecs",
        "checkpoint.state.overlaps checkpoint.state.wrappers",
        "checkpoint.state.codecs checkpoint.state.traverse",
        "checkpoint.state.stateful checkpoint.state.wanted",
        "checkpoint.door checkpoint.flatten checkpoint.state.module_target checkpoint.state.optimizer_groups",
        "checkpoint.state.optimizer_target",
        "checkpoint.loading.targets",
    ),
    (
        "checkpoint.loading.assembly checkpoint.loading.commit_choice checkpoint.staging.chunk_table checkpoint.commit checkpoint.diff checkpoint.cleaning.prune_plan checkpoint.saving.shard_file checkpoint.verify",
        "checkpoint.loading.home_reader checkpoint.staging.device checkpoint.cleaning.removal_kinds",
        "checkpoint.cleaning.removals checkpoint.loading.contents checkpoint.staging.sources",
        "checkpoint.cleaning.cleaner checkpoint.staging.device_digests",
        "checkpoint.staging.device_work",
        "checkpoint.staging.device_changes checkpoint.staging.device_copies",
        "checkpoint.staging.device_order",
        "checkpoint.staging.stager checkpoint.staging.watch",
        "checkpoint.staging.capture",
        "checkpoint.staging.lateness",
        "checkpoint.staging.staging",
    ),
    (
        "checkpoint.saving.leader checkpoint.loading.load_round checkpoint.saving.snapshot checkpoint.saving.structures",
        "checkpoint.saving.publish checkpoint.loading.load_together",
        "checkpoint.save checkpoint.restore",
        "checkpoint.dcp.contents checkpoint.dcp.foreign_header checkpoint.dcp.names_in_folder checkpoint.dcp.payloads checkpoint.dcp.sealed checkpoint.dcp.state_copy checkpoint.dcp.state_paths",
        "checkpoint.dcp.folder checkpoint.dcp.pinned_stager checkpoint.dcp.read_items checkpoint.dcp.write_items",
        "checkpoint.dcp.commit_folder checkpoint.dcp.foreign_folder checkpoint.dcp.place checkpoint.dcp.rank_files",
        "checkpoint.dcp.open_folder checkpoint.dcp.storage_writer",
        "checkpoint.dcp.storage_reader",
    ),
    ("manager rng sampler", "writer"),
    ("cli cli.* gpucheck gpucheck.* hook",),
)
GROUPS = ("storage", "testing", "cli", "gpucheck")

# Layer 2 computes: torch's types, files and clocks reach it as arguments. `testing` stands beside it, not in it.
PURE_LAYER = 2
IMPURE_IMPORTS = {
    "asyncio", "datetime", "io", "os", "pathlib", "random", "secrets", "shutil", "socket", "subprocess",
    "tempfile", "threading", "time", "torch",
}  # fmt: skip

STANDARD_HEADER = re.compile(r"[a-z_0-9]+")
POSIX_HEADERS = {
    "fcntl.h", "linux/fs.h", "pthread.h", "signal.h", "sys/file.h", "sys/mman.h", "sys/resource.h", "sys/stat.h",
    "sys/statvfs.h", "sys/syscall.h", "unistd.h",
}  # fmt: skip
INTRINSICS_HEADERS = {"arm_neon.h", "emmintrin.h", "immintrin.h"}
CUDA_HEADERS = {"cuda_runtime.h"}
# pybind11 comes with torch, and is all of torch that is included. build_info names CUDA's version.
BINDINGS_HEADER = re.compile(r"Python\.h|cxxabi\.h|unistd\.h|pybind11/[a-z_0-9/]+\.h|cuda_runtime_api\.h")


def modules() -> dict[str, Path]:
    """The modules of the package by their names relative to it; the package itself is ""."""
    base = ROOT / PACKAGE
    found = {"_C": base / "_C.pyi"}
    for path in sorted(base.rglob("*.py")):
        parts = path.relative_to(base).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports_of(path: Path) -> set[str]:
    """Every name that a file imports, wherever it does so, with the package's own name in front."""
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own_imports(name: str) -> set[str]:
    """The modules of the package that a module imports."""
    found = set()
    for target in imports_of(MODULES[name]):
        if target == PACKAGE or target.startswith(PACKAGE + "."):
            inner = target[len(PACKAGE) + 1 :]
            found.add(inner if inner in MODULES else inner.rpartition(".")[0])
    return found


def places_of(name: str) -> list[tuple[int, int]]:
    """The layers, and the steps in them, that list a module."""
    return [
        (layer, step)
        for layer, steps in enumerate(LAYERS)
        for step, entries in enumerate(steps)
        if any(fnmatchcase(name, entry) for entry in entries.split())
    ]


def group_of(name: str) -> str | None:
    top = name.partition(".")[0]
    return top if top in GROUPS else None


def reached_from(name: str) -> set[str]:
    seen: set[str] = set()
    queue = [name]
    while queue:
        module = queue.pop()
        if module not in seen:
            seen.add(module)
            queue += own_imports(module)
    return seen


def includes(path: Path) -> Iterator[tuple[str, str]]:
    for found in re.finditer(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', path.read_text(), re.MULTILINE):
        yield found.group(1), found.group(2)


def native_sources(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix in {".h", ".cpp", ".cu"})


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_every_module_has_one_place():
    assert {name: places_of(name) for name in MODULES if name and len(places_of(name)) != 1} == {}


def test_every_entry_is_in_use():
    entries = [entry for steps in LAYERS for step in steps for entry in step.split()]
    assert [entry for entry in entries if not any(fnmatchcase(name, entry) for name in MODULES)] == []


def named_by(cell: str) -> set[str]:
    """The modules that a cell of the page's table names: "`a`, `b`; `folder/` `c`, `d`", a group as "`cli/`"."""
    found = set()
    for part in cell.split(";"):
        folder = ""
        for name in re.findall(r"`([\w/]+)`", part):
            if name.endswith("/") and name[:-1] not in GROUPS:
                folder = name.replace("/", ".")
            else:
                found.add(folder + name)
    return found


def listed_in(steps: tuple[str, ...]) -> set[str]:
    """The modules of a layer as the page names them: those of a group by its folder, packages not at all."""
    modules = {
        name for name in MODULES if name and any(fnmatchcase(name, e) for step in steps for e in step.split())
    }
    alone = {name for name in modules if not group_of(name) and MODULES[name].stem != "__init__"}
    return alone | {f"{group}/" for group in map(group_of, modules) if group}


def test_the_table_of_the_page_has_each_module_in_its_layer():
    rows = re.findall(r"^\| (\d) \| (.*?) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    told = {int(layer): named_by(cell) for layer, cell in rows}
    true = {layer: listed_in(steps) for layer, steps in enumerate(LAYERS)}
    assert told.keys() == true.keys()
    missing = {layer: sorted(true[layer] - told[layer]) for layer in true if true[layer] - told[layer]}
    wrong = {layer: sorted(told[layer] - true[layer]) for layer in told if told[layer] - true[layer]}
    assert (missing, wrong) == ({}, {})


@pytest.mark.parametrize("name", [name for name in MODULES if name])
def test_a_module_imports_only_from_below(name):
    def allowed(target: str) -> bool:
        same_group = group_of(name) is not None and group_of(name) == group_of(target)
        return same_group or (bool(target) and places_of(target) < places_of(name))

    assert [target or PACKAGE for target in own_imports(name) if not allowed(target)] == []


def test_no_import_leads_back():
    graph = {name: own_imports(name) - {name} for name in MODULES if name}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a cycle of imports: {error.args[1]}")


def test_the_package_itself_loads_only_the_lowest_layer():
    body = ast.parse(MODULES[""].read_text(encoding="utf-8")).body
    loaded = {
        f"{node.module}.{alias.name}"
        for node in body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if str(node.module).startswith(PACKAGE)
    }
    assert loaded <= {f"{PACKAGE}.errors", f"{PACKAGE}._version.__version__"}
    assert not any(isinstance(node, ast.Import) and node.names[0].name == "torch" for node in body)
    (choice,) = [
        node for node in body if isinstance(node, ast.If) and ast.unparse(node.test) != "TYPE_CHECKING"
    ]
    assert ast.unparse(choice.test) == "sys.modules.get('torch') is not None"
    assert ast.unparse(choice.body) == f"importlib.import_module('{PACKAGE}.ops')" and not choice.orelse


PURE = [name for name in MODULES if [layer for layer, _ in places_of(name)] == [PURE_LAYER]]


@pytest.mark.parametrize("name", [name for name in PURE if group_of(name) != "testing"])
def test_a_pure_module_imports_nothing_of_the_world(name):
    assert {target.partition(".")[0] for target in imports_of(MODULES[name])} & IMPURE_IMPORTS == set()
    assert {
        target for target in own_imports(name) if group_of(target) == "storage" or target == "build"
    } == set()


def test_what_the_command_line_reaches_is_free_of_torch():
    reached = reached_from("cli")
    assert "manager" not in reached
    with_torch = [name for name in reached if any(re.match(r"torch\b", t) for t in imports_of(MODULES[name]))]
    assert with_torch == []


def test_the_sampler_and_the_checkpoints_meet_only_in_the_hook():
    assert not any(name.startswith("checkpoint") for name in reached_from("sampler"))
    assert [name for name in MODULES if "sampler" in own_imports(name)] in ([], ["hook"], ["", "hook"])


def test_nothing_imports_the_testing_tools():
    users = [name for name in MODULES if name and any(group_of(t) == "testing" for t in own_imports(name))]
    assert [name for name in users if group_of(name) != "testing"] == []


@pytest.mark.parametrize("path", native_sources(CORE), ids=relative)
def test_the_core_includes_only_the_core_and_the_standard_library(path):
    for mark, name in includes(path):
        if mark == '"':
            assert (path.parent / name).resolve().parent == CORE, name
        else:
            assert STANDARD_HEADER.fullmatch(name) or name in POSIX_HEADERS | INTRINSICS_HEADERS, name


@pytest.mark.parametrize("path", native_sources(CUDA), ids=relative)
def test_the_device_code_includes_the_core_and_the_cuda_runtime(path):
    for mark, name in includes(path):
        if mark == '"':
            assert (path.parent / name).resolve().parent in (CORE, CUDA), name
        else:
            assert STANDARD_HEADER.fullmatch(name) or name in CUDA_HEADERS, name


@pytest.mark.parametrize("path", native_sources(BINDINGS), ids=relative)
def test_the_bindings_include_core_cuda_and_python_but_not_torch(path):
    for mark, name in includes(path):
        if mark == '"':
            assert (path.parent / name).resolve().parent in (CORE, CUDA, BINDINGS), name
        else:
            assert STANDARD_HEADER.fullmatch(name) or BINDINGS_HEADER.fullmatch(name), name


def test_there_is_no_other_room_in_csrc():
    assert native_sources(ROOT / "csrc") == sorted(
        native_sources(BINDINGS) + native_sources(CORE) + native_sources(CUDA)
    )
    assert native_sources(CORE) and native_sources(BINDINGS)


def test_no_file_is_longer_than_can_be_read_at_a_sitting():
    # The manual of the native module is looked up, not read.
    paths = [*(path for path in MODULES.values() if path.suffix == ".py"), *native_sources(ROOT / "csrc")]
    assert {relative(path): n for path in paths if (n := path.read_text().count("\n")) > 400} == {}
