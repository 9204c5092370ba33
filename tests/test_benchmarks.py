"""Benchmarks: rows that the installed package measures, and tables made from kept results."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from backends import cuda_device_exists

import regkernels
from regkernels.bench import WORKS, frameworks
from regkernels.bench.__main__ import main

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SMALL = ["--size", "16", "16", "16", "--repeats", "1", "--device", "cpu"]


@pytest.fixture(autouse=True)
def small_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copy rates need not be true here."""
    monkeypatch.setattr(frameworks.Framework, "_large", 1 << 12)


def script(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    return importlib.import_module(name)


def without(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a package look as if it were not installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == package else find(name)
    )


def test_a_row_is_measured_in_both_frameworks(capsys: pytest.CaptureFixture[str]) -> None:
    main(["interpolate u + grad u", *SMALL, "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["about"]["shape"] == [1, 1, 16, 16, 16]
    assert result["about"]["versions"]["regkernels"] == regkernels.__version__
    assert [row["who"] for row in result["rows"]] == ["torchreg", "jaxreg"]
    for row in result["rows"]:
        assert row["ms"] > 0
        assert row["bytes"] == 52 * 16**3  # image and u twice, the result and its cotangent, grad u
        assert row["share"] == pytest.approx(row["floor_ms"] / row["ms"])


@pytest.mark.gpu
def test_a_row_is_measured_on_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    main(["compose + grad u, v", "--size", "32", "32", "32", "--device", "cuda", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert not result["about"]["card"].startswith("cpu") and result["about"]["driver"]
    assert [row["who"] for row in result["rows"]] == ["torchreg", "jaxreg"]
    for row in result["rows"]:
        assert row["ms"] > 0
        assert row["memory_mib"] >= 9 * 4 * 32**3 / 2**20  # the result and two gradients


def test_half_precision_moves_fewer_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    main(["lncc 7 + grad pred", "--framework", "torch", *SMALL, "--dtype", "float16", "--json"])
    assert json.loads(capsys.readouterr().out)["rows"][0]["bytes"] == 6 * 16**3


@pytest.mark.parametrize("shape", [(1, 1, 6, 7), (2, 1, 6, 5, 7)])
def test_every_row_can_be_called(shape: tuple[int, ...]) -> None:
    torch = frameworks.open_framework("torch", "cpu", 1)
    reg = importlib.import_module("torchreg")
    for name, work in WORKS.items():
        operands = {n: torch.put(x) for n, x in work.make(np.random.default_rng(0), shape).items()}
        forward = torch.call(
            lambda *o, work=work: work.call(reg, *o),
            work.operands,
            work.wrt,
            work.result,
            work.derivative,
            work.along,
        )
        result = forward(operands)
        if work.derivative in ("Hessian product", "double backward"):
            for of_leaves in result:
                for name_of, found in zip(work.wrt, of_leaves, strict=True):
                    assert found.shape == operands[name_of].shape, name
            continue
        value = result[0] if work.wrt else result
        if work.result:
            assert (value.shape, value.dtype) == (
                operands[work.result].shape,
                operands[work.result].dtype,
            ), name
        else:
            assert value.shape == (), name


def test_rows_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--list"])
    assert capsys.readouterr().out.splitlines() == list(WORKS)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["compse"], "did you mean 'compose'?"),
        ([], "row: expected what to measure"),
        (["compose", "--size", "3"], "size: expected Y X, Z Y X, or N C and these, got (3,)"),
        (["compose", "--device", "tpu"], "invalid choice"),
    ],
)
def test_what_cannot_be_measured_is_told(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert told in capsys.readouterr().err


@pytest.mark.skipif(cuda_device_exists(), reason="there is a CUDA device")
@pytest.mark.parametrize("built_with_cuda", [False, True])
@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_a_device_that_is_not_there_is_told(
    framework: str,
    built_with_cuda: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    architectures = ["90"] if built_with_cuda else []
    monkeypatch.setattr(frameworks._core, "cuda_architectures", lambda: architectures)
    with pytest.raises(SystemExit):
        main(["compose", "--device", "cuda", "--framework", framework])
    assert "device: expected cpu" in capsys.readouterr().err


def test_a_framework_that_is_not_installed_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without("jax", monkeypatch)
    with pytest.raises(SystemExit):
        main(["compose", "--framework", "jax"])
    assert "jax is not installed: pip install 'regkernels[jax]'" in capsys.readouterr().err
    main(["compose", *SMALL])
    assert "jaxreg " not in capsys.readouterr().out


def test_nobody_who_only_registers_loads_the_benchmarks(tmp_path: Path) -> None:
    code = (
        "import sys, regkernels; assert 'regkernels.bench' not in sys.modules;"
        "import regkernels.bench; assert not {'jax', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_results_are_kept_by_card_beside_those_of_peers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = ["--work", "compose", "interpolate affine", "--only", "torch"]
    warp = script("warp", monkeypatch, *SMALL, *where, "--output", str(tmp_path))
    monkeypatch.setattr(warp, "torch_compose", lambda *operands: operands[7])
    warp.main()
    (file,) = tmp_path.glob("cpu-*/warp.json")
    result = json.loads(file.read_text())
    assert result["about"]["benchmark"] == "warp" and result["about"]["commit"]
    assert str(tmp_path) not in file.read_text()
    ms = {(row["work"], row["who"]): row.get("ms") for row in result["rows"]}
    assert ms.keys() >= {
        ("compose", "torchreg"),
        ("interpolate affine", "torch affine_grid+sample"),
    }
    failed = [row for row in result["rows"] if "error" in row]
    assert {row["who"] for row in failed} == {"torch grid_sample + v"}
    assert "IndexError" in failed[0]["error"]
    tables = script("tables", monkeypatch)
    made, _ = tables.rewrite("<!-- table: warp-cpu -->\n<!-- /table -->", tmp_path)
    assert "| compose + grad u, v | " in made and "| failed |" in made


def test_similarity_does_without_peers_that_are_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [name for name in sys.modules if name.split(".")[0] == "monai"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "monai", None)
    file = tmp_path / "similarity.json"
    where = ["--work", "lncc 3 + grad pred", "--only", "torchreg", "MONAI", "--json", str(file)]
    script("similarity", monkeypatch, *SMALL, *where).main()
    result = json.loads(file.read_text())
    assert result["about"]["missing"] == ["MONAI"]
    assert [(row["work"], row["who"]) for row in result["rows"]] == [
        ("lncc 3 + grad pred", "torchreg")
    ]


def test_a_training_is_measured_and_makes_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "--size 32 32 32 --steps 4 --networks VoxelMorph --device cpu --only torch jaxreg"
    # In bfloat16 PyTorch's convolutions on the CPU read memory that nobody has written: the
    # gradient of a weight is another one each time, and may be NaN.
    where = ["--precisions", "float32", "--output", str(tmp_path)]
    script("training", monkeypatch, *words.split(), *where).main()
    (file,) = tmp_path.glob("cpu-*/training.json")
    rows = {row["who"]: row for row in json.loads(file.read_text())["rows"]}
    assert rows.keys() == {
        "torch convolutions",
        "torchreg",
        "torchreg checkpointed",
        "jaxreg",
    }
    same = pytest.approx(rows["torchreg"]["loss"], abs=1e-3)
    assert all(row["loss"] == same and row["ms"] > 0 for row in rows.values())
    for who in ("torchreg", "jaxreg"):
        # What is told is what an image in float32 says, and the penalty, which is small at first.
        assert rows[who]["loss"] == pytest.approx(rows[who]["lncc"], abs=1e-3)
    tables = script("tables", monkeypatch)
    made, _ = tables.rewrite("<!-- table: training-cpu -->\n<!-- /table -->", tmp_path)
    assert "| VoxelMorph, float32 | torchreg | **" in made


def test_a_network_has_the_parameters_of_the_one_that_it_is_named_after(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    networks = script("training", monkeypatch).NETWORKS
    millions = {
        name: sum(27 * i * o + o for i, o in shape.convolutions()) / 1e6
        for name, shape in networks.items()
    }
    assert millions == pytest.approx({"VoxelMorph": 0.327, "TransMorph": 46.8}, rel=0.01)


def write(folder: Path, card: str, benchmark: str, rows: list[dict[str, Any]]) -> None:
    about = {
        "benchmark": benchmark,
        "device": card.upper(),
        "driver": "580.1",
        "command": f"python benchmarks/{benchmark}.py",
        "commit": "abc",
        "date": "2026-01-02",
        "shape": [1, 1, 8, 8, 8],
        "dtype": "float32",
        "missing": [],
        "versions": {"torch": "2.11", "jax": "not installed"},
    }
    (folder / card).mkdir(exist_ok=True)
    (folder / card / f"{benchmark}.json").write_text(json.dumps({"about": about, "rows": rows}))


def test_tables_are_made_from_what_is_kept_and_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = script("tables", monkeypatch)
    rows = [
        {"work": "compose", "who": who, "ms": ms, "floor_ms": 0.08, "memory_mib": 79.2}
        for who, ms in (("torchreg", 0.1234), ("torch grid_sample + v", 12.34), ("jaxreg", 1.5))
    ]
    write(tmp_path, "nvidia-h100-80gb", "warp", rows)
    page = tmp_path / "page.md"
    page.write_text(
        "before\n<!-- table: warp-h100 -->\nold\n<!-- /table -->\n"
        "<!-- table: warp-a100 -->\nstays\n<!-- /table -->\nafter\n"
    )
    options = [str(page), "--results", str(tmp_path)]
    with pytest.raises(SystemExit, match="not up to date"):
        tables.main([*options, "--check"])
    assert "\nold\n" in page.read_text()
    tables.main(options)
    tables.main([*options, "--check"])
    lines = page.read_text().splitlines()
    assert lines[0] == "before" and lines[-1] == "after" and "stays" in lines and "old" not in lines
    assert (
        "| milliseconds of a call | floor | torchreg | jaxreg | PyTorch's own "
        "| memory of each (MiB) |"
    ) in lines
    assert "| compose | 0.080 | **0.123** | **1.50** | 12.3 | 79, 79, 79 |" in lines
    assert any("driver 580.1" in line and "PyTorch 2.11" in line for line in lines)
    write(tmp_path, "nvidia-h100-pcie", "warp", rows)
    with pytest.raises(ValueError, match="one card, got that of nvidia-h100-80gb and"):
        tables.main(options)


def test_the_tables_of_the_documentation_are_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    script("tables", monkeypatch).main(["--check"])


def test_every_kept_result_makes_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = script("tables", monkeypatch)
    for file in tables.RESULTS.glob("*/*.json"):
        result = json.loads(file.read_text())
        assert result["about"]["card"] == file.parent.name
        assert result["about"]["benchmark"] == file.stem
        assert tables.TABLES[file.stem](result).count("\n") >= 2


def test_two_runs_are_compared_whichever_names_their_rows_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old = {
        "interpolate u, + grad image, u": "interpolate u + grad image, u",
        "interpolate u, deterministic grads": "interpolate u + grad image, u, deterministic",
        "compose, + grad u, v": "compose + grad u, v",
        "LNCC box k=15 loss": "lncc 15",
        "LNCC gaussian k=7 + grad both": "lncc gaussian 7 + grad both",
        "MI gaussian 32 with background loss": "mi 32 with background",
        "MI b-spline 32 + grad pred": "mi b-spline 32 + grad pred",
    }
    assert set(old.values()) <= set(WORKS)
    files = []
    for name, works, ms in (("base", old.keys(), 1.0), ("new", old.values(), 1.2)):
        rows = [{"work": work, "who": "jaxreg", "ms": ms} for work in works]
        files.append(str(tmp_path / f"{name}.json"))
        Path(files[-1]).write_text(json.dumps({"rows": rows}))
    script("compare", monkeypatch, *files, "--slower", "30").main()
    printed = capsys.readouterr().out
    assert printed.count("1.200") == 2 * len(old) and "only in" not in printed
    with pytest.raises(SystemExit, match="slower"):
        script("compare", monkeypatch, *files, "--slower", "5").main()


def test_a_registration_that_was_written_part_by_part_is_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "old.json"
    old = {
        "register": {"total_s": 0.2, "affine": {"s": 0.1}, "correlation": [0, 1]},
        "levels": [{"stage": "affine", "scale": 4.0, "ms_per_iteration": 0.5}],
        "program": {"total_s": 0.18},
    }
    file.write_text(json.dumps(old))
    assert script("compare", monkeypatch).read_times(file) == {
        ("register", "jaxreg"): 200,
        ("one program", "jaxreg"): 180,
        ("register, affine stage", "jaxreg"): 100,
        ("iteration of affine 1/4", "jaxreg"): 0.5,
    }


def test_scaling_is_measured_on_several_devices(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--cube", "16", "--devices", "1", "2", "--only", "strong", "--stages", "greedy"]
    file = tmp_path / "scaling.json"
    script("scaling", monkeypatch, "--device", "cpu", *options, "--json", str(file)).main()
    rows = json.loads(file.read_text())["rows"]
    assert [(row["work"], row["who"]) for row in rows] == [
        ("strong, greedy", "1 devices"),
        ("strong, greedy", "2 devices"),
    ]
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], abs=1e-4)
    assert "strong, greedy, 2 devices:" in capsys.readouterr().out


def test_scaling_makes_a_table_and_a_simulation_of_more_devices(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tables = script("tables", monkeypatch)
    rows = [
        {"work": work, "who": "", "devices": n, "shape": shape, "ms": ms, "peak_gigabytes": 20.0}
        for work, n, shape, ms in [
            ("weak, greedy", 2, [1024, 512, 512], 25.0),
            ("weak, greedy", 1, [512, 512, 512], 20.0),
            ("strong, greedy", 1, [512, 512, 512], 20.0),
            ("strong, greedy", 2, [512, 512, 512], 12.5),
        ]
    ]
    write(tmp_path, "nvidia-x", "scaling", rows)
    page = (
        "<!-- table: scaling-x -->\n<!-- /table -->\n<!-- table: simulation-x -->\n<!-- /table -->"
    )
    made, without = tables.rewrite(page, tmp_path)
    assert not without
    made = made.replace("\N{MULTIPLICATION SIGN}", "x")
    assert "| weak, greedy | 2 | 1024x512x512 | 25.0 | 80 % | 20.0 |" in made
    assert "| strong, greedy | 2 | 512x512x512 | 12.5 | 80 % | 20.0 |" in made
    # 64 times the voxels on 4 devices are 16 times 25 ms, and planes of 2048² voxels take 3.5 ms.
    assert "| greedy | 2048³ | 4 | 404 | 320 |" in made


def test_the_command_is_measured_as_processes_and_makes_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = ["--work", "help", "affine", "motion", "--frames", "3"]
    words = ["--size", "24", "24", "20", "--preset", "affine", "--device", "cpu", "--repeats", "1"]
    command = [sys.executable, str(BENCHMARKS / "command.py"), *words, *work]
    subprocess.run([*command, "--output", str(tmp_path)], cwd=tmp_path, check=True)
    (file,) = tmp_path.glob("cpu-*/command.json")
    result = json.loads(file.read_text())
    assert result["about"]["shape"] == [24, 24, 20]
    rows = {(row["work"], row["who"]): row for row in result["rows"]}
    assert len(rows) == 6
    assert rows["jaxreg motion", "filled"]["stages"] > 0
    registered = rows["jaxreg register --preset affine", "filled"]
    parts = ("start", "reading", "stages", "results", "writing", "compilation")
    assert sum(registered[part] for part in parts) == pytest.approx(registered["ms"] / 1e3)
    assert (
        registered["compilation"] < rows["jaxreg register --preset affine", "empty"]["compilation"]
    )
    tables = script("tables", monkeypatch)
    made, _ = tables.rewrite("<!-- table: command-cpu -->\n<!-- /table -->", tmp_path)
    assert "| jaxreg --help | empty |" in made

    assert result["about"]["frames"] == 3
    row = rows["jaxreg motion", "filled"]
    page = "<!-- table: motion-cpu -->\n<!-- /table -->"
    made, _ = tables.rewrite(page, tmp_path)
    each = tables.number(1e3 * row["stages"] / 3)
    assert f"| filled | 3 | {row['ms'] / 1e3:.2f} | {row['stages']:.2f} | {each} |" in made
    assert "int16, 36\N{MULTIPLICATION SIGN}64\N{MULTIPLICATION SIGN}64, " in made
