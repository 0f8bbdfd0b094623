"""Paged memory and what native calls need to know of a tensor, with a library made of host memory in place of a GPU's."""

import contextlib
import copy
import ctypes
from types import SimpleNamespace

import pytest
import torch

from bitsandbytes import devices, optim, paging
from bitsandbytes import functional as F

STREAMS = {1: "current", 2: "default", 3: "pages"}


class HostLibrary(dict):
    """The functions of a GPU build, on host memory; records what is prefetched, and to where."""

    def __init__(self):
        super().__init__(cfill_fp32=self.fill(ctypes.c_float), cfill_uint8=self.fill(ctypes.c_uint8), c_mul_fp32=self.mul)
        self.buffers, self.prefetched, self.freed, self.events = [], [], [], []

    is_capturing = False

    def cget_managed_ptr(self, size):
        self.buffers.append(ctypes.create_string_buffer(size.value))
        return ctypes.addressof(self.buffers[-1])

    def bnb_cuda_free_managed(self, address):
        self.freed.append(address.value)

    def bnb_cuda_prefetch_managed(self, address, size, to, device, stream):
        self.prefetched.append((address.value, size.value, to.value))
        self.events.append(f"{STREAMS[stream.value]}: page to {to.value}")

    @staticmethod
    def fill(c_type):
        def call(A, B, value, n):
            assert B is None and isinstance(value, c_type)
            (c_type * n.value).from_address(A.value)[:] = [value.value] * n.value

        return call

    @staticmethod
    def mul(A, B, value, n):
        a, b = ((ctypes.c_float * n.value).from_address(pointer.value) for pointer in (A, B))
        a[:] = [x * y for x, y in zip(a, b)]


class Stream:
    """A stream that writes down what it is told."""

    def __init__(self, cuda_stream: int, events: list):
        self.cuda_stream, self.name, self.events = cuda_stream, STREAMS[cuda_stream], events

    def wait_stream(self, other):
        self.events.append(f"{self.name}: wait for {other.name}")

    def record_event(self):
        self.events.append(f"{self.name}: record")
        return f"{self.name}'s event {len(self.events)}"

    def wait_event(self, event):
        self.events.append(f"{self.name}: wait for {event}")


@pytest.fixture
def library(monkeypatch):
    host = HostLibrary()
    current, default, pages = (Stream(number, host.events) for number in STREAMS)
    monkeypatch.setattr(paging, "lib", host)
    monkeypatch.setattr(paging, "_stream_for_pages", lambda device: pages)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: default)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: host.is_capturing)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: host.events.append(f"host: wait for {device}"))
    return host


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_paged_tensor_is_a_cpu_tensor_over_managed_memory(library, dtype):
    tensor = F.get_paged(3, 5, dtype=dtype, device=torch.device("cuda", 1))
    assert (tensor.shape, tensor.dtype, tensor.device.type) == ((3, 5), dtype, "cpu")
    assert (tensor.is_paged, tensor.page_deviceid) == (True, 1)
    assert len(library.buffers[0]) == tensor.nbytes
    F.fill(tensor, 7)
    assert (tensor == 7).all()
    assert library.prefetched == [(tensor.data_ptr(), tensor.nbytes, 1)]


def test_native_functions_work_on_the_device_of_the_tensor(library, monkeypatch):
    """One GPU of several is current for torch; a paged tensor may belong to another."""
    current = []

    @contextlib.contextmanager
    def device(index):
        current.append(index)
        yield
        current.append("before")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda index: current.append(f"waited for {index}"))
    tensor = F.get_paged(4, device=torch.device("cuda", 1))
    F.fill(tensor, 3.0, prefetch=False)
    assert tensor.tolist() == [3.0] * 4
    assert current == [1, "before", 1, "before", 1, "before", "waited for 1"]


def test_memory_is_given_back_with_the_last_tensor_over_it(library):
    manager = F.GlobalPageManager.get_instance()
    tensor = F.get_paged(4, 8)
    manager.paged_tensors.append(tensor)
    view, address = tensor[1], tensor.data_ptr()
    before = len(manager.paged_tensors)
    del tensor
    assert library.freed == [] and len(manager.paged_tensors) == before - 1
    del view
    assert library.freed == [address]


def test_rows_of_a_paged_tensor_are_paged(library):
    rows = paging.paged_rows(F.get_paged(2, 3, device=torch.device("cuda", 1)))
    assert [(row.is_paged, row.page_deviceid, row.shape) for row in rows] == [(True, 1, (3,))] * 2
    assert not any(hasattr(row, "is_paged") for row in paging.paged_rows(torch.zeros(2, 3)))


def test_prefetching_goes_to_the_device_or_the_host(library):
    tensor = F.get_paged(4)
    F.prefetch_tensor(tensor)
    F.prefetch_tensor(tensor, to_cpu=True)
    assert [device for _, _, device in library.prefetched] == [0, -1]


def test_only_paged_tensors_can_be_prefetched(library):
    with pytest.raises(ValueError, match="get_paged"):
        F.prefetch_tensor(torch.zeros(4))
    assert library.prefetched == []


