"""Embedding tables: trained ones whose optimizer state stays in 32 bit, and quantised ones that look rows up without touching the others."""

import torch
from torch import Tensor, nn
import torch.nn.functional as F

from .. import functional
from .._ops import BLOCKSIZES_4BIT
from ..optim.manager import GlobalOptimManager
from .holders import Holds4bitWeight, Holds8bitWeight, described, logger
from .parameters import Int8Params
from .pieces import common_unit, dequantize_rows

# ---------------------------------------------------------------------------------------------------------------- trained embeddings


class _TrainedIn32Bit(nn.Embedding):
    """An embedding with Xavier initialisation whose weight every optimizer of this library gives a 32-bit state."""

    def __init__(
        self, num_embeddings, embedding_dim, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, sparse=False,
        _weight=None, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__(
            num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse, _weight, device=device, dtype=dtype
        )  # fmt: skip
        self._ask_for_32bit_state()

    def _ask_for_32bit_state(self) -> None:
        GlobalOptimManager.get_instance().register_module_override(self, "weight", {"optim_bits": 32})

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight)
        self._fill_padding_idx_with_zero()

    def __setstate__(self, state):  # a copy is a module of its own
        super().__setstate__(state)
        self._ask_for_32bit_state()


class Embedding(_TrainedIn32Bit):
    """``torch.nn.Embedding`` with Xavier initialisation and a 32-bit optimizer state; the arguments are the same."""


class StableEmbedding(_TrainedIn32Bit):
    """``Embedding`` followed by a layer norm, for stable training with 8-bit optimizers (Dettmers et al. 2022, https://arxiv.org/abs/2110.02861).

    The norm has parameters in the default dtype, whatever that of the table, and the output is in the dtype of the table.
    """

    def __init__(self, num_embeddings, embedding_dim, *args, device=None, **kwargs):
        super().__init__(num_embeddings, embedding_dim, *args, device=device, **kwargs)
        self.norm = nn.LayerNorm(embedding_dim, device=device)

    def forward(self, input: Tensor) -> Tensor:
        """int32 or int64 [...] to [..., embedding_dim]."""
        rows = super().forward(input)
        return self.norm(rows.to(self.norm.weight.dtype)).to(self.weight.dtype)


# -------------------------------------------------------------------------------------------------------------- quantised embeddings


class _QuantisedEmbedding:
    """What the quantised embeddings share; it goes before a holder of their kind of weight and ``nn.Embedding``."""

    def __init__(self, num_embeddings, embedding_dim, device=None, dtype=None, **options):
        super().__init__(num_embeddings, embedding_dim, device=device, dtype=dtype, **options)
        self.dtype = self.weight.dtype

    @property
    def _dense_shape(self) -> tuple[int, int]:
        return self.num_embeddings, self.embedding_dim

    def _dense_forward(self, input: Tensor, weight: Tensor) -> Tensor:
        """The rows of a table that is not quantised."""
        self._warn_about_dense_weight(weight)
        rows = F.embedding(input, weight, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse)
        return rows.to(self.dtype)

    def _finished(self, rows: Tensor) -> Tensor:
        """Looked-up rows as they are returned: none longer than ``max_norm``, in ``dtype``."""
        if self.max_norm is not None:
            norms = torch.linalg.vector_norm(rows, self.norm_type, dim=-1, keepdim=True, dtype=torch.float32)
            rows = torch.where(norms > self.max_norm, rows * (self.max_norm / (norms + 1e-7)), rows)
        return rows.to(self.dtype)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        if isinstance(self.weight, self.parameter_class) and not self._is_quantised():
            raise NotImplementedError(
                f"{described(self)}: the table has not been quantised, so there is nothing to save yet; "
                "move the layer to a device first (layer.to('cpu'), layer.to('cuda'))"
            )
        super()._save_to_state_dict(destination, prefix, keep_vars)


