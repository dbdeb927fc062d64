"""Triton kernels of softmax and sigmoid cross-entropy: one program per row, in blocks of columns, in float32.

The target of a block of classes is made on the fly from class indices, soft labels or a pair of either, so class
indices never become one-hot rows. An optional pointer is None when it is not used.
"""

import triton
import triton.language as tl


@triton.jit
def softmax_fwd_kernel(
    logits_ptr,  # [batch, classes], rows `stride_logits` apart
    labels_ptr,  # [batch] int64, or [batch, classes] with rows `stride_labels` apart
    labels_b_ptr,  # like labels, rows `stride_labels_b` apart, or None
    mix_weight_ptr,  # [batch], or None without labels_b
    loss_ptr,  # out [batch] float32
    statistics_ptr,  # out [3, batch] float32: the largest logit, log sum exp(logit - largest), sum of the target
    gradient_ptr,  # out [batch, classes]: the gradient of the mean loss; None where no gradient is needed
    batch,
    classes,
    stride_logits,
    stride_labels,
    stride_labels_b,
    label_smoothing,
    z_loss,
    mean_share,  # 1 / batch
    SOFT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    first, second = shares(labels_ptr, labels_b_ptr, mix_weight_ptr, row, classes, label_smoothing, SOFT)

    # The sums are relative to the largest logit so far, so that large logits do not cancel in them. The first logit
    # starts it: unlike -inf, its difference to the next largest is finite.
    largest = tl.load(logits_ptr + row * stride_logits).to(tl.float32)
    exp_sum = tl.zeros([BLOCK_N], tl.float32)  # exp(logit - largest)
    target_sum = tl.zeros([BLOCK_N], tl.float32)
    product_sum = tl.zeros([BLOCK_N], tl.float32)  # target * (logit - largest)
    for start in range(0, classes, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        mask = column < classes
        # the row is read again below: it should stay in the cache until then
        pointers = logits_ptr + row * stride_logits + column
        logits = tl.load(pointers, mask=mask, other=0, eviction_policy="evict_last").to(tl.float32)
        target = target_block(
            labels_ptr, labels_b_ptr, row, column, mask, classes, stride_labels, stride_labels_b,
            label_smoothing, first, second, SOFT,
        )  # fmt: skip
        before = largest
        largest = tl.maximum(before, tl.max(tl.where(mask, logits, float("-inf")), axis=0))
        exp_sum = exp_sum * tl.exp(before - largest) + tl.where(mask, tl.exp(logits - largest), 0.0)
        product_sum += target_sum * (before - largest) + target * (logits - largest)
        target_sum += target

    log_sum = tl.log(tl.sum(exp_sum, axis=0))
    target_total = tl.sum(target_sum, axis=0)
    log_partition = largest + log_sum
    loss = target_total * log_sum - tl.sum(product_sum, axis=0) + z_loss * log_partition * log_partition
    tl.store(loss_ptr + row, loss)
    tl.store(statistics_ptr + row, largest)
    tl.store(statistics_ptr + batch + row, log_sum)
    tl.store(statistics_ptr + 2 * batch + row, target_total)

    if gradient_ptr is not None:
        for start in range(0, classes, BLOCK_N):
            column = start + tl.arange(0, BLOCK_N)
            mask = column < classes
            pointers = logits_ptr + row * stride_logits + column
            logits = tl.load(pointers, mask=mask, other=0, eviction_policy="evict_first").to(tl.float32)
            target = target_block(
                labels_ptr, labels_b_ptr, row, column, mask, classes, stride_labels, stride_labels_b,
                label_smoothing, first, second, SOFT,
            )  # fmt: skip
            gradient = softmax_gradient(logits, target, largest, log_sum, target_total, z_loss) * mean_share
            out = gradient_ptr + row * classes + column
            tl.store(out, gradient.to(gradient_ptr.dtype.element_ty), mask=mask)


@triton.jit
def sigmoid_fwd_kernel(
    logits_ptr,  # [batch, classes], rows `stride_logits` apart
    labels_ptr,  # [batch] int64, or [batch, classes] with rows `stride_labels` apart
    labels_b_ptr,  # like labels, rows `stride_labels_b` apart, or None
    mix_weight_ptr,  # [batch], or None without labels_b
    loss_ptr,  # out [batch] float32
    gradient_ptr,  # out [batch, classes]: the gradient of the mean loss; None where no gradient is needed
    classes,
    stride_logits,
    stride_labels,
    stride_labels_b,
    label_smoothing,
    mean_share,  # 1 / batch
    SOFT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    first, second = shares(labels_ptr, labels_b_ptr, mix_weight_ptr, row, classes, label_smoothing, SOFT)
    loss = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, classes, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        mask = column < classes
        logits = tl.load(logits_ptr + row * stride_logits + column, mask=mask, other=0).to(tl.float32)
        target = target_block(
            labels_ptr, labels_b_ptr, row, column, mask, classes, stride_labels, stride_labels_b,
            label_smoothing, first, second, SOFT,
        )  # fmt: skip
        # softplus(x) - t x is (max(x, 0) - t x) + log(1 + e) with e = exp(-|x|), as its terms may be large. Most e are
        # tiny, where a logarithm is inaccurate but 2 artanh(e / (2 + e)), which is the same, is not. Its series ends
        # below float32 rounding, the argument being at most 1/3
        small = tl.exp(-tl.abs(logits))
        ratio = small / (2.0 + small)
        square = ratio * ratio
        series = 1.0 / 13 + square * (1.0 / 15)
        series = 1.0 / 9 + square * (1.0 / 11 + square * series)
        series = 1.0 / 5 + square * (1.0 / 7 + square * series)
        log1p = 2.0 * ratio * (1.0 + square * (1.0 / 3 + square * series))
        positive = tl.where(logits < 0, 0.0, logits)  # a comparison, as a maximum would drop NaN
        loss += tl.where(mask, positive - target * logits + log1p, 0.0)
        if gradient_ptr is not None:
            gradient = (tl.sigmoid(logits) - target) * mean_share
            out = gradient_ptr + row * classes + column
            tl.store(out, gradient.to(gradient_ptr.dtype.element_ty), mask=mask)
    tl.store(loss_ptr + row, tl.sum(loss, axis=0))


@triton.jit
def cross_entropy_bwd_kernel(
    grad_loss_ptr,  # [batch] float32: the gradient that comes to each row's loss
    logits_ptr,  # [batch, classes], rows `stride_logits` apart
    labels_ptr,  # [batch] int64, or [batch, classes] with rows `stride_labels` apart
    labels_b_ptr,  # like labels, rows `stride_labels_b` apart, or None
    mix_weight_ptr,  # [batch], or None without labels_b
    statistics_ptr,  # [3, batch] float32, see softmax_fwd_kernel; None for sigmoid
    gradient_ptr,  # out [batch, classes]
    batch,
    classes,
    stride_logits,
    stride_labels,
    stride_labels_b,
    label_smoothing,
    z_loss,
    mean_share,  # 1 / batch
    FILLED: tl.constexpr,  # whether gradient_ptr holds the gradient of the mean loss already
    SOFT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    scale = tl.load(grad_loss_ptr + row)
    if not FILLED or scale != mean_share:
        first, second = shares(labels_ptr, labels_b_ptr, mix_weight_ptr, row, classes, label_smoothing, SOFT)
        if statistics_ptr is not None:
            largest = tl.load(statistics_ptr + row)
            log_sum = tl.load(statistics_ptr + batch + row)
            target_total = tl.load(statistics_ptr + 2 * batch + row)
        for start in range(0, classes, BLOCK_N):
            column = start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
            mask = column < classes
            logits = tl.load(logits_ptr + row * stride_logits + column, mask=mask, other=0).to(tl.float32)
            target = target_block(
                labels_ptr, labels_b_ptr, row, column, mask, classes, stride_labels, stride_labels_b,
                label_smoothing, first, second, SOFT,
            )  # fmt: skip
            if statistics_ptr is not None:
                gradient = softmax_gradient(logits, target, largest, log_sum, target_total, z_loss) * scale
            else:
                gradient = (tl.sigmoid(logits) - target) * scale
            out = gradient_ptr + row * classes + column
            tl.store(out, gradient.to(gradient_ptr.dtype.element_ty), mask=mask)


@triton.jit
def softmax_gradient(logits, target, largest, log_sum, target_total, z_loss):
    probability = tl.exp((logits - largest) - log_sum)
    return probability * (target_total + 2 * z_loss * (largest + log_sum)) - target


@triton.jit
def shares(labels_ptr, labels_b_ptr, mix_weight_ptr, row, classes, label_smoothing, SOFT: tl.constexpr):
    """What the first and the second label of a row weigh in its target; NaN where a class index does not exist."""
    first, second = 1.0 - label_smoothing, 0.0
    if labels_b_ptr is not None:
        mix_weight = tl.load(mix_weight_ptr + row).to(tl.float32)
        second = first * (1.0 - mix_weight)
        first = first * mix_weight
    if not SOFT:
        label = tl.load(labels_ptr + row)
        first = tl.where((label >= 0) & (label < classes), first, float("nan"))
        if labels_b_ptr is not None:
            label_b = tl.load(labels_b_ptr + row)
            second = tl.where((label_b >= 0) & (label_b < classes), second, float("nan"))
    return first, second


@triton.jit
def target_block(
    labels_ptr, labels_b_ptr, row, column, mask, classes, stride_labels, stride_labels_b,
    label_smoothing, first, second, SOFT: tl.constexpr,
):  # fmt: skip
    """The target, mixed and smoothed, of these classes of a row; 0 where masked: [BLOCK_N] float32."""
    if SOFT:
        target = first * tl.load(labels_ptr + row * stride_labels + column, mask=mask, other=0).to(tl.float32)
        if labels_b_ptr is not None:
            label_b = tl.load(labels_b_ptr + row * stride_labels_b + column, mask=mask, other=0).to(tl.float32)
            target += second * label_b
    else:
        target = first * (column == tl.load(labels_ptr + row)).to(tl.float32)
        if labels_b_ptr is not None:
            target += second * (column == tl.load(labels_b_ptr + row)).to(tl.float32)
    return tl.where(mask, target + label_smoothing / classes, 0.0)
