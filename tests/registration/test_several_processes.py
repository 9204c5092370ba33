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

    port, count, number, lost = map(int, sys.argv[1:])
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 1)
    jax.distributed.initialize(
        f"127.0.0.1:{port}", count, number, heartbeat_timeout_seconds=10
    )

    import os
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


    def ended(progress):  # after the first stage
        if number == lost:
            os._exit(9)


    result = register(
        Volume.create(fixed), Volume.create(moving), stages, devices=jax.devices(), callback=ended
    )
    field = np.asarray(result.transform.displacement)
    print(json.dumps({"devices": len(jax.devices()), "field": field[0, ::4, ::5, ::5].tolist()}))
    """
)


def run(count: int, folder: Path, lost: int = -1) -> list[subprocess.CompletedProcess[str]]:
    """Run the program in so many processes, of which one may get lost in between."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    commands = [
        [sys.executable, "-c", PROGRAM, *map(str, (port, count, number, lost))]
        for number in range(count)
    ]
    processes = [
        subprocess.Popen(
            command,
            cwd=folder,  # beside the sources, Python would take them for the installed package
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command in commands
    ]
    try:
        told = [process.communicate(timeout=600) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *texts)
        for process, texts in zip(processes, told, strict=True)
    ]


def results(count: int, folder: Path) -> list[dict[str, object]]:
    processes = run(count, folder)
    for process in processes:
        assert process.returncode == 0, process.stderr
    return [json.loads(process.stdout.splitlines()[-1]) for process in processes]


def test_every_process_has_the_result_of_one(tmp_path: Path) -> None:
    (alone,) = results(1, tmp_path)
    for one in results(2, tmp_path):
        assert one["devices"] == 2
        np.testing.assert_allclose(one["field"], alone["field"], rtol=0, atol=1e-4)


def test_all_end_with_a_clear_error_where_one_is_lost(tmp_path: Path) -> None:
    there, lost = run(2, tmp_path, lost=1)
    assert lost.returncode == 9
    assert there.returncode != 0
    # JAX ends a process by itself where it misses another one before this one needs it.
    words = ("LostProcessError: devices: the program of 2 processes failed", "another task died")
    assert any(text in there.stderr for text in words), there.stderr
    assert "field" not in there.stdout
