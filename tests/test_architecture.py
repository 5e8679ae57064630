"""The shape of the tree: one stem per operator in every folder, imports one way, and what no file may contain."""

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import peft_ops
import peft_ops.reference

ROOT = Path(__file__).resolve().parent.parent
STEMS = {
    "ia3_glu",
    "ia3_kv_linear",
    "ia3_linear",
    "ia3_scale",
    "prompt_concat",
    "prompt_concat_packed",
    "prompt_embed",
    "task_plan",
}
SHARED_KERNEL_FILES = {"device", "dual", "tiles"}  # what several operators launch or call, and launch parameters

SOURCES = {".py", ".cpp", ".cu", ".h", ".cuh"}

# layer -> (what of peft_ops it may import, what it may import from elsewhere, what only inside a function)
LAYERS = {
    "kernels": ({"kernels"}, {"triton"}, set()),
    "peft_ops/reference.py": (set(), {"torch"}, set()),
    "peft_ops/kernels.py": (set(), set(), set()),
    "peft_ops/_backend.py": (set(), {"torch"}, {"triton"}),
    "peft_ops/_launch.py": (set(), {"torch"}, {"triton"}),
    "peft_ops/_library.py": ({"_backend", "_native_rule"}, {"torch"}, set()),
    "peft_ops/_checks.py": ({"_backend", "_library", "reference"}, {"torch"}, set()),
    "peft_ops/_native_rule.py": (set(), {"torch"}, set()),
    "peft_ops/ops": (
        {"kernels", "ops", "reference", "_backend", "_checks", "_launch", "_library", "_native_rule"},
        {"torch"},
        {"triton"},
    ),
    "peft_ops/nn": ({"nn", "ops", "reference", "_checks", "_library"}, {"torch"}, set()),
    "peft_ops/integrations": (
        {"integrations", "nn", "ops", "reference", "_backend", "_checks"},
        {"torch"},
        {"peft", "safetensors", "transformers"},
    ),
}
OUTSIDE = ("peft_ops/demo", "bench", "tests")  # these import the package, never the other way round


