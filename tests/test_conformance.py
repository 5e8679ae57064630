"""What the conformance run says of PEFT's tests, on outcomes made up and on a stand-in for PEFT's sdist."""

import glob
import os

import pytest

from tests.conformance import FLOORS, Run, problems

NO_FLOORS = dict.fromkeys(FLOORS, 0)
CALLS = {"trained": 2, "PEFT": 0, "named": 3}
PLAIN = Run({"a": "passed", "b": "passed", "c": "skipped", "d": "failed"}, {"d": "E  no hub"}, CALLS | {"PEFT": 6})
OURS = PLAIN._replace(calls=CALLS | {"ia3_scale": 4, "ia3_linear": 2})
SDISTS = [os.environ["PEFT_SDIST"]] if "PEFT_SDIST" in os.environ else sorted(glob.glob("build/peft-*.tar.gz"))

# a test file of PEFT's kind: forward and gradient of an adapter, several ways to build a model, and one that is not run
TESTS = """
import copy

import datasets
import peft
import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import nn

from .testing_common import IN


def config():
    return peft.IA3Config(target_modules=["0"], feedforward_modules=[], init_ia3_weights=False)


def check(model, layer):
    x = torch.randn(3, IN)
    want = layer.base_layer(x) * layer.ia3_l["default"].flatten()
    torch.testing.assert_close(model(x), want)
    model(x).sum().backward()
    assert layer.ia3_l["default"].grad is not None


def test_ia3_model():
    model = peft.get_peft_model(nn.Sequential(nn.Linear(IN, 5)), config())
    check(copy.deepcopy(model), model.base_model.model[0]) if False else check(model, model.base_model.model[0])


def test_ia3_injected():
    model = peft.inject_adapter_in_model(config(), nn.Sequential(nn.Linear(IN, 5)))
    check(model, model[0])


def test_ia3_skipped():
    pytest.skip("not for this method")


def test_lora():
    raise AssertionError("not selected")
"""


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
    pytest.fail(found) if not __import__("re").search(said, found) else None


@pytest.mark.parametrize("what, reached", [("passed", 2), ("vectors", 6), ("trained", 2), ("named", 3)])
def test_floors(what, reached):
    assert problems(PLAIN, OURS, "names", NO_FLOORS | {what: reached}) == []
    assert problems(PLAIN, OURS, "names", NO_FLOORS | {what: reached + 1}) == [
        f"{reached} {what}, expected {reached + 1} or more"
    ]


def test_plain_is_plain():
    assert problems(OURS, OURS, "auto", NO_FLOORS) == ["plain PEFT gave our operators 6 vectors"]
