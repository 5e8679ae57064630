"""Every launch of the package compiles for sm_80, sm_90 and sm_100 without a spill; its own process, for the
interpreter cannot compile."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("a process that interprets cannot compile", allow_module_level=True)

import triton
import triton.language as tl

from bench.offline import ARCHITECTURES, Case, Launch, _meta, cases, compile_launch, problems, resources

CASES = [(case, capability) for case in cases() for capability in ARCHITECTURES]


@pytest.fixture(scope="module")
def measured():
    """Recording is not thread-safe and takes no time; ptxas and nvdisasm are processes of their own, so two threads
    keep two cores busy."""
    launches = [case.record(capability) for case, capability in CASES]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = [
            pool.submit(lambda a: resources(compile_launch(*a)), (launch, c))
            for launch, (_, c) in zip(launches, CASES, strict=True)
        ]
        return {(case.name, c): future for (case, c), future in zip(CASES, futures, strict=True)}


@pytest.mark.parametrize(
    ("case", "capability"), CASES, ids=[f"{case.name}-sm{c}".replace(" ", "_") for case, c in CASES]
)
def test_compiles_clean(case, capability, measured):
    r = measured[case.name, capability].result()
    assert not problems(case, r, capability), r


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
