"""Optimizers with 8-bit and 32-bit states, paged or not."""

from .adagrad import Adagrad, Adagrad8bit, Adagrad32bit  # noqa: F401
from .adam import Adam, Adam8bit, Adam32bit, PagedAdam, PagedAdam8bit, PagedAdam32bit  # noqa: F401
from .adamw import AdamW, AdamW8bit, AdamW32bit, PagedAdamW, PagedAdamW8bit, PagedAdamW32bit  # noqa: F401
from .ademamix import AdEMAMix, AdEMAMix8bit, AdEMAMix32bit, PagedAdEMAMix, PagedAdEMAMix8bit, PagedAdEMAMix32bit  # noqa: F401
from .lamb import LAMB, LAMB8bit, LAMB32bit  # noqa: F401
from .lars import LARS, LARS8bit, LARS32bit, PytorchLARS  # noqa: F401
from .lion import Lion, Lion8bit, Lion32bit, PagedLion, PagedLion8bit, PagedLion32bit  # noqa: F401
from .optimizer import GlobalOptimManager  # noqa: F401
from .rmsprop import RMSprop, RMSprop8bit, RMSprop32bit  # noqa: F401
from .sgd import SGD, SGD8bit, SGD32bit  # noqa: F401
