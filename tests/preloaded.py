"""What the process has imported that `forked.py` forks others from."""

import contextlib
import gc

import tiny  # noqa: F401

import spec_kd
from spec_kd.cli import curated, init, logs, run, synthesize  # noqa: F401

for name in spec_kd.__all__:
    getattr(spec_kd, name)
with contextlib.suppress(ImportError):
    import openai  # noqa: F401
with contextlib.suppress(ImportError):
    import torchao  # noqa: F401  (of PEFT, when it makes an adapter)
gc.freeze()
