"""How fast the kernels are on this machine: ``python -m regkernels.bench "interpolate u"``.

`works` says what is measured, `frameworks` how it is timed in either framework, and `machine` on
what. The benchmarks of the checkout, which add what one would otherwise use, measure with them too.
"""

from regkernels.bench.frameworks import FRAMEWORKS, SETS, Framework, Measured, open_framework
from regkernels.bench.machine import describe_machine
from regkernels.bench.works import WORKS, Work, find_work

__all__ = [
    "FRAMEWORKS",
    "SETS",
    "WORKS",
    "Framework",
    "Measured",
    "Work",
    "describe_machine",
    "find_work",
    "open_framework",
]
