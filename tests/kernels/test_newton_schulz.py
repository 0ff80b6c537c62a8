"""Newton-Schulz iterations in C++ against the polynomial of the singular values, in fp64."""

import pytest
import torch

from moezoo_kernels import native, product_libraries
from moezoo_kernels.newton_schulz import newton_schulz_, unusable

COEFFICIENTS = (3.4445, -4.775, 2.0315)
FLOOR = 1e-7


def run(matrices: list[torch.Tensor], steps: int = 5) -> list[torch.Tensor]:
    copies = [matrix.clone() for matrix in matrices]
    newton_schulz_(copies, COEFFICIENTS, steps, FLOOR)
    return copies


def on_singular_values(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Apply the iterations to the singular values, in fp64."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.norm(dim=-1, keepdim=True).clamp(min=FLOOR)
    for _ in range(steps):
        s = COEFFICIENTS[0] * s + COEFFICIENTS[1] * s**3 + COEFFICIENTS[2] * s**5
    return (u * s.unsqueeze(-2)) @ v


def as_published(matrix: torch.Tensor) -> torch.Tensor:
    """Iterate in fp32 with a new Gram matrix each time."""
    a, b, c = COEFFICIENTS
    x = matrix if matrix.shape[-2] <= matrix.shape[-1] else matrix.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=FLOOR)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if matrix.shape[-2] <= matrix.shape[-1] else x.mT


def of_spectrum(rows: int, columns: int, spectrum: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows + 1000 * columns)
    noise = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    u, _, v = torch.linalg.svd(noise, full_matrices=False)
    return ((u * spectrum.double()) @ v).float()


def assert_as_exact_as_published(result: torch.Tensor, matrix: torch.Tensor) -> None:
    exact = on_singular_values(matrix)
    assert (result - exact).abs().max() < 1e-5
    assert (result - as_published(matrix)).abs().max() < 1e-5
    assert (result - exact).norm() <= 1.5e-5 * exact.norm()


SHAPES = [(1, 1), (1, 9), (9, 1), (5, 7), (16, 16), (33, 31), (63, 130), (301, 65), (64, 520)]


@pytest.mark.usefixtures("native_library")
@pytest.mark.parametrize("shape", SHAPES)
def test_gaussian_matrices(shape):
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(2, *shape, generator=generator), torch.randn(*shape) * 1e4]
    for matrix, result in zip(matrices, run(matrices), strict=True):
        assert_as_exact_as_published(result, matrix)


@pytest.mark.usefixtures("native_library")
@pytest.mark.parametrize("shape", [(48, 48), (97, 40), (40, 97)])
@pytest.mark.parametrize(
    "spectrum",
    [
        torch.logspace(0, -6, 40),
        torch.logspace(0, -3, 40),
        torch.logspace(-9, -12, 40),
        (torch.arange(40) < 13).float(),
        torch.ones(40),
    ],
    ids=["condition 1e6", "condition 1e3", "tiny", "rank 13", "orthogonal"],
)
def test_ill_conditioned_matrices(shape, spectrum):
    spectrum = torch.cat([spectrum, spectrum[-1:].expand(min(shape) - 40)])
    matrix = of_spectrum(*shape, spectrum)
    assert_as_exact_as_published(run([matrix])[0], matrix)


@pytest.mark.usefixtures("native_library")
@pytest.mark.parametrize("steps", range(8))
def test_any_number_of_iterations(steps):
    matrix = of_spectrum(20, 37, torch.linspace(1, 2, 20))
    exact = on_singular_values(matrix, steps)
    torch.testing.assert_close(run([matrix], steps)[0].double(), exact, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("native_library")
def test_zeros_stay_and_nothing_is_nothing():
    matrices = [torch.zeros(3, 5, 4), torch.zeros(0, 5, 4), torch.zeros(0, 4), torch.zeros(4, 0)]
    for matrix, result in zip(matrices, run(matrices), strict=True):
        assert torch.equal(matrix, result)
    newton_schulz_([], COEFFICIENTS, 5, FLOOR)


@pytest.mark.usefixtures("native_library")
def test_what_is_not_finite_shows():
    matrix = torch.ones(6, 8)
    matrix[2, 3] = torch.nan
    assert run([matrix])[0].isnan().all()
    matrix[2, 3] = torch.inf
    assert run([matrix])[0].isnan().any()


@pytest.mark.usefixtures("native_library")
def test_bits_depend_neither_on_threads_nor_on_company():
    generator = torch.Generator().manual_seed(0)
    stack = torch.randn(7, 40, 70, generator=generator)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        together = run([stack, torch.randn(70, 40)])[0]
    finally:
        torch.set_num_threads(threads)
    for matrix, result in zip(stack, together, strict=True):
        assert torch.equal(run([matrix])[0], result)


def test_large_nearly_square_matrices(native_library, monkeypatch):
    monkeypatch.setattr(product_libraries, "onednn_is_faster", lambda: True)
    if native_library != "avx512":
        pytest.skip("left to torch's products")
    matrix = torch.randn(530, 571, generator=torch.Generator().manual_seed(0))
    exact = on_singular_values(matrix)
    assert (run([matrix])[0] - exact).norm() <= 1.5e-5 * exact.norm()


def test_where_it_runs(native_library, monkeypatch):
    assert unusable(torch.empty(8, 512, 512)) is None
    assert unusable(torch.empty(640, 1280)) is None
    monkeypatch.setattr(product_libraries, "onednn_is_faster", lambda: False)
    assert "nearly square" in str(unusable(torch.empty(640, 1279)))
    monkeypatch.setattr(product_libraries, "onednn_is_faster", lambda: True)
    assert (unusable(torch.empty(640, 1279)) is None) is (native_library == "avx512")
    assert "fp32" in str(unusable(torch.empty(4, 4, dtype=torch.float64)))
    assert "CPU" in str(unusable(torch.empty(4, 4, device="meta")))


def test_without_a_library_it_says_why(monkeypatch):
    monkeypatch.setattr(native, "load", lambda: "not built")
    assert unusable(torch.empty(4, 4)) == "not built"
