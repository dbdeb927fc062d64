"""Triton kernels of patch embedding: pixels are gathered and normalised where they are multiplied.

A patch is a row of `depth` = 3 * P * P numbers, in the order in which the image lies in memory, so that neighbouring
lanes read neighbouring bytes: channel, row, column; or row, column, channel if the channels of a pixel are adjacent. In
either order number k is digit (k // (middle * inner), k // inner % middle, k % inner), each with a stride of its own.
"""

import triton
import triton.language as tl


@triton.jit
def patch_embed_fwd_kernel(
    images_ptr,  # [batch, 3, height, width] by strides; uint8, or floating and normalised
    weight_ptr,  # [width, padded_depth], 0 beyond depth
    bias_ptr,  # [width]
    pos_ptr,  # [patches, width], or with the class token's row first; None
    cls_ptr,  # [width] or None
    registers_ptr,  # [registers, width] or None
    keep_ptr,  # [batch, kept] int64: the patches of each image to embed; None for all
    tokens_ptr,  # out [batch, prefix + kept, width], prefix = class token and registers
    rows,  # batch * kept
    width,
    depth,
    padded_depth,
    kept,
    registers,
    patches,  # of a whole image
    columns,  # patches side by side
    patch,
    middle,
    inner,
    stride_batch,
    stride_height,
    stride_width,
    stride_outer,
    stride_middle,
    stride_inner,
    scale_r,
    scale_g,
    scale_b,
    shift_r,
    shift_g,
    shift_b,
    CHANNELS_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    SEPARATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    # programs with the same rows are neighbours: they share the pixels in the cache, as all share the weight
    tiles_n = tl.cdiv(width, BLOCK_N)
    row = tl.program_id(0) // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    column = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    row_mask, column_mask = row < rows, column < width
    image, index, corner = locate(
        row, row_mask, keep_ptr, kept, columns, patch, stride_batch, stride_height, stride_width
    )
    exists = row_mask & (index >= 0) & (index < patches)

    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.range(0, padded_depth, BLOCK_K, num_stages=STAGES):
        k = start + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        pixels = patch_block(
            images_ptr, corner, exists, k, depth, middle, inner, stride_outer, stride_middle, stride_inner,
            scale_r, scale_g, scale_b, shift_r, shift_g, shift_b, CHANNELS_LAST,
        )  # fmt: skip
        weight = tl.load(
            weight_ptr + column.to(tl.int64)[:, None] * padded_depth + k[None, :], mask=column_mask[:, None], other=0
        )  # [BLOCK_N, BLOCK_K]
        if SEPARATE and pixels.dtype != weight.dtype and weight.dtype != tl.float32:
            # Converted pixels go from registers into a wgmma. If it added to `total`, it would still be running while
            # the next pixels are computed, and ptxas may give those the same registers. The minus signs keep Triton
            # from merging product and sum; the result of a separate product is waited for.
            negative = -pixels.to(tl.float32)
            total -= tl.dot(negative.to(weight.dtype), weight.T, input_precision=PRECISION)
        else:
            total = tl.dot(pixels.to(weight.dtype), weight.T, total, input_precision=PRECISION)

    element = tokens_ptr.dtype.element_ty
    mask = row_mask[:, None] & column_mask[None, :]
    total += tl.load(bias_ptr + column, mask=column_mask, other=0).to(tl.float32)[None, :]
    has_cls: tl.constexpr = 1 if cls_ptr is not None else 0
    prefix = registers + has_cls
    if pos_ptr is not None:
        position = (index + has_cls)[:, None] * width + column[None, :]
        total += tl.load(pos_ptr + position, mask=exists[:, None] & column_mask[None, :], other=0).to(tl.float32)
    if keep_ptr is not None:
        total = tl.where(exists[:, None], total, float("nan"))  # a patch that the image does not have
    first = image * (prefix + kept) * width  # where the tokens of the image begin: [BLOCK_M] int64
    out = first[:, None] + (prefix + row % kept)[:, None] * width + column[None, :]
    tl.store(tokens_ptr + out, total.to(element), mask=mask)

    # what comes before the patches of an image is written with its first patch
    first_mask = (row_mask & (row % kept == 0))[:, None] & column_mask[None, :]
    if cls_ptr is not None:
        cls = tl.load(cls_ptr + column, mask=column_mask, other=0).to(tl.float32)
        if pos_ptr is not None:
            cls += tl.load(pos_ptr + column, mask=column_mask, other=0).to(tl.float32)
        cls_block = tl.broadcast_to(cls.to(element)[None, :], [BLOCK_M, BLOCK_N])
        tl.store(tokens_ptr + first[:, None] + column[None, :], cls_block, mask=first_mask)
    if registers_ptr is not None:
        for register in range(0, registers):
            value = tl.load(registers_ptr + register * width + column, mask=column_mask, other=0)
            out = first[:, None] + (has_cls + register) * width + column[None, :]
            tl.store(tokens_ptr + out, tl.broadcast_to(value[None, :], [BLOCK_M, BLOCK_N]), mask=first_mask)


@triton.jit
def patch_embed_bwd_kernel(
    grad_ptr,  # [batch, prefix + kept, width] by strides, adjacent columns
    images_ptr,  # [batch, 3, height, width] by strides; uint8, or floating and normalised
    keep_ptr,  # [batch, kept] int64, or None
    partial_ptr,  # out [splits, width, depth] float32: the gradient of the weight by these rows
    rows,  # batch * kept
    rows_per_split,  # a multiple of BLOCK_M
    width,
    depth,
    kept,
    prefix,
    patches,  # of a whole image
    columns,  # patches side by side
    patch,
    middle,
    inner,
    stride_grad_batch,
    stride_grad_token,
    stride_batch,
    stride_height,
    stride_width,
    stride_outer,
    stride_middle,
    stride_inner,
    scale_r,
    scale_g,
    scale_b,
    shift_r,
    shift_g,
    shift_b,
    CHANNELS_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    tiles_n = tl.cdiv(width, BLOCK_N)
    column = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    k = tl.program_id(0) // tiles_n * BLOCK_K + tl.arange(0, BLOCK_K)  # [BLOCK_K]
    split = tl.program_id(1)
    column_mask = column < width

    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    end = min(rows, (split + 1) * rows_per_split)
    for start in tl.range(split * rows_per_split, end, BLOCK_M, num_stages=STAGES):
        row = start + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        row_mask = row < rows
        image, index, corner = locate(
            row, row_mask, keep_ptr, kept, columns, patch, stride_batch, stride_height, stride_width
        )
        exists = row_mask & (index >= 0) & (index < patches)
        token = image * stride_grad_batch + (prefix + row % kept) * stride_grad_token  # [BLOCK_M] int64
        mask = row_mask[:, None] & column_mask[None, :]
        grad = tl.load(grad_ptr + token[:, None] + column[None, :], mask=mask, other=0)  # [BLOCK_M, BLOCK_N]
        pixels = patch_block(
            images_ptr, corner, exists, k, depth, middle, inner, stride_outer, stride_middle, stride_inner,
            scale_r, scale_g, scale_b, shift_r, shift_g, shift_b, CHANNELS_LAST,
        )  # fmt: skip
        total = tl.dot(grad.T, pixels.to(grad.dtype), total, input_precision=PRECISION)

    out = (split.to(tl.int64) * width + column)[:, None] * depth + k[None, :]
    tl.store(partial_ptr + out, total, mask=column_mask[:, None] & (k < depth)[None, :])


@triton.jit
def position_sum_kernel(
    grad_ptr,  # [batch, prefix + kept, width] by strides, adjacent columns
    slot_ptr,  # [batch, patches] int64: where a patch is among those kept, or -1
    sum_ptr,  # out [patches, width] float32: the sum over the images that kept a patch
    batch,
    patches,
    width,
    prefix,
    stride_grad_batch,
    stride_grad_token,
    BLOCK_N: tl.constexpr,
):
    patch = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N], tl.float32)
    for image in range(0, batch):
        slot = tl.load(slot_ptr + image * patches + patch)
        token = tl.cast(image, tl.int64) * stride_grad_batch + (prefix + slot) * stride_grad_token
        total += tl.load(grad_ptr + token + column, mask=(column < width) & (slot >= 0), other=0).to(tl.float32)
    tl.store(sum_ptr + patch.to(tl.int64) * width + column, total, mask=column < width)


