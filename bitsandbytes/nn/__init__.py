"""Layers and parameters that keep their weights quantised."""

import torch

from ..autograd._functions import MatmulLtState
from ..quant_state import QuantState
from .modules import Int8Params, LayerState, Linear4bit, Linear8bitLt, LinearFP4, LinearNF4, Params4bit
from .outlier_aware import OutlierAwareLinear

# What a pickled layer is made of; torch.load(weights_only=True) accepts no other classes. Building these runs no code of the file's choosing.
torch.serialization.add_safe_globals([QuantState, Params4bit, Linear4bit, LinearFP4, LinearNF4, Int8Params, LayerState, MatmulLtState, Linear8bitLt])

__all__ = [
    "Int8Params",
    "Linear4bit",
    "Linear8bitLt",
    "LinearFP4",
    "LinearNF4",
    "OutlierAwareLinear",
    "Params4bit",
]
