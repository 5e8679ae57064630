"""The door to the Triton kernels: `peft_ops.kernels.X` is `kernels/X.py`, in a checkout and in a wheel alike."""

from pathlib import Path

_packaged = Path(__file__).with_name("kernels")
__path__ = [str(_packaged if _packaged.is_dir() else Path(__file__).parent.parent / "kernels")]
