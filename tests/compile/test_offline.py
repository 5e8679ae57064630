"""Every launch of the package compiles without a spill, on every architecture; a process of its own, for the
interpreter cannot compile."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("a process that interprets cannot compile", allow_module_level=True)

import triton
import triton.language as tl

from bench.offline import Case, Launch, _meta, check, compile_launch, problems, resources, tile_of, work
from peft_ops.kernels import tiles


def named(found):
    return {f"{case.name}-sm{sm}-{tile_of(launch)}".replace(" ", "_"): (case, sm, launch) for case, sm, launch in found}


# what runs on the three server chips, and on Hopper also what may be tuned to run; every chip and candidate at night
WORK = named([*work((80, 90, 100), others=False), *work((90,))])
EVERYTHING = named(work(tiles.CHIPS))
NIGHTLY = [pytest.param(name, marks=pytest.mark.nightly, id=name) for name in EVERYTHING if name not in WORK]


@pytest.fixture(scope="module")
def checked(request):
    """ptxas and nvdisasm are processes of their own, so that as many threads keep all cores busy."""
    wanted = [item.callspec.params["name"] for item in request.session.items if "checked" in item.fixturenames]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {name: pool.submit(check, *EVERYTHING[name]) for name in wanted}


@pytest.mark.parametrize("name", [*WORK, *NIGHTLY])
def test_compiles_clean(name, checked):
    r, wrong = checked[name].result()
    assert not wrong, r


@triton.jit
def spilling_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """Needs 512 values per thread twice: more than its registers hold."""
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs).to(tl.float32)
    tl.store(y_ptr + offs, x / tl.sum(x, 0))


def test_the_check_sees_a_spill():
    launch = Launch(spilling_kernel, (_meta(16384), _meta(16384)), dict(BLOCK=16384, num_warps=1))
    case = Case("spill", lambda capability: launch)
    assert any("spill" in p for p in problems(case, resources(compile_launch(launch, 90)), 90))


def test_the_check_sees_narrow_accesses():
    """A view that starts 2 bytes off an aligned address must lose the 16-byte accesses, or `wide` checks nothing."""
    from bench.offline import recorded
    from peft_ops.ops import ia3_scale

    with recorded(ia3_scale) as launches:
        ia3_scale.launch_scale(_meta(37, 4095), _meta(4, 4095), None, None)
    case = Case("narrow", lambda capability: launches[0], wide=True)
    assert problems(case, resources(compile_launch(launches[0], 90)), 90)
