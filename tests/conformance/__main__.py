"""PEFT's own (IA)^3 tests on plain PEFT and with our operators in its layers, compared test by test.

    python -m tests.conformance --sdist peft-0.21.2.tar.gz
    python -m tests.conformance --sdist peft-0.21.2.tar.gz --break scale   # must fail

The tests are read from PEFT's sdist, which has to be of the release that is installed. Nothing is downloaded: models
are tiny random ones of the same classes. Exits with 1 if a test fails that passes in plain PEFT, if PEFT multiplies a
vector itself, or if fewer tests or calls ran than the release has.
"""

import argparse
import os
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.conformance import BREAKS, MODES, Run, hub, problems

ROOT = Path(__file__).resolve().parents[2]
# the test files of PEFT that have (IA)^3 tests and need neither a GPU nor a download
FILES = (
    "custom_models", "decoder_models", "encoder_decoder_models", "seq_classifier", "feature_extraction_models",
    "token_classification_qa", "config", "low_level_api",
)  # fmt: skip
SHOWN = 20  # problems of one run


def unpack(sdist: Path, folder: Path) -> None:
    """PEFT's tests as the package peft_tests: the name that they have is that of ours."""
    with tarfile.open(sdist) as tar:
        for member in tar.getmembers():
            parts = Path(member.name).parts
            if parts[1:2] == ("tests",) and member.isfile():
                member.name = str(Path("peft_tests", *parts[2:]))
                tar.extract(member, folder, filter="data")
    (folder / "peft_tests" / "__init__.py").touch()
    (folder / "pytest.ini").write_text("[pytest]\n")  # and not a configuration further up


def run(folder: Path, mode: str, broken: str | None = None) -> Run:
    """Run the tests in a process of their own."""
    tally = folder / f"{mode}-{broken}.json"
    files = [f"peft_tests/test_{name}.py" for name in FILES if (folder / f"peft_tests/test_{name}.py").exists()]
    command = [sys.executable, "-m", "pytest", "-p", "tests.conformance.plugin", "-p", "no:cacheprovider", "-k", "ia3"]
    command += ["--quiet", "--tb=short", "--mode", mode, "--tally", str(tally), *files]
    command += ["--break", broken] if broken else []
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1):  # 1: some tests failed
        raise RuntimeError(f"pytest --mode {mode} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")
    return Run.read(tally)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__.partition("\n")[0])
    parser.add_argument("--sdist", type=Path, required=True, help="peft-VERSION.tar.gz")
    parser.add_argument("--mode", action="append", choices=MODES[1:], help="only this one; may be repeated")
    parser.add_argument("--break", dest="broken", choices=BREAKS, help="make the operators wrong in one way")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args(argv)
    if args.sdist.name != (name := f"peft-{version('peft')}.tar.gz"):
        parser.error(f"--sdist must be of the installed PEFT, {name}, got {args.sdist.name}")
    modes = ("plain", *(args.mode or MODES[1:]))
    with TemporaryDirectory() as folder:
        folder = Path(folder)
        unpack(args.sdist, folder)
        hub.write(folder)
        with ThreadPoolExecutor(args.jobs) as pool:
            runs = dict(zip(modes, pool.map(lambda mode: run(folder, mode, args.broken), modes), strict=True))
    failed = False
    for mode, ours in runs.items():
        counts = ", ".join(f"{len(ours.having(outcome))} {outcome}" for outcome in ("passed", "failed", "skipped"))
        calls = ", ".join(f"{name} {n}" for name, n in ours.calls.items() if n)
        print(f"{mode}: {counts}; {ours.vectors} vectors through our operators ({calls})")
        found = problems(runs["plain"], ours, mode) if mode != "plain" else []
        failed |= bool(found)
        for problem in found[:SHOWN]:
            print(f"  {problem}")
        if len(found) > SHOWN:
            print(f"  and {len(found) - SHOWN} more")
    for test in runs["plain"].having("failed"):
        print(f"not judged, fails in plain PEFT: {test}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
