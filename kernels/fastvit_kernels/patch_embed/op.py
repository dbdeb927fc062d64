"""The public patch embedding, its checks, launches and gradient."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit_kernels.checks import check_device, check_floating, check_parameter
from fastvit_kernels.dispatch import HAS_TRITON, Gpu, computed_dtype, gpu, unmeasured, uses_triton
from fastvit_kernels.patch_embed import reference
from fastvit_kernels.registration import register_gradient, register_op
from fastvit_kernels.table import Runs, tunable

if HAS_TRITON:
    import triton

    from fastvit_kernels.launch import launch
    from fastvit_kernels.patch_embed import kernels


def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    pos_embed: Tensor | None = None,
    cls_token: Tensor | None = None,
    register_tokens: Tensor | None = None,
    keep_indices: Tensor | None = None,
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    """Cuts images into P x P patches, projects each to D numbers, adds class token and position embedding.

    Args:
        images: uint8 [B, H, W, 3] or [B, 3, H, W], normalised here as (x / 255 - mean) / std in float32; or floating
            [B, 3, H, W], taken as normalised already. P must divide H and W.
        weight, bias: [D, 3, P, P] and [D], as in a Conv2d of stride P; any floating dtype.
        pos_embed: [1, N, D] for N = (H / P) * (W / P) patches, row by row; [1, 1 + N, D] with a class token, whose
            row is the first, as in timm.
        cls_token: [1, 1, D].
        register_tokens: [1, R, D], put between class token and patches, without a position (Darcet et al. 2024).
        keep_indices: int64 [B, K], the patches of each image to embed, in this order; the others are not computed. An
            image names a patch once. None embeds all.
        mean, std: of the three channels, for pixels scaled to [0, 1].

    Returns [B, N, D], or [B, 1 + R + N, D] with the class token and R registers first, in the dtype of weight, also
    under autocast, which acts on the product; K in place of N with `keep_indices`. Raises ValueError for a wrong shape
    or device and TypeError for a wrong dtype. An index outside 0..N-1, or given twice, is a ValueError on the CPU. A
    GPU does not wait to look: there the token of such an index is NaN (the reference trips a device-side assertion),
    and a patch given twice has a wrong gradient of its position. Only the reference has a gradient for images, so with
    images that require one it runs, and it is a RuntimeError if FASTVIT_KERNELS=triton was asked for. Source:
    Dosovitskiy et al. 2021, equation 1.
    """
    check_floating("weight", weight)
    if weight.ndim != 4 or weight.shape[1] != 3 or weight.shape[2] != weight.shape[3]:
        raise ValueError(f"weight must have shape [D, 3, P, P], got {list(weight.shape)}")
    embed_dim, patch = weight.shape[0], weight.shape[-1]
    check_parameter("bias", bias, [embed_dim], like=weight)
    check_device("images", images, like=weight)
    if len(mean) != 3 or len(std) != 3:
        raise ValueError(f"mean and std must have one number for each of 3 channels, got {mean} and {std}")
    images = channels_first(images)
    height, width = images.shape[2:]
    if height % patch or width % patch:
        raise ValueError(f"images of {height} x {width} pixels cannot be cut into patches of {patch} x {patch}")
    patches = (height // patch) * (width // patch)
    if cls_token is not None:
        check_parameter("cls_token", cls_token, [1, 1, embed_dim], like=weight)
    if register_tokens is not None:
        if register_tokens.ndim != 3:
            raise ValueError(f"register_tokens must have shape [1, R, {embed_dim}], got {list(register_tokens.shape)}")
        check_parameter("register_tokens", register_tokens, [1, register_tokens.shape[1], embed_dim], like=weight)
    if pos_embed is not None:
        positions = patches + int(cls_token is not None)  # a symbolic size plus a bool fails in PyTorch 2.11
        check_parameter("pos_embed", pos_embed, [1, positions, embed_dim], like=weight)
    if keep_indices is not None:
        check_indices(keep_indices, images, patches)
    learns = images.requires_grad and torch.is_grad_enabled()
    obstacle = "patch_embed has no gradient for images" if learns else None
    tensors = weight, bias, pos_embed, cls_token, register_tokens
    if uses_triton("patch_embed", weight, obstacle, lambda: runs_for(images, weight, keep_indices)):
        if torch.is_autocast_enabled(weight.device.type):
            tensors = weight.to(torch.get_autocast_dtype(weight.device.type)), *tensors[1:]
        return patch_embed_op(images, *tensors, keep_indices, mean, std)
    return reference.patch_embed(images, *tensors, keep_indices, mean, std)


def runs_for(images: Tensor, weight: Tensor, keep_indices: Tensor | None) -> Runs:
    (width, *_, patch), (batch, _, height, columns) = weight.shape, images.shape
    kept = (height // patch) * (columns // patch) if keep_indices is None else keep_indices.shape[1]
    return runs(patch, images.dtype, computed_dtype("patch_embed", weight), width, batch * kept, gpu(images.device))


@tunable(Runs, "patch_embed", sizes=("width", "patches"), providers=("triton", "reference"))
def runs(patch: int, images: torch.dtype, dtype: torch.dtype, width: int, patches: int, on: Gpu) -> Runs:
    return unmeasured("patch_embed", dtype)


def check_indices(indices: Tensor, images: Tensor, patches: int) -> None:
    if indices.dtype != torch.int64:
        raise TypeError(f"keep_indices must be int64, got {indices.dtype}")
    if indices.ndim != 2 or indices.shape[0] != images.shape[0]:
        raise ValueError(f"keep_indices must have shape [{images.shape[0]}, K], got {list(indices.shape)}")
    check_device("keep_indices", indices, like=images)
    # a compiled graph cannot look at values: there PyTorch checks the indices of the reference
    if indices.device.type == "cpu" and indices.numel() and not torch.compiler.is_compiling():
        low, high = indices.min().item(), indices.max().item()
        if low < 0 or high >= patches:
            raise ValueError(f"keep_indices must lie in 0..{patches - 1}, got values from {low} to {high}")
        ordered = indices.sort(dim=1).values
        if (ordered[:, 1:] == ordered[:, :-1]).any():
            raise ValueError("keep_indices must name each patch of an image once")


def channels_first(images: Tensor) -> Tensor:
    """A [B, 3, H, W] view of the images, after checking their dtype and layout."""
    if images.dtype != torch.uint8:
        check_floating("images (unless uint8)", images)
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must have shape [B, 3, H, W] when floating point, got {list(images.shape)}")
        return images
    if images.ndim != 4 or len([axis for axis in (1, 3) if images.shape[axis] == 3]) != 1:
        raise ValueError(f"images must have shape [B, H, W, 3] or [B, 3, H, W], got {list(images.shape)}")
    return images if images.shape[1] == 3 else images.permute(0, 3, 1, 2)


def launch_forward(
    images: Tensor,
    weight: Tensor,
    bias: Tensor,
    pos_embed: Tensor | None,
    cls_token: Tensor | None,
    register_tokens: Tensor | None,
    keep_indices: Tensor | None,
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    tokens = fake_forward(images, weight, bias, pos_embed, cls_token, register_tokens, keep_indices, mean, std)
    batch, width, patch = images.shape[0], weight.shape[0], weight.shape[-1]
    patches, columns = patch_grid(images, patch)
    kept = patches if keep_indices is None else keep_indices.shape[1]
    if kept == 0:  # programs own patches, and write what comes before them too
        prefix = reference.prefix_tokens(pos_embed, cls_token, register_tokens)
        return tokens.copy_(torch.cat(prefix, dim=1)) if prefix else tokens
    tile = forward_tile(patch, images.dtype, weight.dtype, width, batch * kept, gpu(images.device))
    depth = 3 * patch * patch
    packed = pack(weight, channels_last(images), triton.cdiv(depth, tile.depth) * tile.depth)
    launch(
        kernels.patch_embed_fwd_kernel,
        (triton.cdiv(batch * kept, tile.rows) * triton.cdiv(width, tile.columns),),
        images,
        packed,
        bias.contiguous(),
        *(None if tensor is None else tensor.contiguous() for tensor in (pos_embed, cls_token, register_tokens)),
        None if keep_indices is None else keep_indices.contiguous(),
        tokens,
        batch * kept,
        width,
        depth,
        packed.shape[1],
        kept,
        0 if register_tokens is None else register_tokens.shape[1],
        patches,
        columns,
        *pixel_order(images, patch),
        *normalisation(mean, std),
        CHANNELS_LAST=channels_last(images),
        PRECISION="ieee",
        SEPARATE=gpu(images.device).arch in ("sm_90", "interpreter"),  # where products are wgmma, and where tests run
        BLOCK_M=tile.rows,
        BLOCK_N=tile.columns,
        BLOCK_K=tile.depth,
        STAGES=tile.stages,
        num_warps=tile.num_warps,
    )
    return tokens


def fake_forward(
    images: Tensor,
    weight: Tensor,
    bias: Tensor,
    pos_embed: Tensor | None,
    cls_token: Tensor | None,
    register_tokens: Tensor | None,
    keep_indices: Tensor | None,
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    kept = patch_grid(images, weight.shape[-1])[0] if keep_indices is None else keep_indices.shape[1]
    prefix = sum(tensor.shape[1] for tensor in (cls_token, register_tokens) if tensor is not None)
    return bias.new_empty(images.shape[0], prefix + kept, weight.shape[0])


def launch_backward(
    grad: Tensor,
    images: Tensor,
    weight: Tensor,
    keep_indices: Tensor | None,
    has_cls: bool,
    registers: int,
    mean: Sequence[float],
    std: Sequence[float],
    with_weight: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the weight, in its dtype, and of bias, pos_embed, cls_token and register_tokens in `dtype`."""
    batch, width, patch = images.shape[0], weight.shape[0], weight.shape[-1]
    patches, columns = patch_grid(images, patch)
    prefix = has_cls + registers
    grad = grad if grad.stride(2) == 1 else grad.contiguous()

    # one pass over the gradient gives all that is not a matrix product
    sums = grad.sum(dim=0, dtype=torch.float32)  # [prefix + K, D]
    if keep_indices is None:
        position_sums = sums[prefix:]
    else:
        slots = torch.arange(keep_indices.shape[1], device=images.device).expand_as(keep_indices)
        slot_of_patch = keep_indices.new_full((batch, patches), -1).scatter_(1, keep_indices, slots)
        position_sums = sums.new_empty(patches, width)
        launch(
            kernels.position_sum_kernel,
            (patches, triton.cdiv(width, 512)),
            grad,
            slot_of_patch,
            position_sums,
            batch,
            patches,
            width,
            prefix,
            grad.stride(0),
            grad.stride(1),
            BLOCK_N=512,
        )
    grad_pos = torch.cat([sums[:has_cls], position_sums])[None]
    grad_bias = position_sums.sum(dim=0)
    others = (grad_bias, grad_pos, sums[None, :has_cls], sums[None, has_cls:prefix])
    grad_weight = (
        weight_gradient(grad, images, weight, keep_indices, prefix, mean, std) if with_weight else weight.new_empty(0)
    )
    return grad_weight, *(tensor.to(dtype, copy=True) for tensor in others)  # type: ignore[return-value]  # five in all


