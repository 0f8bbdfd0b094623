"""That the stand-in for a GPU (tests/standin) is as strict as one: otherwise nothing that passes on it says anything."""

import os
import threading

from helpers import run_python
import pytest
import torch

pytestmark = pytest.mark.skipif("BNB_STANDIN_DEVICE" not in os.environ, reason="make test-standin runs tests on it")


def test_memory_is_closed_to_the_host():
    """A kernel of the CPU that is handed an address on the device ends the process, instead of computing something."""
    done = run_python(
        "import ctypes, torch; x = torch.ones(4, device='cuda'); torch.cuda.synchronize(); ctypes.string_at(x.data_ptr(), 4); print('read')"
    )
    assert done.returncode == -11 and "read" not in done.stdout


@pytest.mark.parametrize(
    "mix",
    [
        lambda here, there: here + there,
        lambda here, there: there + here,
        lambda here, there: here @ there,
        lambda here, there: torch.cat((here, there)),
        lambda here, there: here.add_(there),
        lambda here, there: torch.where(here > 0, here, there),
        lambda here, there: torch.nn.functional.linear(here, there),
        lambda here, there: there[here.long()],
    ],
)
@pytest.mark.parametrize("elsewhere", ["cpu", "cuda:1"])
def test_tensors_of_two_devices_do_not_mix(mix, elsewhere):
    with pytest.raises(RuntimeError, match="device"):
        mix(torch.ones(4, 4), torch.ones(4, 4, device=elsewhere))


def test_what_a_gpu_takes_from_the_host_is_taken():
    x, scalar = torch.arange(4.0), torch.tensor(2.0, device="cpu")
    assert (x * scalar).device == x.device and (scalar * x).tolist() == [0, 2, 4, 6]
    assert x[torch.tensor([1, 2], device="cpu")].tolist() == [1, 2]
    x[torch.tensor([0], device="cpu")] = 7
    assert x.tolist() == [7, 1, 2, 3]
    assert torch.equal(x.to("cuda:1").to("cpu"), x.cpu())


def test_views_share_memory_and_results_do_not():
    x = torch.arange(12.0).view(3, 4)
    for view in (x.t(), x[1:], x.unbind()[2], x.view(torch.int32), x.as_strided((2,), (1,)), x.detach(), x.diagonal(), x.unfold(0, 2, 1)):
        assert view.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() and view.is_cuda
    x.t()[0, 0] = 5
    assert x[0, 0] == 5
    for result in (x + 0, x.clone(), x.contiguous().sum(0), torch.stack((x, x))):
        assert result.untyped_storage().data_ptr() != x.untyped_storage().data_ptr() and result.is_cuda


def test_results_grow_to_what_is_needed():
    out = torch.empty(0)
    torch.cat((torch.ones(1000), torch.zeros(1000)), out=out)
    assert out.shape == (2000,) and out.sum() == 1000 and out.is_cuda
    storage = torch.empty(8).untyped_storage()
    assert torch.empty(0).set_(storage, 0, (8,)).numel() == 8


def test_memory_is_counted_and_ends():
    before = torch.cuda.memory_allocated()
    x = torch.empty(1 << 20, dtype=torch.uint8)
    assert torch.cuda.memory_allocated() == before + (1 << 20) and torch.cuda.max_memory_allocated() >= before + (1 << 20)
    del x
    assert torch.cuda.memory_allocated() == before
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(9 << 30, dtype=torch.uint8)


def test_freed_memory_is_not_what_it_was():
    x = torch.zeros(1000)
    place = x.data_ptr()
    del x
    y = torch.empty(1000)
    assert y.data_ptr() != place or y.isnan().all()


def test_gradients_are_computed_on_a_thread_of_the_device():
    seen = []

    class Asks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            seen.append((threading.get_ident(), torch.cuda.current_device()))
            return grad * 2

    x = torch.ones(3, device="cuda:1", requires_grad=True)
    Asks.apply(x).sum().backward()
    assert x.grad.tolist() == [2, 2, 2] and seen[0][0] != threading.get_ident() and seen[0][1] == 1
