"""Checks are spared for tensors that look like others which passed, and for no others."""

import pytest
import torch

from bitsandbytes import check_memo, functional, optim
from bitsandbytes.check_memo import once_for_alike

COUNT = 40  # parameters: 240 tensors with their gradients and 8-bit moments


def trained(elements=5000, dtype=torch.float32):
    params = [torch.nn.Parameter(torch.randn(elements, dtype=dtype)) for _ in range(COUNT)]
    optimizer = optim.AdamW8bit(params)
    for _ in range(3):
        step(optimizer)
    return optimizer


def step(optimizer):
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.randn_like(p)
    optimizer.step()


def shrink(tensor):
    tensor.data = tensor.data[:100].clone()


def shrink_in_place(tensor):
    tensor.resize_(100)


def retype(tensor):
    tensor.data = tensor.data.to(torch.int32)


@pytest.mark.parametrize("spoil", [shrink, shrink_in_place, retype])
@pytest.mark.parametrize("key", ["state1", "state2", "absmax1", "absmax2"])
def test_a_state_that_changed_since_is_refused(key, spoil):
    optimizer = trained(elements=50_000)
    state = optimizer.state[optimizer.param_groups[0]["params"][COUNT // 2]]
    with torch.no_grad():
        spoil(state[key])
    with pytest.raises(RuntimeError, match="must (have|be)"):
        step(optimizer)


def test_a_gradient_that_changed_since_is_refused():
    optimizer = trained()
    params = optimizer.param_groups[0]["params"]
    params[7].grad.data = params[7].grad.data[:-1]
    with pytest.raises(RuntimeError, match="g of parameter 7 must have 5000 elements, got 4999"):
        optimizer.step()


@pytest.mark.parametrize("count", [2, COUNT])
def test_a_sparse_gradient_is_refused_by_name(count):
    dense = [torch.zeros(10) for _ in range(4 * count)]
    arguments = dict(algorithm="adam", step=1, lr=1e-3, beta1=0.9, beta2=0.99, beta3=0.0, alpha=0.0, eps=1e-8, weight_decay=0.0)
    p, g, moments = dense[:count], dense[count : 2 * count], dense[2 * count :]
    functional.optimizer_step(p, g, moments, [], [], [], **arguments)
    with pytest.raises(RuntimeError, match="must be dense, got one with layout torch.sparse_coo"):
        functional.optimizer_step(p, [*g[1:], g[0].to_sparse()], moments, [], [], [], **arguments)


class Counted:
    """A check that two lists have tensors of equal sizes, which counts its calls."""

    def __init__(self):
        self.calls = 0
        self.memo = once_for_alike(self.check)

    def check(self, name, a, b):
        self.calls += 1
        if [t.numel() for t in a] != [t.numel() for t in b]:
            raise RuntimeError(name)

    def __call__(self, *args):
        before = self.calls
        self.memo(*args)
        return self.calls - before


def tensors(size, count=50, **options):
    return [torch.zeros(size, **options) for _ in range(count)]


@pytest.mark.skipif(check_memo.TensorGuards is None, reason="this torch has no comparison of metadata: every call is checked")
def test_what_passed_is_not_checked_again():
    check = Counted()
    assert check("op", tensors(3), tensors(3)) == 1
    assert check("op", tensors(3), tensors(3)) == 0
    for changed in (tensors(4), tensors((3, 1)), tensors(3, dtype=torch.int8), [t[::2] for t in tensors(5)], tensors(3, device="meta")):
        assert check("op", changed, changed) == 1
    assert check("other", tensors(3), tensors(3)) == 1
    assert check("op", tensors(3, 60), tensors(3, 60)) == 1
    assert check("op", tensors(3, 60), tensors(3, 60)) == 0


@pytest.mark.skipif(check_memo.TensorGuards is None, reason="this torch has no comparison of metadata: every call is checked")
def test_some_layouts_are_remembered_side_by_side():
    check = Counted()
    for size in (3, 4, 5):
        assert check("op", tensors(size), tensors(size)) == 1
    for size in (5, 3, 4):
        assert check("op", tensors(size), tensors(size)) == 0


def test_failures_are_not_remembered():
    check = Counted()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="op"):
            check("op", tensors(3), tensors(4))
    assert check.calls == 2


def test_few_tensors_and_those_of_two_devices_are_always_checked():
    check = Counted()
    for a, b in ((tensors(3, 5), tensors(3, 5)), (tensors(3), tensors(3, device="meta"))):
        assert [check("op", a, b) for _ in range(2)] == [1, 1]


def test_without_help_from_torch_everything_is_checked(monkeypatch):
    monkeypatch.setattr(check_memo, "TensorGuards", None)
    check = Counted()
    assert [check("op", tensors(3), tensors(3)) for _ in range(2)] == [1, 1]


def test_another_thread_may_check_meanwhile(monkeypatch):
    class Interrupted:
        """Compares as another thread passes a check of its own."""

        def __init__(self, *tensors, **options):
            pass

        def check(self, *tensors):
            if len(sizes) < 8:
                sizes.append(len(sizes) + 10)
                check("op", many(sizes[-1]), many(sizes[-1]))
            return False

    def many(size):
        return [torch.zeros(size) for _ in range(50)]

    sizes = []
    monkeypatch.setattr(check_memo, "TensorGuards", Interrupted)
    check = Counted()
    for _ in range(3):
        check("op", many(3), many(3))
    assert check.calls == 3 + len(sizes)
