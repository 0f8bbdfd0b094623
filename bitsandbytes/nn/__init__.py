"""Layers and parameters that keep their weights quantised."""

import torch

from ..autograd._functions import MatmulLtState
from ..quant_state import QuantState
from .embeddings import Embedding, Embedding4bit, Embedding8bit, EmbeddingFP4, EmbeddingNF4, StableEmbedding
from .experts import Experts4bit, FusedExperts4bit, quantize_experts
from .modules import Int8Params, LayerState, Linear4bit, Linear8bitLt, LinearFP4, LinearNF4, Params4bit
from .outlier_aware import OutlierAwareLinear
from .sharding import shard_4bit

# What a pickled layer is made of; torch.load(weights_only=True) accepts no other classes. Building these runs no code of the file's choosing.
torch.serialization.add_safe_globals(
    [
        QuantState, MatmulLtState, LayerState, Params4bit, Int8Params, Linear4bit, LinearFP4, LinearNF4, Linear8bitLt,
        Embedding4bit, EmbeddingFP4, EmbeddingNF4, Embedding8bit, Embedding, StableEmbedding, Experts4bit,
    ]
)  # fmt: skip

__all__ = [
    "Embedding",
    "Embedding4bit",
    "Embedding8bit",
    "EmbeddingFP4",
    "EmbeddingNF4",
    "Experts4bit",
    "FusedExperts4bit",
    "Int8Params",
    "Linear4bit",
    "Linear8bitLt",
    "LinearFP4",
    "LinearNF4",
    "OutlierAwareLinear",
    "Params4bit",
    "StableEmbedding",
    "quantize_experts",
    "shard_4bit",
]
