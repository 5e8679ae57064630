"""What the conformance run says of PEFT's tests, on outcomes made up and on a stand-in for PEFT's sdist."""

import io
import os
import re
import tarfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.conformance import FLOORS, Run, problems
from tests.conformance.__main__ import ROOT, main, run, unpack

NO_FLOORS = dict.fromkeys(FLOORS, 0)
CALLS = {"trained": 2, "PEFT": 0, "named": 3}
PLAIN = Run({"a": "passed", "b": "passed", "c": "skipped", "d": "failed"}, {"d": "E  no hub"}, CALLS | {"PEFT": 6})
OURS = PLAIN._replace(calls=CALLS | {"ia3_scale": 4, "ia3_linear": 2})
SDISTS = [os.environ["PEFT_SDIST"]] if "PEFT_SDIST" in os.environ else [*map(str, ROOT.glob("build/peft-*.tar.gz"))]

# a test file of PEFT's kind: it imports what is not installed, and has a test that is not (IA)^3's
TESTS = """
import datasets
import peft
import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import nn

from .testing_common import IN


def check(model, layer):
    x, ia3_l = torch.randn(3, IN), layer.ia3_l["default"]
    torch.testing.assert_close(model(x), layer.base_layer(x) * ia3_l.flatten())
    model(x).sum().backward()
    assert ia3_l.grad is not None


@pytest.fixture
def config():
    return peft.IA3Config(target_modules=["0"], feedforward_modules=[], init_ia3_weights=False)


def test_ia3_model(config):
    model = peft.get_peft_model(nn.Sequential(nn.Linear(IN, 5)), config)
    check(model, model.base_model.model[0])


def test_ia3_without_a_peft_model(config):
    model = peft.inject_adapter_in_model(config, nn.Sequential(nn.Linear(IN, 5)))
    check(model, model[0])


def test_ia3_skipped():
    pytest.skip("not for this method")


def test_lora():
    raise AssertionError("not selected")
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of TESTS, from an sdist: plain, right, and wrong."""
    folder = tmp_path_factory.mktemp("conformance")
    with tarfile.open(folder / "peft-0.tar.gz", "w:gz") as tar:
        files = {"tests/test_custom_models.py": TESTS, "tests/testing_common.py": "IN = 4", "src/peft/x.py": "no test"}
        for name, text in files.items():
            member = tarfile.TarInfo(f"peft-0/{name}")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
    unpack(folder / "peft-0.tar.gz", folder)
    assert not (folder / "src").exists()
    cases = [("plain", None), ("names", None), ("auto", "gradient")]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(cases, pool.map(lambda case: run(folder, *case), cases), strict=True))


def test_right(runs):
    plain, ours = runs["plain", None], runs["names", None]
    found = {re.sub(".*::", "", test): outcome for test, outcome in plain.outcomes.items()}
    assert found == {
        "test_ia3_model": "passed",
        "test_ia3_without_a_peft_model": "passed",
        "test_ia3_skipped": "skipped",
    }
    assert plain.calls == {"trained": 0, "PEFT": 4, "named": 0}
    assert ours.calls == {"trained": 4, "PEFT": 0, "named": 2, "ia3_scale": 4}
    assert problems(plain, ours, "names", NO_FLOORS) == []


def test_wrong(runs):
    found = problems(runs["plain", None], runs["auto", "gradient"], "auto", NO_FLOORS)
    found = [problem for problem in found if "is failed here: E   RuntimeError: element 0 of tensors" in problem]
    assert [re.search("test_ia3_[a-z_]*", problem).group() for problem in found] == [
        "test_ia3_model",
        "test_ia3_without_a_peft_model",
    ]


def test_nothing_to_say():
    assert problems(PLAIN, OURS, "names", NO_FLOORS) == []


@pytest.mark.parametrize(
    "ours, said",
    [
        (OURS._replace(outcomes=OURS.outcomes | {"b": "failed"}, messages={"b": "x\nE  0 != 1"}), "b .*failed.*0 != 1"),
        (OURS._replace(outcomes=OURS.outcomes | {"b": "skipped"}), "b passes in plain PEFT and is skipped here"),
        (OURS._replace(outcomes={"a": "passed"}), "b passes in plain PEFT and is missing here"),
        (OURS._replace(outcomes=OURS.outcomes | {"e": "failed"}), "e fails and is none of plain PEFT's"),
        (OURS._replace(calls=OURS.calls | {"PEFT": 1}), "1 were multiplied by PEFT itself"),
        (OURS._replace(calls=OURS.calls | {"ia3_scale": 3}), "had 5 vectors of the 6"),
    ],
)
def test_what_a_run_can_have_against_it(ours, said):
    (found,) = problems(PLAIN, ours, "auto", NO_FLOORS)
    assert re.search(said, found), found


@pytest.mark.parametrize("what, reached", [("passed", 2), ("vectors", 6), ("trained", 2), ("named", 3)])
def test_floors(what, reached):
    assert problems(PLAIN, OURS, "names", NO_FLOORS | {what: reached}) == []
    assert problems(PLAIN, OURS, "names", NO_FLOORS | {what: reached + 1}) == [
        f"{reached} {what}, expected {reached + 1} or more"
    ]


def test_plain_is_plain():
    assert problems(OURS, OURS, "auto", NO_FLOORS) == ["plain PEFT gave our operators 6 vectors"]


def test_sdist_of_another_release(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--sdist", str(tmp_path / "peft-0.1.0.tar.gz")])
    assert "--sdist must be of the installed PEFT" in capsys.readouterr().err


@pytest.mark.nightly
@pytest.mark.skipif(not SDISTS, reason="no sdist of PEFT: make conformance, or PEFT_SDIST=")
@pytest.mark.parametrize("arguments, status", [([], 0), (["--mode", "module", "--break", "scale"], 1)])
def test_pefts_own_tests(capsys, arguments, status):
    assert main(["--sdist", SDISTS[-1], *arguments]) == status, capsys.readouterr().out
