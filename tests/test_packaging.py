"""What an install holds: sdist, wheel, editable, checkout; without a compiler; beside another package named kernels."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import peft_ops
from tests.test_architecture import ROOT, STEMS, tree

COMPILER = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")
OURS = ("PEFT_OPS_", "PYTHONPATH", "TRITON_INTERPRET")
KERNEL_FILES = {f"peft_ops/kernels/{stem}.py" for stem in STEMS}
IMPORT_KERNEL = "import peft_ops.kernels.ia3_scale as k; print(k.ia3_scale_fwd_kernel.__module__, k.__file__)"


def run(command: list, cwd: Path, **env: str) -> str:
    """Standard output and error of a process that inherits none of this package's switches."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
    clean |= {"PEFT_OPS_SKIP_CUDA_BUILD": "1", "PIP_NO_INDEX": "1", "HF_HUB_OFFLINE": "1", **env}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=clean, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}"
    return done.stdout


def python(code: str, cwd: Path, *path: Path) -> str:
    return run([sys.executable, "-c", code], cwd, PYTHONPATH=os.pathsep.join(map(str, path)))


def build(hook: str, folder: Path, out: Path, **env: str) -> tuple[Path, str]:
    """Run a hook of the build backend, as pip does without isolation. Returns what it made, and what it said."""
    code = f"import sys; from setuptools import build_meta; print(build_meta.{hook}(sys.argv[1]), end='')"
    said = run([sys.executable, "-c", code, out], folder, **env)
    return out / said.splitlines()[-1], said


def names(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The tree as a commit would hold it, outside the checkout and without anything built."""
    folder = tmp_path_factory.mktemp("source")
    for path in tree():
        target = folder / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    return folder


@pytest.fixture(scope="module")
def sdist(source, tmp_path_factory):
    """An sdist, unpacked."""
    out = tmp_path_factory.mktemp("sdist")
    archive, _ = build("build_sdist", source, out)
    with tarfile.open(archive) as tar:
        tar.extractall(out, filter="data")
    return out / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """The wheel that pip makes of the sdist: a file that the sdist forgot is missing here."""
    out = tmp_path_factory.mktemp("wheel")
    run([sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-w", out], sdist)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    """The wheel, unpacked."""
    folder = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


@pytest.fixture(scope="module")
def metadata(site):
    return (site / f"peft_ops-{peft_ops.__version__}.dist-info" / "METADATA").read_text()


def test_sdist_contents(sdist):
    packed = {str(path.relative_to(sdist)) for path in sdist.rglob("*") if path.is_file()}
    wanted = {str(path.relative_to(ROOT)) for path in tree()}
    wanted = {name for name in wanted if name.startswith(("csrc/", "kernels/", "peft_ops/"))}
    wanted |= {"LICENSE", "README.md", "pyproject.toml", "setup.py"}
    assert not wanted - packed
    assert not [name for name in packed if name.endswith(".so")]


def test_wheel_contents(wheel):
    packed = names(wheel)
    assert KERNEL_FILES <= packed
    tops = {name.split("/")[0] for name in packed}
    assert tops == {"peft_ops", f"peft_ops-{peft_ops.__version__}.dist-info"}
    libraries = [name for name in packed if name.endswith(".so")]
    assert all(re.fullmatch(r"peft_ops/_C[^/]*\.so", name) for name in libraries)
    assert bool(libraries) == bool(COMPILER), f"compiler {COMPILER}, libraries {libraries}"


def requirements(metadata: str) -> list[str]:
    return re.findall(r"^Requires-Dist: (.*)$", metadata, re.M)


def test_metadata(metadata):
    assert f"\nVersion: {peft_ops.__version__}\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    always = [line for line in requirements(metadata) if "extra ==" not in line]
    assert always == ["torch>=2.11", 'triton>=3.6; platform_system == "Linux"']


def test_pins_agree(metadata):
    def name(requirement):
        return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")

    pins = [line for line in (ROOT / "constraints-dev.txt").read_text().splitlines() if line and line[0] != "#"]
    assert "torch>=2.11,<2.14" in pins
    missing = {name(line) for line in requirements(metadata)} - {name(line) for line in pins} - {"peft-ops"}
    assert not missing, f"constraints-dev.txt lacks {missing}"
    (ruff,) = (line for line in pins if name(line) == "ruff")
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert set(re.findall(r"ruff==[\d.]+", hooks)) == {ruff}


def test_wheel_runs_elsewhere(site, tmp_path):
    code = IMPORT_KERNEL + "; from peft_ops._library import has_native; print('native', has_native())"
    assert python(code, tmp_path, site).splitlines()[-2:] == [
        f"peft_ops.kernels.ia3_scale {site}/peft_ops/kernels/ia3_scale.py",
        f"native {bool(COMPILER)}",
    ]


def test_editable_install(source, tmp_path):
    folder = shutil.copytree(source, tmp_path / "checkout")
    wheel, _ = build("build_editable", folder, tmp_path, PEFT_OPS_SKIP_BUILD="1")
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    # as an installed .pth file is run; the finder of this environment's own editable install is taken out first
    code = f"""
import site, sys
sys.meta_path[:] = [f for f in sys.meta_path if "__editable__" not in getattr(f, "__module__", "")]
site.addsitedir({str(site)!r})
{IMPORT_KERNEL}"""
    printed = python(code, tmp_path, site)
    assert printed.splitlines()[-1] == f"peft_ops.kernels.ia3_scale {folder}/kernels/ia3_scale.py"


@pytest.mark.parametrize("where", ["cwd", "path"])
def test_checkout_beside_transformers(where, tmp_path):
    # transformers asks whether a package named kernels is there; our folder of that name must not be the answer
    pytest.importorskip("transformers")
    code = f"import transformers.modeling_utils; {IMPORT_KERNEL}"
    printed = python(code, ROOT) if where == "cwd" else python(code, tmp_path, ROOT)
    assert printed.splitlines()[-1] == f"peft_ops.kernels.ia3_scale {ROOT}/kernels/ia3_scale.py"


@pytest.mark.parametrize("where", ["cwd", "path"])
def test_a_package_named_kernels_answers_for_itself(where, tmp_path):
    package = tmp_path / "site" / "kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    # the checkout comes first on sys.path both times: a folder without __init__.py gives way to a package
    code = f"import importlib; print(importlib.import_module('kernels').__file__); {IMPORT_KERNEL}"
    path = [tmp_path / "site"] if where == "cwd" else [ROOT, tmp_path / "site"]
    printed = python(code, ROOT if where == "cwd" else tmp_path, *path)
    assert printed.splitlines()[-2:] == [
        str(package / "__init__.py"),
        f"peft_ops.kernels.ia3_scale {ROOT}/kernels/ia3_scale.py",
    ]


@pytest.mark.parametrize(
    ("env", "says"),
    [
        pytest.param({"CC": "/bin/false", "CXX": "/bin/false"}, "_C left out", id="compiler-fails"),
        pytest.param({"PATH": "/nonexistent"}, "pure Python, no C++ compiler", id="no-compiler"),
        pytest.param({"PEFT_OPS_SKIP_BUILD": "1"}, "pure Python, PEFT_OPS_SKIP_BUILD", id="PEFT_OPS_SKIP_BUILD"),
    ],
)
def test_install_without_the_library_is_pure_python_and_says_so(env, says, source, tmp_path):
    wheel, said = build("build_wheel", shutil.copytree(source, tmp_path / "tree"), tmp_path, **env)
    assert KERNEL_FILES <= names(wheel)
    assert not [name for name in names(wheel) if name.endswith(".so")]
    assert says in said, said