@triton.jit
def locate(row, row_mask, keep_ptr, kept, columns, patch, stride_batch, stride_height, stride_width):
    """Image and patch index of each row, and the offset of the patch's first pixel: each [BLOCK_M], int64."""
    image = (row // kept).to(tl.int64)
    index = (row % kept).to(tl.int64)
    if keep_ptr is not None:
        index = tl.load(keep_ptr + row, mask=row_mask, other=0)
    down, right = index // columns * patch, index % columns * patch
    return image, index, image * stride_batch + down * stride_height + right * stride_width


@triton.jit
def patch_block(
    images_ptr, corner, exists, k, depth, middle, inner, stride_outer, stride_middle, stride_inner,
    scale_r, scale_g, scale_b, shift_r, shift_g, shift_b, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """Numbers k of these patches, normalised in float32 if they are bytes: [BLOCK_M, BLOCK_K]."""
    outer = k // (middle * inner)
    offset = outer * stride_outer + k // inner % middle * stride_middle + k % inner * stride_inner  # [BLOCK_K]
    mask = exists[:, None] & (k < depth)[None, :]
    pixels = tl.load(images_ptr + corner[:, None] + offset[None, :], mask=mask, other=0)
    if images_ptr.dtype.element_ty == tl.uint8:
        channel = k % inner if CHANNELS_LAST else outer
        scale = tl.where(channel == 0, scale_r, tl.where(channel == 1, scale_g, scale_b))
        shift = tl.where(channel == 0, shift_r, tl.where(channel == 1, shift_g, shift_b))
        # bytes beyond the mask become `shift`; what they are multiplied by is 0 or is not stored
        pixels = pixels.to(tl.float32) * scale[None, :] + shift[None, :]
    return pixels
