"""PEFT's own (IA)^3 tests with our operators in its layers: `python -m tests.conformance --sdist SDIST`."""

import json
from pathlib import Path
from typing import NamedTuple

MODES = ("plain", "module", "auto", "names")
# what each does to the vectors that an operator is given
BREAKS = {"scale": lambda ia3_l: ia3_l * 1.001, "gradient": lambda ia3_l: ia3_l.detach()}
# what a run of the release whose tests these are has at least: a selection that lost its tests is no success
FLOORS = {"passed": 1500, "vectors": 6000, "trained": 2000, "named": 1000}


class Run(NamedTuple):
    """What one run of the tests found.

    Attributes:
        outcomes: passed, failed or skipped, by test.
        messages: of the tests that failed.
        calls: how many vectors operators were given, "vectors", by operator; of those, "trained" with gradients; how
            many vectors "PEFT" multiplied by itself; and how many calls of a model "named" their adapter.
    """

    outcomes: dict[str, str]
    messages: dict[str, str]
    calls: dict[str, int]

    @staticmethod
    def read(path: Path) -> "Run":
        return Run(**json.loads(path.read_text()))

    def having(self, outcome: str) -> list[str]:
        return [test for test, found in self.outcomes.items() if found == outcome]

    @property
    def vectors(self) -> int:
        return sum(n for name, n in self.calls.items() if name not in ("trained", "PEFT", "named"))


def problems(plain: Run, ours: Run, mode: str, floors: dict[str, int] = FLOORS) -> list[str]:
    """What a run with our operators has against it, next to a run without; empty if nothing."""
    passed = plain.having("passed")
    found = [
        f"{test} passes in plain PEFT and is {ours.outcomes.get(test, 'missing')} here: {_last_line(ours, test)}"
        for test in passed
        if ours.outcomes.get(test) != "passed"
    ]
    new = [test for test in ours.having("failed") if test not in plain.outcomes]
    found += [f"{test} fails and is none of plain PEFT's tests: {_last_line(ours, test)}" for test in new]
    if plain.vectors:
        found.append(f"plain PEFT gave our operators {plain.vectors} vectors")
    if ours.calls["PEFT"] or ours.vectors < plain.calls["PEFT"]:
        found.append(
            f"operators had {ours.vectors} vectors of the {plain.calls['PEFT']} that plain PEFT multiplies; "
            f"{ours.calls['PEFT']} were multiplied by PEFT itself"
        )
    reached = {"passed": len(passed), "vectors": ours.vectors, "trained": ours.calls["trained"]}
    reached |= {"named": ours.calls["named"]} if mode == "names" else {}
    found += [f"{n} {what}, expected {floors[what]} or more" for what, n in reached.items() if n < floors[what]]
    return found


def _last_line(run: Run, test: str) -> str:
    return run.messages.get(test, "").strip().rpartition("\n")[2]
