"""Optimizer state of parameters that are sharded over processes.

A DTensor parameter (FSDP2, tensor parallelism) is stepped where it lies: its local part is a parameter like any other, with plain local state,
and 8-bit blocks are counted from the start of that part. In a state dict every state is a DTensor laid out as the parameter is, so that torch's
distributed checkpoints can gather it, and cut it anew for another number of processes.

The statistics of 8-bit blocks do not follow the parameter's shape. They are written for granules instead: runs of g elements, g the largest
divisor of both 256 and the length of a row. A shard that is cut between rows starts and ends between granules, and so does every block, so that
each granule lies in one block. Whoever reads it finds the old blocks unchanged where its own begin at the same elements, and quantises the others
anew.
"""

from math import gcd
import sys

import torch

from .._ops import OPTIMIZER_BLOCKSIZE, blocks
from ..functional import dequantize_blockwise, quantize_blockwise


def _dtensor_type():
    """DTensor where something has imported it: otherwise no tensor can be one, and importing it takes a while."""
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)


def is_dtensor(tensor) -> bool:
    kind = _dtensor_type()
    return kind is not None and isinstance(tensor, kind)


def is_fsdp1_shard(p: torch.Tensor) -> bool:
    """A flat parameter of torch.distributed.fsdp.FullyShardedDataParallel, or a view of one."""
    return getattr(p, "_fsdp_flattened", False) or type(p).__name__ == "FlatParameter"


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor, sharing its memory."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def local_gradient(p: torch.Tensor) -> torch.Tensor:
    """The gradient of this process's part of ``p``."""
    grad = p.grad
    if is_dtensor(p) and is_dtensor(grad):
        return local(grad if grad.placements == p.placements else grad.redistribute(placements=p.placements))
    return local(grad)


def like_parameter(value: torch.Tensor, p: torch.Tensor, shape, leading: int = 0) -> torch.Tensor:
    """``value``, the local part of something of global ``shape``, as a DTensor that is laid out as ``p`` after ``leading`` dimensions.

    Beside an ordinary parameter it is the whole, and stays what it is.
    """
    if not is_dtensor(p):
        return value.view(shape)
    stride = torch.empty(shape, device="meta").stride()
    placements = _placements(p, leading)
    return _dtensor_type().from_local(value, p.device_mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)


def _placements(p: torch.Tensor, leading: int) -> list:
    """How a tensor with ``leading`` dimensions in front of those of ``p`` is laid out."""
    placements = []
    for placement in p.placements:
        if leading and placement.is_shard():
            strided = {"split_factor": placement.split_factor} if hasattr(placement, "split_factor") else {}
            placement = type(placement)(placement.dim + leading, **strided)
        placements.append(placement)
    return placements


def part_of_moment(value: torch.Tensor, p: torch.Tensor, leading: int, is_absmax: bool) -> torch.Tensor:
    """The part of a saved moment, or of its statistics, that belongs to this process's part of ``p``.

    Args:
        value: a DTensor, or the whole as a plain tensor, which is cut without communication.
        leading: number of dimensions in front of those of ``p``.
        is_absmax: it holds statistics, by blocks or by granules.
    """
    if is_dtensor(value):
        return value.redistribute(p.device_mesh, _placements(p, leading)).to_local() if is_dtensor(p) else value.full_tensor()
    if not is_dtensor(p) or value.numel() == 0:
        return value
    if is_absmax and value.shape[-1:] == (blocks(p.numel(), OPTIMIZER_BLOCKSIZE),) and value.dim() == 1 + leading:
        value = _spread(value, p, p.shape)
    elif not is_absmax and value.shape[leading:] != p.shape:
        return value  # already a part
    for mesh_dim, placement in enumerate(_placements(p, leading)):
        if placement.is_shard():
            ends = _chunk_ends(value.shape[placement.dim], p.device_mesh.size(mesh_dim))
            value = value.tensor_split(ends, dim=placement.dim)[p.device_mesh.get_local_rank(mesh_dim)]
    return value