def tree() -> list[Path]:
    """Every file that is, or would be, under version control."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):  # an unpacked sdist
        folders = ("kernels", "peft_ops", "csrc", "bench", "tests")
        return sorted(path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in SOURCES)
    return sorted(path for name in listed.split("\0") if name and (path := ROOT / name).is_file())


FILES = tree()
MODULES = {path: ast.parse(path.read_text(), str(path)) for path in FILES if path.suffix == ".py"}
TEXTS = {path: path.read_text() for path in FILES if b"\0" not in path.read_bytes()}


def place(path: Path, line: int = 1) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def under(*folders: str) -> dict[Path, ast.Module]:
    """The modules in folders, or files, given relative to the root."""
    tops = [ROOT / folder for folder in folders]
    return {path: module for path, module in MODULES.items() if any(path.is_relative_to(top) for top in tops)}


def stems(folder: str) -> set[str]:
    return {path.stem for path in under(folder) if path.parent == ROOT / folder and path.stem != "__init__"}


def imports(module: ast.Module) -> Iterator[tuple[str, int, bool]]:
    """Dotted name, line, and whether it stands inside a function, of everything that a module imports."""
    inside = {id(n) for f in ast.walk(module) if isinstance(f, ast.FunctionDef) for n in ast.walk(f) if n is not f}
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno, id(node) in inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield from ((f"{base}.{alias.name}", node.lineno, id(node) in inside) for alias in node.names)


def lines_matching(pattern: str, suffixes: set[str] | None = None) -> list[str]:
    found = re.compile(pattern)
    return [
        f"{place(path, number)}: {line.strip()[:100]}"
        for path, text in TEXTS.items()
        if suffixes is None or path.suffix in suffixes
        for number, line in enumerate(text.splitlines(), 1)
        if found.search(line)
    ]


def assert_none(problems: list[str]) -> None:
    if problems:
        pytest.fail("\n".join(problems), pytrace=False)


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_run_one_way(layer):
    internal, anywhere, in_functions = LAYERS[layer]
    problems = []
    for path, module in under(layer).items():
        for name, line, inside in imports(module):
            top, _, rest = name.partition(".")
            if top == "peft_ops":
                allowed = rest.split(".")[0] in internal
            elif top in sys.stdlib_module_names:
                allowed = True
            else:  # a relative import has no top: absolute names are the rule
                allowed = top in anywhere or (inside and top in in_functions)
            if not allowed:
                where = " here (inside a function it may)" if top in in_functions else ""
                problems.append(f"{place(path, line)}: {layer} may not import {name}{where}")
    assert_none(problems)


def test_every_module_of_the_package_has_a_layer():
    layered = {*under(*LAYERS), *under(*OUTSIDE, "peft_ops/__init__.py", "peft_ops/info.py")}
    assert_none([f"{place(path)}: add it to LAYERS" for path in under("peft_ops", "kernels") if path not in layered])


def test_nothing_in_the_package_imports_what_stands_outside():
    outside = re.compile(r"(peft_ops\.demo|bench|tests)(\.|$)")
    package = set(under("peft_ops", "kernels")) - set(under("peft_ops/demo"))
    assert_none(
        [
            f"{place(path, line)}: imports {name}"
            for path in sorted(package)
            for name, line, _ in imports(MODULES[path])
            if outside.match(name)
        ]
    )


@pytest.mark.parametrize("folder", ["kernels", "peft_ops/ops", "tests"])
def test_stems_are_the_same_in_every_folder(folder):
    prefix = "test_" if folder == "tests" else ""
    found = {stem.removeprefix(prefix) for stem in stems(folder)}
    missing = sorted(STEMS - found)
    extra = [] if folder == "tests" else sorted(found - STEMS - (SHARED_KERNEL_FILES if folder == "kernels" else set()))
    problems = [f"{folder}/{prefix}{stem}.py:1: missing" for stem in missing]
    assert_none(problems + [f"{folder}/{stem}.py:1: not an operator's stem; add it to STEMS" for stem in extra])


def test_kernels_is_not_a_package():
    # with an __init__.py it would answer for the package that transformers looks for under that name
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert_none(
        [
            f"{place(path, line)}: import peft_ops.kernels instead of {name}"
            for path, module in MODULES.items()
            for name, line, _ in imports(module)
            if name.split(".")[0] == "kernels"
        ]
    )


def test_no_block_pointers():
    assert_none(lines_matching(r"make_block_pt[r]", {".py"}))


def test_operators_launch_through_launch():
    assert_none([line for line in lines_matching(r"_kernel\[", {".py"}) if line.startswith("peft_ops/ops/")])


def test_no_bare_asserts():
    package = set(under("peft_ops", "kernels")) - set(under("peft_ops/demo"))
    assert_none(
        [
            f"{place(path, node.lineno)}: assert without a message; raise ValueError or TypeError for user input"
            for path in sorted(package)
            for node in ast.walk(MODULES[path])
            if isinstance(node, ast.Assert) and node.msg is None
        ]
    )


def test_docstrings():
    problems = [
        f"{place(path)}: module docstring missing"
        for path, module in MODULES.items()
        if module.body and not ast.get_docstring(module)
    ]
    for path, module in under("kernels").items():
        for node in ast.walk(module):
            if isinstance(node, ast.FunctionDef) and is_kernel(node) and not ast.get_docstring(node):
                problems.append(f"{place(path, node.lineno)}: kernel {node.name} has no docstring")
    assert_none(problems)


def is_kernel(function: ast.FunctionDef) -> bool:
    """A Triton function that is launched, told from a device function by its name or by asking for its program id."""
    jitted = any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)
    return jitted and (function.name.endswith("_kernel") or "program_id" in ast.unparse(function))


def public_operators() -> dict[str, object]:
    exported = {name: getattr(peft_ops, name) for name in dir(peft_ops) if not name.startswith("_")}
    return {
        name: value
        for name, value in exported.items()
        if inspect.isfunction(value) and value.__module__.startswith("peft_ops.ops.")
    }


def test_public_operators_are_found():
    assert public_operators().keys() >= {"ia3_scale", "ia3_linear", "prompt_concat", "plan_tasks"}


@pytest.mark.parametrize("name", public_operators())
def test_reference_has_the_same_signature(name):
    def parameters(function):
        return [(p.name, p.kind.description, p.default) for p in inspect.signature(function).parameters.values()]

    operator, reference = getattr(peft_ops, name), getattr(peft_ops.reference, name, None)
    where = place(Path(inspect.getsourcefile(operator)), inspect.getsourcelines(operator)[1])
    assert reference, f"{where}: peft_ops/reference.py has no {name}"
    assert parameters(operator) == parameters(reference), f"{where}: {name} and its reference differ"


def test_nothing_of_one_machine_in_the_tree():
    # folders of one machine, hosts that belong in pip's configuration; [x] keeps the patterns from matching themselves
    assert_none(lines_matching(r"/(wor[k]|roo[t]|hom[e]|User[s])/|bash_job[s]"))
    assert_none(lines_matching(r"pypi\.or[g]|pythonhoste[d]|download\.pytorc[h]"))


def test_text_files_are_clean():
    problems = lines_matching(r"[ \t]+$|\r") + lines_matching(r"\t", SOURCES)
    problems += [f"{place(path)}: no newline at the end" for path, text in TEXTS.items() if text and text[-1] != "\n"]
    assert_none(problems)