class Embedding4bit(_QuantisedEmbedding, Holds4bitWeight, nn.Embedding):
    """An embedding table in 4 bit.

    Construct it, load or copy a floating-point table, and move it to a device: that quantises. A quantised checkpoint can be loaded at any time.
    A lookup dequantises the rows asked for and no others. While the table is a plain floating-point matrix the layer looks up in that, and says
    so once. The weight may be shared with the ``Linear4bit`` of a tied output head.

    Args:
        num_embeddings: rows of the table.
        embedding_dim: size of a row.
        dtype: dtype of the result, and of the table until it is quantised; default: torch's.
        quant_type: "fp4" or "nf4".
        quant_storage: dtype that the packed bytes are seen as.
        device: where the floating-point table is created.
        compress_statistics: quantise the scales as well (double quantisation).
        options: ``padding_idx``, ``max_norm``, ``norm_type``, ``scale_grad_by_freq``, ``sparse`` of ``torch.nn.Embedding``. Rows longer than
            ``max_norm`` are shortened in the result, not in the table.
    """

    def __init__(
        self, num_embeddings, embedding_dim, dtype=None, quant_type="fp4", quant_storage=torch.uint8, device=None, *, compress_statistics=False,
        **options,
    ):  # fmt: skip
        super().__init__(num_embeddings, embedding_dim, device, dtype, **options)
        self._hold_in_4bit(compress_statistics, quant_type, quant_storage)
        self._warn_about_width(self.weight.blocksize)

    def _warn_about_width(self, blocksize: int) -> None:
        if common_unit(self.embedding_dim, blocksize) not in BLOCKSIZES_4BIT:
            logger.warning(
                f"{described(self)}: rows of {self.embedding_dim} elements begin in the middle of blocks of {blocksize}, and are looked up element "
                f"by element. This makes inference slower; a multiple of {BLOCKSIZES_4BIT[0]} avoids it."
            )

    def forward(self, input: Tensor) -> Tensor:
        """Looks rows up.

        Args:
            input: indices, int32 or int64, [...].

        Returns:
            [..., embedding_dim] in ``dtype``.

        Raises:
            IndexError: an index that the table does not have.
            RuntimeError: the weight holds packed codes whose statistics were lost.
        """
        weight = self.weight
        state = getattr(weight, "quant_state", None)
        if state is None:
            if self._is_dense(weight):
                return self._dense_forward(input, weight)
            state = self._recovered_state(weight)
        return self._finished(dequantize_rows(weight, state, input))

    def dequantize(self) -> Tensor:
        """The whole table, [num_embeddings, embedding_dim] in ``dtype``."""
        weight, state = self.weight, self.quant_state
        return (weight.data if state is None else functional.dequantize_4bit(weight.data.reshape(-1, 1), state)).to(self.dtype)


class EmbeddingFP4(Embedding4bit):
    """``Embedding4bit`` with quant_type "fp4"."""

    def __init__(self, num_embeddings, embedding_dim, dtype=None, quant_storage=torch.uint8, device=None, **options):
        super().__init__(num_embeddings, embedding_dim, dtype, "fp4", quant_storage, device, **options)


class EmbeddingNF4(Embedding4bit):
    """``Embedding4bit`` with quant_type "nf4"."""

    def __init__(self, num_embeddings, embedding_dim, dtype=None, quant_storage=torch.uint8, device=None, **options):
        super().__init__(num_embeddings, embedding_dim, dtype, "nf4", quant_storage, device, **options)


class Embedding8bit(_QuantisedEmbedding, Holds8bitWeight, nn.Embedding):
    """An embedding table in int8, one scale a row.

    It is used like ``Embedding4bit``. The weight may be shared with the ``Linear8bitLt`` of a tied output head.

    Args:
        num_embeddings: rows of the table.
        embedding_dim: size of a row.
        device: where the floating-point table is created.
        dtype: dtype of the result, and of the table until it is quantised; default: torch's.
        options: as for ``Embedding4bit``.
    """

    def __init__(self, num_embeddings, embedding_dim, device=None, dtype=None, **options):
        super().__init__(num_embeddings, embedding_dim, device, dtype, **options)
        self.weight = Int8Params(self.weight.data, requires_grad=False, has_fp16_weights=False)

    def _takes_codes(self, assign: bool) -> bool:
        return isinstance(self.weight, Int8Params)

    def forward(self, input: Tensor) -> Tensor:
        """Looks rows up; as ``Embedding4bit.forward``."""
        weight = self.weight
        if self._is_dense(weight):
            return self._dense_forward(input, weight)
        scales, chosen = self._scales_of(weight), input.reshape(-1)
        rows = weight.index_select(0, chosen) * (scales.index_select(0, chosen)[:, None] / 127.0)
        return self._finished(rows.view(*input.shape, self.embedding_dim))

    def dequantize(self) -> Tensor:
        """The whole table, [num_embeddings, embedding_dim] in ``dtype``."""
        weight = self.weight
        return (weight.data if self._is_dense(weight) else weight.data * (self._scales_of(weight)[:, None] / 127.0)).to(self.dtype)
