"""What the package offers: names, documentation, and imports that point one way."""

import ast
import graphlib
import importlib
import importlib.util
import inspect
import itertools
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import stampworker

PACKAGE = Path(stampworker.__file__).parent
ROOMS = (  # a module imports from rooms above its own; within a row, none knows another
    ("errors",),
    ("cutouts",),
    ("config",),
    ("frames", "formats"),
    ("resolve", "viewer"),
    ("enrich",),
    ("stream",),
    ("simulation",),
    ("cli",),
)
LEVEL = {name: level for level, names in enumerate(ROOMS) for name in names}
MODULES = sorted(
    name
    for _, name, _ in pkgutil.walk_packages([str(PACKAGE)], "stampworker.")
    if not name.rpartition(".")[2].startswith("_")
)
MOST_LINES = {"function": 50, "class": 300, "file": 600}  # of a function, those of its body without its docstring
SOURCES = sorted(path for path in PACKAGE.rglob("*") if path.suffix in (".py", ".c", ".h"))
SECTIONS = ("Parameters", "Returns", "Yields", "Raises", "Attributes", "Notes", "References", "Examples", "See Also")


def imported(path):
    """Yield the modules of the package that a file imports, those for annotations alone included."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = (
                [str(node.module)] if node.module != "stampworker" else [f"stampworker.{a.name}" for a in node.names]
            )
        for name in names:
            if name.startswith("stampworker."):
                yield name


def public():
    """Yield every public function, class and method of the package with its name."""
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        for name, found in vars(module).items():
            if name.startswith("_") or getattr(found, "__module__", None) != module_name:
                continue
            if inspect.isfunction(found) or inspect.isclass(found):
                yield f"{module_name}.{name}", found
            if inspect.isclass(found):
                for member, value in vars(found).items():
                    value = getattr(value, "__func__", value)
                    if not member.startswith("_") and inspect.isfunction(value):
                        yield f"{module_name}.{name}.{member}", value


PUBLIC = dict(public())


def definitions(path):
    """Yield the module, the classes and the functions of a Python file, each with its docstring."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node, ast.get_docstring(node)


def too_long(path):
    """Yield what is longer than `MOST_LINES` in a file, with the number of its lines."""
    lines = len(path.read_text(encoding="utf-8").splitlines())
    if lines > MOST_LINES["file"]:
        yield f"file of {lines} lines"
    for node, doc in definitions(path) if path.suffix == ".py" else ():
        if isinstance(node, ast.Module):
            continue
        kind = "class" if isinstance(node, ast.ClassDef) else "function"
        first = node if kind == "class" else node.body[min(doc is not None, len(node.body) - 1)]
        lines = node.end_lineno - first.lineno + 1
        if lines > MOST_LINES[kind]:
            yield f"{kind} {node.name} of {lines} lines"


def bare_entries(doc):
    """Return the entries of a docstring's sections that no indented line describes."""
    found = []
    for title in ("Parameters", "Returns", "Yields", "Raises", "Attributes"):
        lines = [line for line in (section(doc, title) or "").splitlines() if line]
        for line, following in itertools.pairwise([*lines, ""]):
            if not line.startswith(" ") and not following.startswith(" "):
                found.append(f"{title}: {line}")
    return found


def section(doc, title):
    """Return the text of a section of a numpydoc docstring."""
    found = re.search(rf"^{title}\n-+\n(.*?)(?=^\S[^\n]*\n-{{3,}}\n|\Z)", doc, re.MULTILINE | re.DOTALL)
    return found[1] if found else None


def described(text):
    """Return the names that a section describes."""
    heads = [line.partition(" : ")[0] for line in text.splitlines() if line and not line.startswith(" ")]
    return {name.strip().lstrip("*") for head in heads for name in head.split(",")}


def test_all_is_sorted_and_there():
    """Every public name can be imported and is documented; nothing is named twice."""
    assert stampworker.__all__ == sorted(set(stampworker.__all__))
    for name in stampworker.__all__:
        assert inspect.getdoc(getattr(stampworker, name)), name
    assert {"Alert", "Packet", "FrameStore", "Settings", "Worker", "enrich_table", "Enricher"} <= set(
        stampworker.__all__
    )


def test_every_error_is_public():
    """Every error that a caller may catch can be imported from the top."""
    errors = {name for name, value in vars(stampworker.errors).items() if inspect.isclass(value)}
    assert errors <= set(stampworker.__all__)
    assert all(issubclass(getattr(stampworker, name), stampworker.StampworkerError) for name in errors)