def _chunk_ends(size: int, parts: int) -> list[int]:
    """Where the parts of a sharded dimension end: all but the last of one size, as torch.chunk cuts; the last ones may be empty."""
    each = -(-size // parts)
    return [min(each * (i + 1), size) for i in range(parts - 1)]


# ------------------------------------------------------------------------------------------------- statistics by granules


def _granule(p: torch.Tensor) -> int:
    """The length of a granule. Where rows are cut as well it is one element."""
    cut_in_rows = is_dtensor(p) and not all(placement.is_replicate() or placement.is_shard(0) for placement in p.placements)
    if cut_in_rows or p.dim() == 0 or p.numel() == 0:
        return 1
    return gcd(p.numel() // p.shape[0], OPTIMIZER_BLOCKSIZE)


def _by_granules(p: torch.Tensor, shape: torch.Size) -> tuple[int, ...]:
    """The shape of the statistics of ``p`` or a part of it, which has ``shape``."""
    granule = _granule(p)
    return tuple(shape) if granule == 1 else (shape[0], p.numel() // p.shape[0] // granule)


def _spread(absmax: torch.Tensor, p: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Statistics of blocks, [..., blocks], for every granule."""
    granule = _granule(p)
    spread = absmax.repeat_interleave(OPTIMIZER_BLOCKSIZE // granule, dim=-1)[..., : shape.numel() // granule]
    return spread.reshape(*absmax.shape[:-1], *_by_granules(p, shape))


def absmax_by_granules(absmax: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Statistics of the local blocks, float32 [..., blocks], by granules: laid out as ``p`` is, with the same first dimension."""
    leading = absmax.shape[:-1]
    return like_parameter(_spread(absmax, p, local(p).shape), p, (*leading, *_by_granules(p, p.shape)), len(leading))


def blocks_from_granules(codes: torch.Tensor, absmax: torch.Tensor, qmap: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """8-bit codes whose statistics may be by granules, in blocks.

    Args:
        codes: uint8, of any shape.
        absmax: float32, for blocks of 256 or for equal parts of these.
        qmap: the code table.

    Returns:
        codes, of the same shape, and absmax [blocks]. Blocks whose granules have one absmax are as they were, others are quantised anew.

    Raises:
        ValueError: ``absmax`` fits neither.
    """
    n, count = codes.numel(), blocks(codes.numel(), OPTIMIZER_BLOCKSIZE)
    if absmax.numel() == count:
        return codes, absmax.reshape(-1)
    granule = n // max(absmax.numel(), 1)
    if granule == 0 or granule * absmax.numel() != n or OPTIMIZER_BLOCKSIZE % granule != 0:
        raise ValueError(f"8-bit state of {n} elements needs {count} values of absmax, got {absmax.numel()}")
    each = OPTIMIZER_BLOCKSIZE // granule
    spread = absmax.reshape(-1)
    padded = torch.cat([spread, spread[-1:].expand(count * each - spread.numel())]).view(count, each)
    same = (padded == padded[:, :1]).all(dim=1)
    if same.all():
        return codes, padded[:, 0].contiguous()
    values = (qmap[codes.reshape(-1).long()] * spread.repeat_interleave(granule)).view(codes.shape)
    new_codes, new_absmax = quantised(values, qmap)
    kept = same.repeat_interleave(OPTIMIZER_BLOCKSIZE)[:n].view(codes.shape)
    return torch.where(kept, codes, new_codes), torch.where(same, padded[:, 0], new_absmax)


def quantised(values: torch.Tensor, qmap: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 codes and absmax of a moment."""
    codes, state = quantize_blockwise(values.to(torch.float32).contiguous(), code=qmap, blocksize=OPTIMIZER_BLOCKSIZE)
    return codes, state.absmax


def dequantised(codes: torch.Tensor, absmax: torch.Tensor, qmap: torch.Tensor) -> torch.Tensor:
    """The moment in float32."""
    return dequantize_blockwise(codes.contiguous(), absmax=absmax.reshape(-1), code=qmap, blocksize=OPTIMIZER_BLOCKSIZE)


# ------------------------------------------------------------------------------------------------------- norms of sharded updates


def limited_learning_rate(p: torch.Tensor, call) -> dict[str, float]:
    """Settings that step one sharded parameter under the limit ``max_unorm``, whose norms run over all processes.

    The update is made once on copies, for its norm. All processes must take part.

    Args:
        p: the parameter.
        call: the call of the operator that would step its local part.
    """
    settings = call.settings
    part, unorm = call.p[0], call.norm_of_update()
    norm, param_norm = (_global_norm(value, p) for value in (unorm.squeeze(), torch.linalg.vector_norm(part, dtype=torch.float32)))
    unorm.fill_(norm)
    limit = settings["max_unorm"] * param_norm
    factor = limit / norm if norm > limit > 0.0 else 1.0
    decay = settings["weight_decay"]
    return {"lr": settings["lr"] * factor, "weight_decay": decay / factor if call.decays_with_learning_rate() else decay, "max_unorm": 0.0}


def _global_norm(norm: torch.Tensor, p: torch.Tensor) -> float:
    from_shards = [_partial() if placement.is_shard() else placement for placement in p.placements]
    return _dtensor_type().from_local(norm.square(), p.device_mesh, from_shards, run_check=False).full_tensor().sqrt().item()


def _partial():
    return sys.modules["torch.distributed.tensor"].Partial()
