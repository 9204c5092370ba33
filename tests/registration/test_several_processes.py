"""One registration by two processes, each with a device of its own, as on several hosts."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np

PROGRAM = textwrap.dedent(
    """
    import json, sys
    import jax

    port, count, number = map(int, sys.argv[1:])
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 1)
    jax.distributed.initialize(f"127.0.0.1:{port}", count, number)

    import numpy as np
    import scipy.ndimage
    from jaxreg.registration import Affine, Greedy, register
    from jaxreg.registration.stages import spread
    from regkernels import Volume

    spread.LEAST_VOXELS = 1000  # such small volumes are spread, too
    rng = np.random.default_rng(0)
    fixed = scipy.ndimage.gaussian_filter(rng.normal(size=(17, 20, 22)), 2)
    fixed = (fixed / fixed.std()).astype(np.float32)
    moving = scipy.ndimage.shift(fixed, (0.5, -0.7, 0.6), order=1, mode="nearest")
    stages = [stage(scales=(1,), iterations=(5,)) for stage in (Affine, Greedy)]
    result = register(
        Volume.create(fixed), Volume.create(moving), stages, devices=jax.devices()
    )
    field = np.asarray(result.transform.displacement)
    print(json.dumps({"devices": len(jax.devices()), "field": field[0, ::4, ::5, ::5].tolist()}))
    """
)


def results(count: int, folder: Path) -> list[dict[str, object]]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(port), str(count), str(number)],
            cwd=folder,  # beside the sources, Python would take them for the installed package
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]
    told = []
    try:
        for process in processes:
            out, errors = process.communicate(timeout=600)
            assert process.returncode == 0, errors
            told.append(json.loads(out.splitlines()[-1]))
    finally:
        for process in processes:
            process.kill()
    return told


def test_every_process_has_the_result_of_one(tmp_path: Path) -> None:
    (alone,) = results(1, tmp_path)
    for one in results(2, tmp_path):
        assert one["devices"] == 2
        np.testing.assert_allclose(one["field"], alone["field"], rtol=0, atol=1e-4)
