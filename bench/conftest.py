"""Options of the benchmark suite, and what its files say of the machine."""

import time

import pytest
import torch

from bench.matrix import environment, roofs

BEGIN = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="small shapes, a few milliseconds each: walks the whole path")
    parser.addoption("--no-compile", action="store_true", help="leave out torch.compile, seconds per shape")


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine_info["environment"] = environment() | {"roofs": roofs(device)}


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(output_json: dict) -> None:
    output_json["machine_info"]["environment"]["suite_seconds"] = round(time.monotonic() - BEGIN)
