"""A linear layer for experiments with outlier features: it knows which of its inputs are outliers, and leaves what to do with them to a subclass."""

import logging

import torch
from torch import nn

from ..utils import OutlierTracer

logger = logging.getLogger("bitsandbytes.nn.modules")


class OutlierAwareLinear(nn.Linear):
    """Quantises its weight at the first forward pass and computes with outlier features set apart; a subclass says how.

    ``OutlierTracer.get_instance().initialize(model)`` must come before the first forward pass.

    Attributes:
        outlier_dim: int64 indices of the outlier input features, None before the first forward pass.
        is_quantized: whether the weight has been quantised.
    """

    def __init__(self, input_features, output_features, bias=True, device=None):
        super().__init__(input_features, output_features, bias, device)
        self.outlier_dim = None
        self.is_quantized = False

    def forward_with_outliers(self, x: torch.Tensor, outlier_idx: torch.Tensor | None) -> torch.Tensor:
        """The output for ``x``, given the outlier features."""
        raise NotImplementedError("Please override the `forward_with_outliers(self, x, outlier_idx)` function")

    def quantize_weight(self, w: torch.Tensor, outlier_idx: torch.Tensor | None) -> torch.Tensor:
        """The values that the weight has after quantisation."""
        raise NotImplementedError("Please override the `quantize_weight(self, w, outlier_idx)` function")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.outlier_dim is None:
            tracer = OutlierTracer.get_instance()
            if not tracer.is_initialized():
                logger.warning("Please use OutlierTracer.initialize(model) before using the OutlierAwareLinear layer")
            self.outlier_dim = tracer.get_outliers(self.weight)
        if not self.is_quantized:
            with torch.no_grad():
                self.weight.copy_(self.quantize_weight(self.weight, self.outlier_dim))
            self.is_quantized = True
        return self.forward_with_outliers(x, self.outlier_dim)
