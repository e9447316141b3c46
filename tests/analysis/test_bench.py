from __future__ import annotations

import csv
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor

from subspan.analysis.bench import bench_subspace
from subspan.analysis.finders import fixed_rank_finders, peers
from subspan.analysis.matrices import SPECTRA, sigma, synthetic_matrices, with_spectrum
from subspan.analysis.subspace_bench import MatrixResult, Measurement, measure_matrix
from subspan.analysis.timing import CUDA, PROCESS, THREAD, WALL, Clock, clock_for, in_units
from subspan.linalg import exact_basis

EXACT = ("exact SVD", "eigh of Gram", "torch.linalg.svd")


def bench(folder: Path, *sizes: str, **settings: object) -> tuple[list[MatrixResult], str]:
    """Results on tiny matrices, and what was printed."""
    console = Console(width=100, record=True, quiet=False, file=(folder / "printed").open("w"))
    results = bench_subspace(sizes, **{"rounds": 1, "output": folder / "out", "console": console} | settings)  # type: ignore[arg-type]
    return results, console.export_text()


@pytest.fixture
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what takes most of the time of a tiny measurement."""
    monkeypatch.setattr("subspan.analysis.bench.write_picture", lambda results, path: False)


def by_name(result: MatrixResult) -> dict[str, Measurement]:
    return {method.method: method for method in result.methods}


def without(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    for package in packages:
        for module in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, package, None)


def measure(A: Tensor, rank: int, **settings: object) -> MatrixResult:
    return measure_matrix("a", A, rank, **{"clock": PROCESS, "rounds": 1} | settings)  # type: ignore[arg-type]


def test_what_is_measured_and_what_is_written(tmp_path: Path, no_picture: None) -> None:
    results, printed = bench(tmp_path, "48x64", "64x40", spectra=("pow 1/2", "exp"))
    assert [result.matrix for result in results] == ["48x64 pow 1/2", "48x64 exp", "64x40 pow 1/2", "64x40 exp"]
    for result in results:
        assert result.shape is not None
        k = min(result.shape)
        assert result.rank == k // 4
        values = sigma(result.matrix.partition(" ")[2], k)
        assert result.optimum == pytest.approx((values[: k // 4].norm() / values.norm()).item(), abs=1e-6)
        methods = by_name(result)
        assert len(methods) == 25
        for method in methods.values():
            if method.reason is not None:
                assert method.units is None and method.energy is None
                assert method.reason == "not installed", method
                continue
            assert method.units and method.units > 0 and method.milliseconds and method.calls == 1
            assert method.energy is not None and 0 < method.energy <= 1 + 1e-5
            assert method.orthogonality is not None and method.orthogonality < 1e-5
            if method.method.startswith("adaptive"):
                # A tolerance in the Frobenius norm, except for that of "vector", which is above the spectral one.
                lost = math.sqrt(max(1 - (method.captured or 0) ** 2, 0))
                assert lost <= (result.rtol or 0) * (1.5 if method.method == "adaptive, householder_left" else 1.001)
            else:
                assert method.rank == k // 4
        for name in EXACT:
            assert methods[name].energy == pytest.approx(1, abs=1e-5)
        assert methods["one power iteration"].energy > methods["sketch, QR"].energy  # type: ignore[operator]
        assert result.matrix in printed

    record = json.loads((tmp_path / "out" / "subspace.json").read_text())
    assert record["benchmark"] == "subspace"
    assert record["clock"] in (PROCESS.description, WALL.description)
    assert record["settings"]["sizes"] == ["48x64", "64x40"]
    assert record["versions"]["torch"] == torch.__version__
    assert [matrix["matrix"] for matrix in record["matrices"]] == [result.matrix for result in results]
    exact = next(m for m in record["matrices"][0]["methods"] if m["method"] == "exact SVD")
    assert exact["energy"] == by_name(results[0])["exact SVD"].energy
    rows = list(csv.DictReader((tmp_path / "out" / "subspace.csv").open()))
    assert len(rows) == sum(len(result.methods) for result in results)
    assert rows[0]["matrix"] == "48x64 pow 1/2" and (rows[0]["m"], rows[0]["n"]) == ("48", "64")
    assert float(rows[0]["units"]) == results[0].methods[0].units
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_threads_and_random_numbers_are_as_before(tmp_path: Path, no_picture: None) -> None:
    before = torch.get_num_threads(), torch.get_rng_state()
    results, printed = bench(tmp_path, "16x16", spectra=["exp"], threads=2)
    assert torch.get_num_threads() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert WALL.description in printed
    again, _ = bench(tmp_path, "16x16", spectra=["exp"])
    lowrank = "torch.svd_lowrank niter=0"
    assert by_name(results[0])[lowrank].energy == pytest.approx(by_name(again[0])[lowrank].energy)


def test_gradients_of_a_file(tmp_path: Path, no_picture: None) -> None:
    tall = torch.randn(60, 24)
    tensors = {
        "h.10.w": tall,
        "h.2.w": tall.bfloat16(),
        "bias": torch.randn(8),
        "tokens": torch.ones(4, 4, dtype=torch.int64),
        "zero": torch.zeros(5, 6),
        "empty": torch.zeros(0, 6),
        "hot": torch.full((8, 8), 1e300, dtype=torch.float64),
        "thin": torch.randn(3, 20),
    }
    save_file(tensors, tmp_path / "gradients.safetensors")
    results, printed = bench(tmp_path, gradients=tmp_path / "gradients.safetensors", rank=6)
    found = {result.matrix: result for result in results}
    assert [result.matrix for result in results if result.reason is None] == ["h.2.w", "h.10.w"]
    assert found["h.10.w"].shape == (24, 60)
    values = torch.linalg.svdvals(tall.double())
    assert found["h.10.w"].optimum == pytest.approx((values[:6].norm() / values.norm()).item(), abs=1e-6)
    for name, reason in {
        "bias": "its shape is (8,)",
        "tokens": "its dtype is int64",
        "zero": "it is zero",
        "empty": "it is empty",
        "hot": "NaN or infinity",
        "thin": "rank 6 is more than the 3 directions of a 3x20 matrix",
    }.items():
        assert reason in (found[name].reason or "")
        assert f"{name}: not measured" in printed
    rows = list(csv.DictReader((tmp_path / "out" / "subspace.csv").open()))
    assert [row["reason"] for row in rows if row["matrix"] == "zero"] == ["it is zero, any basis is right"]


def test_without_other_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "sklearn", "scipy", "matplotlib", "threadpoolctl")
    results, printed = bench(tmp_path, "20x24", spectra=["exp"])
    reasons = {method.method: method.reason for method in results[0].methods if method.reason}
    assert set(reasons) == {"scipy svds", "scipy interpolative", "sklearn n_iter=1, p=0", "sklearn defaults"}
    assert set(reasons.values()) == {"not installed"}
    assert "scipy svds: not installed" in printed
    assert "No picture" in printed and "pip install 'subspan[report]'" in printed
    assert not (tmp_path / "out" / "subspace.png").exists()
    assert (tmp_path / "out" / "subspace.csv").exists()


def test_scipy_agrees() -> None:
    pytest.importorskip("scipy")
    A = with_spectrum(sigma("pow 1", 24), 24, 40)
    svds = peers(A, 6)["scipy svds"]
    assert callable(svds)
    Q = exact_basis(A, 6).basis
    assert torch.linalg.matrix_norm(Q.mT @ svds()) == pytest.approx(math.sqrt(6), rel=1e-5)


def test_sklearn_is_measured() -> None:
    pytest.importorskip("sklearn")
    methods = by_name(measure(with_spectrum(sigma("pow 1/2", 24), 24, 40), 6))
    assert 0.9 < (methods["sklearn defaults"].energy or 0) <= 1 + 1e-5


def test_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    _, printed = bench(tmp_path, "16x24", spectra=["pow-1", "zero"])
    assert "subspace.png" in printed
    data = (tmp_path / "out" / "subspace.png").read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) > 10_000


def test_nothing_to_draw(tmp_path: Path) -> None:
    _, printed = bench(tmp_path, "16x24", spectra=["zero"])
    assert "16x24 zero: not measured, it is zero" in printed
    assert not (tmp_path / "out" / "subspace.png").exists()


def test_a_tolerance_below_rounding_is_a_reason() -> None:
    methods = by_name(measure(with_spectrum(sigma("rank 4", 20), 20, 20), 4))
    assert "below the rounding" in (methods["adaptive, sketch"].reason or "")
    assert methods["exact SVD"].energy == pytest.approx(1, abs=1e-5)
    assert "below the rounding" in (by_name(measure(torch.eye(6), 6))["adaptive, vector"].reason or "")


def test_a_method_that_fails_or_returns_nonsense_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Tensor:
        raise torch.linalg.LinAlgError("did not converge\nin 30 iterations")

    def with_broken(A: Tensor, rank: int) -> dict[str, object]:
        nonsense = {"broken": broken, "NaN": lambda: torch.full((12, 2), math.nan)}
        return {**fixed_rank_finders(A, rank), **nonsense}

    monkeypatch.setattr("subspan.analysis.subspace_bench.fixed_rank_finders", with_broken)
    methods = by_name(measure(torch.randn(12, 14), 2))
    assert methods["broken"].reason == "LinAlgError: did not converge"
    assert methods["NaN"].reason == "the basis holds NaN or infinity"
    assert methods["exact SVD"].reason is None


def test_what_would_take_too_long_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[int, ...]] = []

    def slow(A: Tensor, rank: int) -> dict[str, object]:
        def finder() -> Tensor:
            called.append((*A.shape, rank))
            return exact_basis(A, rank).basis

        return {"slow": finder}

    def seconds(function: object) -> tuple[float, object]:
        return 1.0, function()  # type: ignore[operator]

    monkeypatch.setattr("subspan.analysis.subspace_bench._CORNER", {"cpu": 10})
    monkeypatch.setattr("subspan.analysis.subspace_bench.peers", slow)
    clock = Clock("a second a call", seconds)
    A = torch.randn(40, 60)
    reason = by_name(measure(A, 8, clock=clock, longest=63.0))["slow"].reason
    assert reason == "would take about 64 s, more than 63 s"
    assert set(called) == {(10, 15, 2)}
    assert by_name(measure(A, 8, clock=clock, longest=65.0))["slow"].reason is None
    assert (40, 60, 8) in called


def test_slow_methods_are_called_once() -> None:
    calls: list[str] = []
    before: list[str] = []

    def seconds(function: object) -> tuple[float, object]:
        result = function()  # type: ignore[operator]
        return {"slow": 5.0, "fast": 0.5}.get(result, 0.25), result  # type: ignore[call-overload]

    methods = {name: lambda name=name: calls.append(name) or name for name in ("slow", "fast")}
    timings = in_units(methods, lambda: "unit", 3, clock=Clock("set", seconds), once_above=1.0, before=before.append)
    assert calls == before == ["slow", "fast", "fast", "fast", "fast"]
    assert timings["slow"].units == [20.0] and timings["fast"].units == [2.0, 2.0, 2.0]
    assert timings["fast"].seconds == [0.5] * 3


def test_clocks() -> None:
    assert clock_for(torch.device("cuda"), 1) is CUDA
    assert clock_for(torch.device("cpu"), 4) is WALL
    for clock in (THREAD, PROCESS, WALL):
        seconds, result = clock.seconds(lambda: sum(range(10**5)))
        assert seconds > 0 and result == sum(range(10**5))


@pytest.mark.parametrize("name", SPECTRA)
def test_spectra(name: str) -> None:
    values = sigma(name, 12)
    assert values.dtype == torch.float64 and values.shape == (12,)
    assert (values.diff() <= 0).all() and (values >= 0).all()
    torch.testing.assert_close(
        torch.linalg.svdvals(synthetic_matrices([(12, 20)], [name])[0].load()).double(), values, atol=3e-6, rtol=0
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sizes": ["12"]}, "size '12' is not MxN"),
        ({"sizes": ["12x"]}, "size '12x' is not MxN"),
        ({"sizes": ["0x5"]}, "size '0x5' is not MxN"),
        ({"sizes": ["-3x5"]}, "size '-3x5' is not MxN"),
        ({"rank": 17}, "rank 17 is more than the 16 directions of a 16x24 matrix"),
        ({"rank": 0}, "rank is 0; it must be at least 1"),
        ({"rank_share": 0.0}, "rank_share is 0.0"),
        ({"rank_share": 1.5}, "rank_share is 1.5"),
        ({"rank_share": math.nan}, "rank_share is nan"),
        ({"rounds": 0}, "rounds is 0"),
        ({"threads": 0}, "threads is 0"),
        ({"longest": 0.0}, "longest is 0.0"),
        ({"device": "tpu"}, "device 'tpu' is unknown"),
        ({"device": "cuda:99"}, "device 'cuda:99' is not available"),
        ({"spectra": ["steep"]}, "spectrum 'steep' is unknown; choose from pow-1/2"),
        ({"sizes": []}, "there is no matrix to measure"),
    ],
)
def test_bad_input(tmp_path: Path, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match="^" + message.replace("(", r"\(")):
        bench_subspace(**{"sizes": ["16x24"], "output": tmp_path / "out"} | settings)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        bench_subspace(gradients=tmp_path / "none.safetensors")
    save_file({"w": torch.randn(30, 30)}, tmp_path / "whole.safetensors")
    data = (tmp_path / "whole.safetensors").read_bytes()
    for name, content in {"cut": data[:-100], "header": data[:20], "other": b"PK\x03\x04" * 50, "empty": b""}.items():
        file = tmp_path / f"{name}.safetensors"
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}.safetensors' is not a whole safetensors file"):
            bench_subspace(gradients=file, output=tmp_path / "out")
    save_file({}, tmp_path / "nothing.safetensors")
    with pytest.raises(ValueError, match="holds no tensor"):
        bench_subspace(gradients=tmp_path / "nothing.safetensors", output=tmp_path / "out")
    (tmp_path / "gradients.pt").write_bytes(b"PK")
    with pytest.raises(ValueError, match="is a pickle, which is never opened"):
        bench_subspace(gradients=tmp_path / "gradients.pt", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="cannot be written to"):
        bench_subspace(["4x4"], output=tmp_path / "gradients.pt" / "below")
    with pytest.raises(ValueError, match="cannot be written to"):
        bench_subspace(["4x4"], output=tmp_path / "gradients.pt")


@pytest.mark.gpu
def test_on_a_device(tmp_path: Path) -> None:
    results, printed = bench(tmp_path, "64x96", spectra=["pow 1/2"], device="cuda")
    methods = by_name(results[0])
    assert CUDA.description in printed
    assert methods["scipy svds"].reason in ("runs on the CPU only", "not installed")
    assert methods["exact SVD"].energy == pytest.approx(1, abs=1e-5)
    assert all(method.units for method in methods.values() if method.reason is None)
