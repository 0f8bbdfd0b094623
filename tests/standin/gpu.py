"""torch.cuda on the stand-in device (device.cpp): loads it, and says of it what PyTorch and others ask.

It has the capability and the kernels of the emulation (csrc/cuda/emulation.h) and one stream a device. Random numbers are the CPU generator's.
"""

import contextlib
import ctypes as ct
import os
from types import SimpleNamespace

CAPABILITY = (9, 0)


def install() -> None:
    """Makes this process one that sees GPUs. Before torch is imported: that looks for them once."""
    device = ct.CDLL(os.environ["BNB_STANDIN_DEVICE"], mode=ct.RTLD_GLOBAL)  # global: the emulated kernels open its memory
    for name in ("standin_bytes", "standin_peak_bytes", "standin_device_bytes"):
        getattr(device, name).restype = ct.c_size_t
    import torch

    torch.version.cuda = "13.0"
    for name, value in native_functions(device).items():
        setattr(torch._C, f"_cuda_{name}", value)
    for name, value in python_functions(torch, device).items():
        setattr(torch.cuda, name, value)
    torch.cuda.streams.Stream, torch.cuda.streams.Event = torch.cuda.Stream, torch.cuda.Event
    torch.cuda.memory.mem_get_info = torch.cuda.mem_get_info
    torch.cuda.graphs._cuda_isCurrentStreamCapturing = torch._C._cuda_isCurrentStreamCapturing
    torch.UntypedStorage.__new__ = new_storage(torch, torch.UntypedStorage.__new__)


def native_functions(device) -> dict:
    """What of torch._C a build for CUDA has, without its prefix."""

    def device_count() -> int:  # functions of ctypes cannot be keys of a dictionary, which torch.compile wants
        return device.standin_device_count()

    def exchange(index: int) -> int:
        before = device.standin_device()
        if index >= 0:
            set_device(index)
        return before

    def set_device(index: int) -> None:
        if not 0 <= index < device_count():
            raise RuntimeError(f"CUDA error: invalid device ordinal {index}")
        device.standin_set_device(index)

    def memory_stats(index: int) -> dict:
        bytes_ = {"current": device.standin_bytes(index), "peak": device.standin_peak_bytes(index), "allocated": 0, "freed": 0}
        return {name: {"all": bytes_} for name in ("allocated_bytes", "reserved_bytes", "active_bytes", "requested_bytes")}

    return {
        "getDeviceCount": device_count,
        "getDevice": lambda: device.standin_device(),
        "setDevice": set_device,
        "exchangeDevice": exchange,
        "maybeExchangeDevice": lambda index: exchange(index),
        "getCurrentRawStream": lambda index: 0,
        "isCurrentStreamCapturing": lambda: False,
        "isInBadFork": lambda: False,
        "getArchFlags": lambda: "sm_90",
        "canDeviceAccessPeer": lambda one, other: True,
        "synchronize": lambda: None,
        "emptyCache": lambda: None,
        "ipc_collect": lambda: None,
        "memoryStats": memory_stats,
        "resetPeakMemoryStats": lambda index: device.standin_reset_peak(index),
        "resetAccumulatedMemoryStats": lambda index: None,
        "getCurrentBlasHandle": lambda: 0,
    }


def new_storage(torch, of_others):
    """Storages are made on devices that PyTorch was built for; for this one a tensor makes them."""

    def new(cls, *args, device=None, **kwargs):
        if device is not None and torch.device(device).type == "cuda":
            return torch.empty(*args, dtype=torch.uint8, device=device).untyped_storage()
        return of_others(cls, *args, device=device, **kwargs)

    return new


def python_functions(torch, device) -> dict:
    """What of torch.cuda does not follow from the above."""

    def index_of(where) -> int:
        index = torch.cuda._utils._get_device_index(where, optional=True)
        if not 0 <= index < device.standin_device_count():
            raise AssertionError("Invalid device id")
        return index

    def properties(where=None):
        index = index_of(where)
        return SimpleNamespace(
            name="Stand-in GPU", major=CAPABILITY[0], minor=CAPABILITY[1], total_memory=device.standin_device_bytes(), multi_processor_count=4,
            warp_size=32, is_integrated=False, is_multi_gpu_board=False, gcnArchName="", uuid=f"GPU-{index}", max_threads_per_multi_processor=2048,
            regs_per_multiprocessor=65536, shared_memory_per_block_optin=227 * 1024, L2_cache_size=1 << 20,
        )  # fmt: skip

    def free_and_total(where=None) -> tuple[int, int]:
        total = device.standin_device_bytes()
        return total - device.standin_bytes(index_of(where)), total

    class Stream:
        """The one stream of a device, which has always done everything."""

        cuda_stream = stream_id = priority = 0

        def __init__(self, device=None, priority=0, **kwargs):
            self.device = torch.device("cuda", index_of(device))
            self.device_index = self.device.index

        def __eq__(self, other):
            return isinstance(other, Stream) and self.device == other.device

        def __hash__(self):
            return hash(self.device)

        def query(self) -> bool:
            return True

        def synchronize(self) -> None:
            pass

        def wait_stream(self, stream) -> None:
            pass

        def wait_event(self, event) -> None:
            pass

        def record_event(self, event=None):
            return event or Event()

    class Event:
        """An event that has happened."""

        def __init__(self, enable_timing=False, **kwargs):
            self.time = 0.0

        def query(self) -> bool:
            return True

        def record(self, stream=None) -> None:
            self.time = torch.utils.benchmark.timer()

        def wait(self, stream=None) -> None:
            pass

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end) -> float:
            return 1000 * (end.time - self.time)

    @contextlib.contextmanager
    def on_stream(stream):
        with torch.cuda.device(stream.device if stream is not None else None):
            yield stream

    return {
        "_lazy_init": lambda: None,
        "_initialized": True,
        "_exchange_device": torch._C._cuda_exchangeDevice,
        "_maybe_exchange_device": torch._C._cuda_maybeExchangeDevice,
        "device_count": torch._C._cuda_getDeviceCount,
        "get_device_properties": properties,
        "mem_get_info": free_and_total,
        "default_generators": (torch.default_generator,) * device.standin_device_count(),
        "synchronize": lambda device=None: None,
        "current_stream": Stream,
        "default_stream": Stream,
        "set_stream": lambda stream: None,
        "stream": on_stream,
        "Stream": Stream,
        "Event": Event,
    }