def test_all_tensors_are_prefetched_newest_first(library, monkeypatch):
    manager = F.GlobalPageManager.get_instance()
    assert manager is F.GlobalPageManager.get_instance()
    tensors = [F.get_paged(4) for _ in range(3)]
    monkeypatch.setattr(manager, "paged_tensors", tensors)
    manager.prefetch_all(to_cpu=True)
    assert [address for address, _, _ in library.prefetched] == [t.data_ptr() for t in reversed(tensors)]


def test_elementwise_product(library):
    a, b = F.get_paged(4), F.get_paged(4)
    F.fill(a, 3.0)
    F.fill(b, 0.5, prefetch=False)
    F._mul(a, b)
    assert a.tolist() == [1.5] * 4


def test_ordinary_tensors_are_filled_and_multiplied_too():
    a = torch.zeros(4)
    F.fill(a, 3.0)
    F._mul(a, torch.full((4,), 2.0))
    assert a.tolist() == [6.0] * 4


def test_elementwise_functions_refuse_what_they_would_misread(library):
    tensor = F.get_paged(4)
    with pytest.raises(NotImplementedError, match="float16"):
        F.elementwise_func("fill", torch.zeros(4, dtype=torch.float16), None, 0.0)
    for other in (F.get_paged(3), F.get_paged(4, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="one type and size"):
            F.elementwise_func("_mul", tensor, other, 0.0)


def test_empty_paged_tensors_are_refused(library):
    with pytest.raises(ValueError, match="at least one element"):
        F.get_paged(0, 4)


def test_exhausted_memory_is_reported(monkeypatch):
    monkeypatch.setattr(paging, "lib", SimpleNamespace(cget_managed_ptr=lambda size: None))
    with pytest.raises(RuntimeError, match="16 bytes of managed memory"):
        F.get_paged(4)


@pytest.mark.parametrize("singleton", [F.GlobalPageManager, F.CUBLAS_Context])
def test_singletons_are_asked_for(singleton):
    with pytest.raises(RuntimeError, match="get_instance"):
        singleton()


def test_blas_handles_are_made_once_a_device(monkeypatch):
    made = []

    def get_context():
        made.append(0x1000)
        return made[-1]

    monkeypatch.setattr(devices, "lib", SimpleNamespace(get_context=get_context))
    monkeypatch.setattr(torch.cuda, "device", lambda device: pytest.MonkeyPatch.context())
    contexts = F.CUBLAS_Context.get_instance()
    monkeypatch.setattr(contexts, "context", {})
    handles = [contexts.get_context(torch.device("cuda", 3)) for _ in range(2)]
    assert handles[0] is handles[1] and handles[0].value == 0x1000 and made == [0x1000]


def test_pointers():
    assert F.get_ptr(None) is None
    tensor = torch.zeros(4)
    assert F.get_ptr(tensor[1:]).value == tensor.data_ptr() + 4


def test_tensors_must_share_a_device():
    here, there = torch.zeros(1), torch.zeros(1, device="meta")
    paged = torch.zeros(1)
    paged.is_paged = True
    assert F.is_on_gpu([]) is F.is_on_gpu([here, None, here]) is F.is_on_gpu([there, paged]) is True
    with pytest.raises(RuntimeError, match="same device, but they are on cpu, meta"):
        F.is_on_gpu([here, there])
    with pytest.raises(RuntimeError, match="same GPU"):
        F.is_on_gpu([SimpleNamespace(device=torch.device("cuda", i)) for i in range(2)])


# ----------------------------------------------------------------------------------------------------------------- in optimizers
@pytest.fixture
def saved():
    """The state of a paged optimizer, made on the CPU."""
    p = torch.nn.Parameter(torch.ones(100_000))
    optimizer = optim.PagedAdamW8bit([p])
    p.grad = torch.ones_like(p)
    with pytest.warns(UserWarning, match="ordinary memory"):
        optimizer.step()
    return optimizer.state_dict()


@pytest.mark.parametrize("cls", [optim.PagedAdamW8bit, optim.PagedAdEMAMix, optim.PagedLion32bit])
def test_states_off_the_cpu_are_paged_and_prefetched(library, cls):
    """A parameter on the meta device stands for one on a GPU."""
    p, small = (torch.nn.Parameter(torch.empty(n, device="meta")) for n in (100_000, 99_999))
    optimizer = cls([p, small])
    for i, parameter in enumerate((p, small)):
        optimizer.init_state(optimizer.param_groups[0], parameter, 0, i)
    moments = [optimizer.state[p][key] for key in ("state1", "state2") if key in optimizer.state[p]]
    assert all(moment.is_paged and not moment.any() for moment in moments)
    assert not hasattr(optimizer.state[small]["state1"], "is_paged")
    library.prefetched.clear()
    optimizer.prefetch_state(p)
    optimizer.prefetch_state(small)
    assert [address for address, _, _ in library.prefetched] == [moment.data_ptr() for moment in moments]


def test_states_are_paged_after_loading_too(library, saved):
    p = torch.nn.Parameter(torch.empty(100_000, device="meta"))
    optimizer = optim.PagedAdamW8bit([p])
    optimizer.load_state_dict(saved, move_to_device=False)
    for key in ("state1", "state2"):
        assert optimizer.state[p][key].is_paged
        assert torch.equal(optimizer.state[p][key], saved["state"][0]["__bnb_optimizer_quant_state__"][key])


@pytest.fixture
def two_parameters(library, monkeypatch):
    """Parameters off the CPU whose states are paged, made and not stepped yet; steps are written down instead of taken."""
    params = [torch.nn.Parameter(torch.empty(100_000, device="meta")) for _ in range(2)]
    optimizer = optim.PagedAdamW32bit(params)
    for i, p in enumerate(params):
        p.grad = torch.empty_like(p)
        optimizer.init_state(optimizer.param_groups[0], p, 0, i)
    names = {id(p): i for i, p in enumerate(params)}
    stepped = lambda p, *arguments, **settings: library.events.append(f"step {[names[id(tensor)] for tensor in p]}")  # noqa: E731
    monkeypatch.setattr(F, "optimizer_step", stepped)
    library.events.clear()
    return optimizer


TO_GPU = ["pages: wait for current", "pages: page to 0", "pages: page to 0", "pages: record"]


def test_pages_travel_while_the_parameters_before_are_stepped_and_no_earlier(library, two_parameters, monkeypatch):
    monkeypatch.setattr(optim.batch, "PIECE_BYTES", 2 * 400_000)
    two_parameters.step()
    arrivals = ["current: wait for pages's event 4", "current: wait for pages's event 8"]
    assert library.events == [*TO_GPU, *TO_GPU, arrivals[0], "step [0]", arrivals[1], "step [1]", "host: wait for 0"]


def test_small_states_travel_and_are_stepped_together(library, two_parameters):
    two_parameters.step()
    together = [TO_GPU[0], *["pages: page to 0"] * 4, TO_GPU[-1]]
    assert library.events == [*together, "current: wait for pages's event 6", "step [0, 1]", "host: wait for 0"]


def test_a_step_in_a_graph_moves_no_pages(library, two_parameters):
    library.is_capturing = True
    two_parameters.step()
    two_parameters.prefetch_state(two_parameters.param_groups[0]["params"][0])
    assert library.events == ["step [0, 1]"]


def test_the_host_waits_once_a_step_and_where_it_touches_paged_states(library, two_parameters):
    two_parameters.step()
    assert [event for event in library.events if event.startswith("host")] == ["host: wait for 0"]
    other = optim.PagedAdamW32bit([torch.nn.Parameter(torch.empty(100_000, device="meta")) for _ in range(2)])
    saved = two_parameters.state_dict()
    assert library.events[-1] == "host: wait for 0"
    for touch in (two_parameters.state_dict, lambda: copy.deepcopy(two_parameters), lambda: other.load_state_dict(saved, move_to_device=False)):
        library.events.clear()
        touch()
        assert library.events[0] == "host: wait for 0"
    library.events.clear()
    optim.AdamW8bit([torch.nn.Parameter(torch.ones(4096))]).state_dict()
    assert library.events == []


def test_a_copied_optimizer_has_pages_of_its_own(library, two_parameters):
    p = two_parameters.param_groups[0]["params"][0]
    two_parameters.state[p]["state1"][:3] = torch.tensor([1.0, 2, 3])
    copied = copy.deepcopy(two_parameters)
    state = copied.state[copied.param_groups[0]["params"][0]]
    for key in ("state1", "state2"):
        assert state[key].is_paged and torch.equal(state[key], two_parameters.state[p][key])
        assert state[key].data_ptr() in map(ctypes.addressof, library.buffers)
        assert state[key].data_ptr() != two_parameters.state[p][key].data_ptr()


def test_states_that_moved_to_the_cpu_are_ordinary_again(library, two_parameters):
    state = {**two_parameters.__getstate__(), "state": {torch.nn.Parameter(torch.ones(100_000)): dict(two_parameters.state.popitem()[1])}}
    two_parameters.__setstate__(state)
    assert not any(paging.is_paged(value) for values in two_parameters.state.values() for value in values.values())


def test_new_states_are_filled_without_waiting(library):
    optimizer = optim.PagedAdamW8bit([p := torch.nn.Parameter(torch.empty(100_000, device="meta"))])
    optimizer.init_state(optimizer.param_groups[0], p, 0, 0)
    fill = ["current: page to 0", "default: wait for current", "current: wait for default"]
    assert library.events == fill * 2


def test_subclasses_that_prefetch_themselves_are_asked_to(library, monkeypatch):
    asked = []

    class Own(optim.PagedAdamW8bit):
        def prefetch_state(self, p):
            asked.append(p)

    monkeypatch.setattr(F, "optimizer_step", lambda *arguments, **settings: None)
    p = torch.nn.Parameter(torch.empty(100_000, device="meta"))
    p.grad = torch.empty_like(p)
    Own([p]).step()
    assert len(asked) == 1 and asked[0] is p
