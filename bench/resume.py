"""A pytest plugin for runs that may be cut short or lose the GPU: what passed is not run again, and one bad kernel
fails one test.

    python -m pytest -p bench.resume --journal FILE tests
"""

import shutil
from pathlib import Path

import pytest
import torch

from bench.harness import Journal, is_lost, leave, watched

KEY = pytest.StashKey[tuple[Journal, float | None]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--journal", type=Path, required=True, help="what became of each test is kept there")
    parser.addoption("--limit", type=float, help="seconds, after which one test ends its process")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[KEY] = Journal(config.getoption("journal")), config.getoption("limit")


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    if not hasattr(session.config, "workerinput"):  # xdist's workers, late ones too, must all leave out the same
        journal = session.config.getoption("journal")
        journal.touch()
        shutil.copy(journal, before(journal))


def before(journal: Path) -> Path:
    return journal.with_suffix(".before")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    known = Journal(before(config.getoption("journal")))
    done = known.right()
    spent = {item.nodeid for item in items if known.is_spent(item.nodeid)} - done
    for name in sorted(spent):
        print(f"left out, {known.ended.get(name, 'it never ended')} in {known.begun[name]} tries: {name}")
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done | spent])
    items[:] = [item for item in items if item.nodeid not in done | spent]
    items.sort(key=lambda item: known.begun[item.nodeid])  # what was tried comes last


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None):
    journal, limit = item.config.stash[KEY]
    failed = item.session.testsfailed
    journal.write("begun", item.nodeid)
    try:
        with watched(item.nodeid, limit):
            result = yield
    except KeyboardInterrupt:
        journal.write("stopped", item.nodeid)
        raise
    journal.write("right" if item.session.testsfailed == failed else "failed", item.nodeid)
    return result


@pytest.hookimpl(trylast=True)  # after xdist has told its controller
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed and torch.cuda.is_initialized() and is_lost(torch.device("cuda")):
        leave(f"{report.nodeid} took the GPU context with it")