@pytest.mark.slow
def test_version_is_the_distributions():
    """The version has one source."""
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", stampworker.__version__)
    run = subprocess.run([sys.executable, "-m", "stampworker", "--version"], capture_output=True, text=True, check=True)
    core = "numpy" if importlib.util.find_spec("stampworker.cutouts._adjust") is None else "c"
    assert run.stdout == f"stampworker {stampworker.__version__} (fit: {core} core)\n"
    assert run.stderr == ""


def test_cutouts_has_the_functions_of_the_reference():
    """The seven functions, with the reference's arguments in its order."""
    wanted = {
        "crop_image_centered": "data, x0, y0, r0, header",
        "crop_image": "data, x1, y1, width, height, header",
        "get_cutout": "image, candidate, radius, header, wcs, time, filename, name, kwargs",
        "write_cutout": "cutout, filename",
        "load_cutout": "filename",
        "adjust_cutout": "cutout, max_shift, max_scale, inner, normalize, fit_bg, verbose",
        "downscale_image": "image, scale, mode, header",
    }
    for name, arguments in wanted.items():
        function = getattr(stampworker.cutouts, name)
        assert ", ".join(inspect.signature(function).parameters) == arguments
        assert name in stampworker.cutouts.__all__


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    """A module imports only from rooms above its own, and never the package as a whole but at the top."""
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own in ("__init__", "__main__"):
        return
    assert own in LEVEL, f"{own} is in no room"
    for other in {name.split(".")[1] for name in imported(path)} - {own}:
        assert other in LEVEL, f"{path}: imports {other}, which is in no room"
        assert LEVEL[other] < LEVEL[own], f"{path}: {own} imports {other}"


def test_no_modules_import_each_other():
    """There is no circle of imports, not even one for annotations alone."""
    known = {
        ".".join(("stampworker", *path.relative_to(PACKAGE).with_suffix("").parts)) for path in PACKAGE.rglob("*.py")
    }
    graph = {}
    for name in known:
        path = PACKAGE.parent / (name.replace(".", "/") + ".py")
        # The package itself, at the top of a room, gathers what the room offers.
        graph[name] = {other for other in imported(path) if other in known and not name.endswith("__init__")}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


@pytest.mark.slow
def test_package_is_light_to_import():
    """Pictures, STDPipe and the tests' tools are not loaded with the package."""
    code = "import sys, stampworker, stampworker.cli; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"matplotlib", "stdpipe", "pytest", "hypothesis"} & set(loaded)


@pytest.mark.parametrize("name", PUBLIC)
def test_docstrings_say_what_comes_out(name):
    """Every public function and class has a summary that ends in a stop, and well-formed sections."""
    doc = inspect.getdoc(PUBLIC[name])
    assert doc, name
    summary = doc.partition("\n\n")[0]
    assert summary.rstrip().endswith((".", ":", "?")), summary
    for title, rule in re.findall(r"^(\w[\w ]*)\n(-{3,})$", doc, re.MULTILINE):
        assert title in SECTIONS, title
        assert len(rule) == len(title), title


@pytest.mark.parametrize("name", [name for name, value in PUBLIC.items() if inspect.isfunction(value)])
def test_parameters_that_are_described_exist(name):
    """Where a docstring has parameters they are the function's own, all of them."""
    doc = inspect.getdoc(PUBLIC[name]) or ""
    text = section(doc, "Parameters")
    if text is None:
        return
    own = {parameter for parameter in inspect.signature(PUBLIC[name]).parameters if parameter not in ("self", "cls")}
    assert described(text) == own


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_is_too_long_to_read(path):
    """No function, class or file is longer than a reader can hold in mind."""
    assert not list(too_long(path))


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_entry_of_a_docstring_is_without_words(path):
    """What a docstring lists it describes: each parameter, result, error and attribute."""
    bare = {getattr(node, "name", "module"): bare_entries(doc) for node, doc in definitions(path) if doc}
    assert not {name: entries for name, entries in bare.items() if entries}


@pytest.mark.parametrize("name", ["adjust_cutout", "crop_image", "enrich_table", "get_cutout", "is_artefact"])
def test_what_is_called_first_has_an_example(name):
    """Whoever starts with Python finds an example, which is run as a test, in these docstrings."""
    functions = {path.rpartition(".")[2]: function for path, function in PUBLIC.items()}
    assert ">>> " in (section(inspect.getdoc(functions[name]), "Examples") or "")


@pytest.mark.parametrize("name", stampworker.__all__)
def test_what_is_public_at_the_top_is_documented_in_full(name):
    """A function says what it takes, gives and raises; a class what it holds or is made of."""
    found = getattr(stampworker, name)
    doc = inspect.getdoc(found)
    if inspect.isfunction(found):
        assert section(doc, "Parameters")
        assert section(doc, "Returns")
    elif not issubclass(found, Exception) and name != "Settings":
        assert section(doc, "Attributes") or section(doc, "Parameters")
