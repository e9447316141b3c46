"""The same training on a CUDA device as on the CPU; skipped where there is none."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from subspan.nn import quantize_weights
from subspan.optim import create_optimizer, list_methods, method_info

pytestmark = pytest.mark.gpu


def trained(method: str, device: str, dtype: torch.dtype, steps: int = 12) -> tuple[nn.Module, dict[str, int]]:
    """Twelve steps over two refreshes on gradients that were made on the CPU."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 256), nn.Linear(256, 96), nn.Linear(96, 96)).to(device, dtype)
    settings = {"rank": 16} if method_info(method).size == "rank" else {}
    gap = {} if method_info(method).size is None else {"update_proj_gap": 5}
    optimizer = create_optimizer(method, model, lr=1e-2, weight_decay=0.1, **settings, **gap)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(device, dtype)
        optimizer.step()
    assert optimizer.planned_state_bytes() == optimizer.state_bytes()
    return model.cpu(), optimizer.state_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("method", list_methods())
def test_a_cuda_device_trains_as_the_cpu(method: str, dtype: torch.dtype) -> None:
    on_cpu, cpu_bytes = trained(method, "cpu", dtype)
    on_cuda, cuda_bytes = trained(method, "cuda", dtype)
    assert cpu_bytes == cuda_bytes
    tolerance = 1e-3 if dtype == torch.float32 else 5e-2
    for one, other in zip(on_cpu.parameters(), on_cuda.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


@pytest.mark.parametrize("method", ["galore", "q_galore", "q_apollo", "q_apollo_mini"])
def test_weights_in_int8_are_rounded_as_on_the_cpu(method: str) -> None:
    """The random numbers are the same; sums in another order put a few elements on the other side of a bound."""
    found = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(128, 256), nn.Linear(256, 128))
        quantize_weights(model)
        model.to(device)
        optimizer = create_optimizer(method, model, rank=16, lr=1e-2, rounding="stochastic")
        generator = torch.Generator().manual_seed(1)
        for _ in range(6):
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(device)
            optimizer.step()
        found.append([layer.weight.detach().dense().cpu() for layer in model])
    for one, other in zip(*found, strict=True):
        assert ((one - other).abs() > 1e-4).float().mean() < 0.05
        assert (one - other).abs().max() < 0.1 * one.abs().max()


@pytest.mark.parametrize("method", list_methods())
def test_host_scalars_stay_on_the_host(method: str) -> None:
    model = nn.Linear(64, 128).cuda()
    settings = {"rank": 16} if method_info(method).size == "rank" else {}
    optimizer = create_optimizer(method, model, lr=1e-2, **settings)
    model(torch.randn(8, 64, device="cuda")).square().mean().backward()
    optimizer.step()
    for parameter, state in optimizer.state.items():
        for key, spec in optimizer.declared_state(parameter).items():
            assert state[key].device.type == ("cpu" if spec.host else "cuda"), key