def weight_gradient(
    grad: Tensor,
    images: Tensor,
    weight: Tensor,
    keep_indices: Tensor | None,
    prefix: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    """patches^T @ grad over all patches, split into runs of rows whose float32 results are added in a fixed order."""
    width, patch = weight.shape[0], weight.shape[-1]
    patches, columns = patch_grid(images, patch)
    kept, depth = grad.shape[1] - prefix, 3 * patch * patch
    grad = grad.to(weight.dtype)  # wider under autocast
    rows = images.shape[0] * kept
    tile = backward_tile(patch, images.dtype, weight.dtype, width, rows, gpu(images.device))
    tiles = triton.cdiv(width, tile.columns) * triton.cdiv(depth, tile.depth)
    splits = max(1, min(2 * gpu(images.device).multiprocessors // tiles, triton.cdiv(rows, tile.rows)))
    rows_per_split = triton.cdiv(triton.cdiv(rows, splits), tile.rows) * tile.rows
    partial = grad.new_empty(splits, width, depth, dtype=torch.float32)
    launch(
        kernels.patch_embed_bwd_kernel,
        (tiles, splits),
        grad,
        images,
        None if keep_indices is None else keep_indices.contiguous(),
        partial,
        rows,
        rows_per_split,
        width,
        depth,
        kept,
        prefix,
        patches,
        columns,
        patch,
        *pixel_order(images, patch)[1:3],
        grad.stride(0),
        grad.stride(1),
        *pixel_order(images, patch)[3:],
        *normalisation(mean, std),
        CHANNELS_LAST=channels_last(images),
        PRECISION="ieee",
        BLOCK_M=tile.rows,
        BLOCK_N=tile.columns,
        BLOCK_K=tile.depth,
        STAGES=tile.stages,
        num_warps=tile.num_warps,
    )
    return unpack(partial.sum(dim=0), weight, channels_last(images))


def fake_backward(
    grad: Tensor,
    images: Tensor,
    weight: Tensor,
    keep_indices: Tensor | None,
    has_cls: bool,
    registers: int,
    mean: Sequence[float],
    std: Sequence[float],
    with_weight: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    width, positions = weight.shape[0], patch_grid(images, weight.shape[-1])[0] + int(has_cls)
    return (
        weight.new_empty(weight.shape if with_weight else 0),
        weight.new_empty(width, dtype=dtype),
        weight.new_empty(1, positions, width, dtype=dtype),
        weight.new_empty(1, int(has_cls), width, dtype=dtype),
        weight.new_empty(1, registers, width, dtype=dtype),
    )


class Tile(NamedTuple):
    """Launch parameters of both kernels."""

    rows: int  # patches
    columns: int  # of the embedding
    depth: int  # numbers of a patch
    num_warps: int
    stages: int  # steps whose operands are on their way at once


@tunable(Tile, "patch_embed_fwd_kernel", sizes=("width", "patches"))
def forward_tile(patch: int, images: torch.dtype, dtype: torch.dtype, width: int, patches: int, on: Gpu) -> Tile:
    blocks = (64, 64, 32, 4) if dtype == torch.float32 else (128, 128, 64, 8)
    return Tile(*blocks, stages=stages(on))


@tunable(Tile, "patch_embed_bwd_kernel", sizes=("width", "patches"))
def backward_tile(patch: int, images: torch.dtype, dtype: torch.dtype, width: int, patches: int, on: Gpu) -> Tile:
    if dtype == torch.float32:
        return Tile(32, 64, 64, 8, stages=stages(on))
    rows = 32 if on.arch == "sm_80" else 64  # with more rows there, or more stages on sm_100, registers spill
    return Tile(rows, 128, 128, 8, stages=2 if on.arch == "sm_100" else stages(on))


def stages(on: Gpu) -> int:
    """What the 64 KiB of an AMD multiprocessor hold, or 3."""
    return 2 if on.arch.startswith("gfx") else 3


def patch_grid(images: Tensor, patch: int) -> tuple[int, int]:
    """Patches of an image, and how many of them lie side by side."""
    height, width = images.shape[2:]
    return (height // patch) * (width // patch), width // patch


def channels_last(images: Tensor) -> bool:
    """Whether the three numbers of a pixel are adjacent, for images [B, 3, H, W] by strides."""
    return images.stride(1) == 1 and images.stride(3) != 1


def pixel_order(images: Tensor, patch: int) -> tuple[int, ...]:
    """How a kernel walks through a patch, see kernels.py: patch, middle, inner and the strides."""
    batch, channel, height, width = images.stride()
    if channels_last(images):
        return patch, patch, 3, batch, height, width, height, width, channel
    return patch, patch, patch, batch, height, width, channel, height, width


def pack(weight: Tensor, channels_last: bool, padded_depth: int) -> Tensor:
    """The weight [D, 3, P, P] as rows in the order of the pixels, ended by zeros: [D, padded_depth].

    A copy of 1.6 MB for ViT-H/14, so that rows of 588 numbers become aligned and are read 16 bytes at a time.
    """
    rows = weight.permute(0, 2, 3, 1) if channels_last else weight
    rows = rows.reshape(weight.shape[0], -1)
    return F.pad(rows, (0, padded_depth - rows.shape[1])).contiguous()


def unpack(rows: Tensor, weight: Tensor, channels_last: bool) -> Tensor:
    """Rows [D, 3 * P * P] in the order of the pixels as a contiguous tensor of the shape and dtype of the weight."""
    rows = rows.to(weight.dtype)
    if channels_last:
        width, _, patch, _ = weight.shape
        return rows.view(width, patch, patch, 3).permute(0, 3, 1, 2).contiguous()
    return rows.view(weight.shape)


def normalisation(mean: Sequence[float], std: Sequence[float]) -> list[float]:
    """(x / 255 - mean) / std as x * scale + shift: three scales, three shifts."""
    return [1 / (255 * s) for s in std] + [-m / s for m, s in zip(mean, std, strict=True)]


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, weight, bias, pos_embed, cls_token, register_tokens, keep_indices, ctx.mean, ctx.std = inputs
    ctx.dtype = bias.dtype
    ctx.save_for_backward(images, weight, keep_indices)  # the weight for its shape and dtype
    ctx.has_pos, ctx.has_cls = pos_embed is not None, cls_token is not None
    ctx.registers = None if register_tokens is None else register_tokens.shape[1]


def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    images, weight, keep_indices = ctx.saved_tensors
    grad_weight, grad_bias, grad_pos, grad_cls, grad_registers = patch_embed_backward_op(
        grad,
        images,
        weight,
        keep_indices,
        ctx.has_cls,
        ctx.registers or 0,
        ctx.mean,
        ctx.std,
        ctx.needs_input_grad[1],
        ctx.dtype,
    )
    return (
        None,
        grad_weight if ctx.needs_input_grad[1] else None,
        grad_bias,
        grad_pos if ctx.has_pos else None,
        grad_cls if ctx.has_cls else None,
        None if ctx.registers is None else grad_registers,
        None,
        None,
        None,
    )


patch_embed_op = register_op(
    "patch_embed(Tensor images, Tensor weight, Tensor bias, Tensor? pos_embed, Tensor? cls_token,"
    " Tensor? register_tokens, Tensor? keep_indices, float[] mean, float[] std) -> Tensor",
    launch_forward,
    fake_forward,
)
patch_embed_backward_op = register_op(
    "patch_embed_backward(Tensor grad, Tensor images, Tensor weight, Tensor? keep_indices, bool has_cls, int registers,"
    " float[] mean, float[] std, bool with_weight, ScalarType dtype) -> (Tensor grad_weight, Tensor grad_bias,"
    " Tensor grad_pos, Tensor grad_cls, Tensor grad_registers)",
    launch_backward,
    fake_backward,
)
register_gradient(patch_embed_op, patch_embed_backward_op, setup_context, backward)
