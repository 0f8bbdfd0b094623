"""Which input features of a linear layer are outliers, and a tracer that collects them for every linear layer of a model."""

import logging
import weakref

import torch
from torch import nn

from .singleton import Singleton

logger = logging.getLogger(__name__)

# An activation of this magnitude makes its feature an outlier (Dettmers et al. 2022, LLM.int8(), section 4, https://arxiv.org/abs/2208.07339).
_LARGE_ACTIVATION = 6.0
_ACTIVATION_ZSCORE = 3.0


def find_outlier_dims(
    weight: torch.Tensor, reduction_dim: int = 0, zscore: float = 4.0, topk: int | None = None, rdm: bool = False
) -> torch.Tensor:  # fmt: skip
    """Finds the dimensions of a matrix whose standard deviation stands out.

    Args:
        weight: [rows, columns].
        reduction_dim: dimension along which deviations are taken; the result indexes the other one.
        zscore: how many standard deviations above their mean a deviation must be.
        topk: take this many dimensions of the largest deviation instead, the largest first.
        rdm: take ``topk`` random dimensions instead, as a baseline.

    Returns:
        int64 [found].

    Raises:
        ValueError: a tensor that is not a matrix, or ``rdm`` without ``topk``.
    """
    if weight.dim() != 2:
        raise ValueError(f"find_outlier_dims needs a matrix, got shape {list(weight.shape)}")
    if rdm:
        if topk is None:
            raise ValueError("find_outlier_dims(rdm=True) needs topk, the number of random dimensions")
        return torch.randperm(weight.shape[1 - reduction_dim], device=weight.device)[:topk]
    deviations = weight.std(reduction_dim)
    if topk is not None:
        return deviations.topk(topk).indices
    return torch.where((deviations - deviations.mean()) / deviations.std() > zscore)[0]


def _outlier_activations(x: torch.Tensor) -> torch.Tensor:
    """Features of activations [..., features] that stand out by their deviation or have a large value anywhere."""
    rows = x.detach().reshape(-1, x.shape[-1])
    large = torch.where((rows.abs() > _LARGE_ACTIVATION).any(0))[0]
    return torch.cat([find_outlier_dims(rows, zscore=_ACTIVATION_ZSCORE), large]).unique()


def outlier_hook(module: nn.Module, input: tuple) -> None:
    """Forward pre-hook of linear layers: has the tracer look at the layer the first time that it runs."""
    OutlierTracer.get_instance()._see(module.weight, input[0])


class OutlierTracer(Singleton):
    """Collects the outlier features of a model's linear layers during its first forward pass; one in the process.

    The first layer that runs is judged by its activations, the others by the columns of their weights, where the outliers of a trained model
    show as well. A weight is known by the address of its storage, and forgotten when it is freed.

    Attributes:
        initialized: whether a model is traced.
        hooks: handles of the hooks, one a linear layer.
        hvalues: addresses of the weights seen, in order.
        outliers: their outlier features.
        hvalue2outlier_idx: from address to outlier features.
        last_w: the weight seen last, None if it is freed.
        current_outlier_dims: its outlier features.
    """

    def initialize(self, model: nn.Module) -> None:
        """Starts tracing ``model``, and stops tracing the one before."""
        for hook in getattr(self, "hooks", ()):
            hook.remove()
        self.hvalue2outlier_idx: dict[int, torch.Tensor] = {}
        self._weights: dict[int, weakref.ref] = {}
        self.hooks = [layer.register_forward_pre_hook(outlier_hook) for layer in model.modules() if isinstance(layer, nn.Linear)]
        self.initialized = True

    def is_initialized(self) -> bool:
        return getattr(self, "initialized", False)

    @property
    def hvalues(self) -> list[int]:
        return list(self.hvalue2outlier_idx)

    @property
    def outliers(self) -> list[torch.Tensor]:
        return list(self.hvalue2outlier_idx.values())

    @property
    def last_w(self) -> torch.Tensor | None:
        return self._weights[self.hvalues[-1]]() if self.hvalues else None

    @property
    def current_outlier_dims(self) -> torch.Tensor | None:
        return self.outliers[-1] if self.hvalues else None

    def get_hvalue(self, weight: torch.Tensor) -> int:
        """The address by which ``weight`` is known."""
        return weight.untyped_storage().data_ptr()

    def get_outliers(self, weight: torch.Tensor) -> torch.Tensor | None:
        """The outlier features of a weight, int64; None if its layer has not run yet, or no model is traced (with a warning)."""
        if not self.is_initialized():
            logger.warning("the outlier tracer is not initialized; call OutlierTracer.get_instance().initialize(model) before the first forward pass")
            return None
        return self.hvalue2outlier_idx.get(self.get_hvalue(weight))

    def _see(self, weight: torch.Tensor, x: torch.Tensor) -> None:
        hvalue = self.get_hvalue(weight)
        if hvalue in self.hvalue2outlier_idx:
            return
        first = not self.hvalue2outlier_idx
        self.hvalue2outlier_idx[hvalue] = _outlier_activations(x) if first else find_outlier_dims(weight.detach())
        self._weights[hvalue] = weakref.ref(weight, lambda gone: self._forget(hvalue, gone))

    def _forget(self, hvalue: int, gone: weakref.ref) -> None:
        if self._weights.get(hvalue) is gone:  # not a weight of a later model at the same address
            del self._weights[hvalue], self.hvalue2outlier_idx[hvalue]
