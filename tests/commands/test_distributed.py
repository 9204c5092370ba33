"""``jaxreg register --distributed``: several processes, started as srun starts them."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from scenes import header, physical_grid, scene

from regkernels import read_transform, read_volume, write_volume

PROGRAM = textwrap.dedent(
    """
    import functools, os, signal, sys
    import jax
    from jaxreg.registration import running
    from jaxreg.registration.stages import spread
    from jaxreg_cli.running import main

    spread.LEAST_VOXELS = 1000  # such small volumes are spread, too
    lost, how, *arguments = sys.argv[1:]
    if lost != "none":
        initialize = functools.partial(jax.distributed.initialize, heartbeat_timeout_seconds=10)
        jax.distributed.initialize = initialize
    if lost == os.environ["SLURM_PROCID"]:
        run = running.SeveralDevices.run

        def run_or_end(work, stage, *rest):
            if stage.name == "greedy":
                os.kill(os.getpid(), getattr(signal, how))
            return run(work, stage, *rest)

        running.SeveralDevices.run = run_or_end
    main(arguments)
    """
)
"""The command, of which one process may be lost when the second stage begins."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    grid = header((13, 16, 18), (2.5, 2.5, 2.5))
    for name, shift in (("fixed", 0.0), ("moving", 2.0)):
        image = scene(physical_grid(grid) + shift).astype(np.float32)
        write_volume(grid.with_array(image), folder / f"{name}.nii.gz")
    return folder


def job_with_a_free_port() -> int:
    """JAX takes the port of a job from its number."""
    for job in range(os.getpid(), os.getpid() + 1000):
        with socket.socket() as tried:
            if tried.connect_ex(("localhost", job % 2**12 + 65536 - 2**12)) != 0:
                return job
    raise RuntimeError("no port is free")


def run(
    folder: Path, count: int, *arguments: str, lost: int | None = None, how: str = ""
) -> list[subprocess.CompletedProcess[str]]:
    job = job_with_a_free_port()
    command = [sys.executable, "-c", PROGRAM, "none" if lost is None else str(lost), how]
    command += ["register", "fixed.nii.gz", "moving.nii.gz"]
    command += ["--stages", "translation,greedy", "--preset", "fast", *arguments]
    processes = [
        subprocess.Popen(
            command,
            cwd=folder,
            env={
                **os.environ,
                "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
                "SLURM_JOB_ID": str(job),
                "SLURM_STEP_NODELIST": "localhost",
                "SLURM_STEP_NUM_NODES": "1",
                "SLURM_NTASKS": str(count),
                "SLURM_PROCID": str(number),
                "SLURM_LOCALID": str(number),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]
    try:
        told = []
        for process in processes:
            told.append(process.communicate(timeout=600))
            if lost is not None:  # one that only stopped would never end
                processes[lost].kill()
    finally:
        for process in processes:
            process.kill()
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *texts)
        for process, texts in zip(processes, told, strict=True)
    ]


def test_several_processes_write_what_one_does(folder: Path) -> None:
    first, second = run(folder, 2, "--distributed", "-o", "several", "--report", "--composite")
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert "2 of CPU, with some planes on each" in first.stdout
    assert re.search(r"greedy: 1/\d resolution on 2 devices, ", first.stdout)
    record = json.loads((folder / "several" / "registration.json").read_text())
    assert record["stages"][-1]["levels"][-1]["devices"] == 2
    # The library that CPUs talk through says by itself that it is connected.
    assert all(line.startswith("[Gloo]") for line in second.stdout.splitlines())
    (alone,) = run(folder, 1, "-o", "alone", "--report", "--composite")
    assert alone.returncode == 0, alone.stderr
    names = [{path.name for path in (folder / out).iterdir()} for out in ("several", "alone")]
    assert names[0] == names[1]
    one, other = (read_volume(folder / out / "moved.nii.gz").array for out in ("several", "alone"))
    np.testing.assert_allclose(one, other, atol=1e-3 * np.ptp(other))
    (there,), (here,) = (
        read_transform(folder / out / "warp.nii.gz") for out in ("several", "alone")
    )
    np.testing.assert_allclose(there.vectors, here.vectors, atol=5e-3)


@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP"])
def test_a_lost_process_ends_the_one_that_writes_and_leaves_no_file(folder: Path, how: str) -> None:
    """Whether its connection is closed, or it merely does not answer any more."""
    before = {path.name for path in folder.iterdir()}
    output = f"out-{how}"
    first, second = run(folder, 2, "--distributed", "-o", output, lost=1, how=how)
    assert first.returncode != 0
    assert second.returncode != 0
    words = (
        "jaxreg: error: --distributed: devices: the program of 2 processes failed",
        "stopped sending heartbeats",  # JAX, which ends the process by itself
    )
    assert any(text in first.stderr for text in words), first.stderr
    assert "Traceback" not in first.stderr
    end = time.monotonic() + 60
    while {path.name for path in folder.iterdir()} != before and time.monotonic() < end:
        time.sleep(0.1)
    assert {path.name for path in folder.iterdir()} == before


def test_a_process_that_was_started_alone_says_so(folder: Path) -> None:
    command = [sys.executable, "-m", "jaxreg", "register", "fixed.nii.gz", "moving.nii.gz"]
    done = subprocess.run(
        [*command, "-o", "out", "--distributed"],
        cwd=folder,
        env={k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "OMPI"))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "--distributed: expected to be started by srun, mpirun" in done.stderr
    assert not (folder / "out").exists()
