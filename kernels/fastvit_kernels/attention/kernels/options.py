"""What a call may or may not have: bias and dropout. Of None, every helper here makes None, or changes nothing."""

import triton
import triton.language as tl

from fastvit_kernels.attention.kernels.tiles import scores


@triton.jit
def locate_bias(bias, image, head):
    """The bias of a head: pointer, strides of queries and of keys."""
    if bias is None:
        return
    else:
        return bias[0] + (image * bias[1] + head * tl.cast(bias[2], tl.int64)), bias[3], bias[4]


@triton.jit
def transposed(bias):
    if bias is None:
        return
    else:
        return bias[0], bias[2], bias[1]


@triton.jit
def load_bias(bias, first_row, rows, first_column, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A block of a bias, times log2(e), [ROWS, COLUMNS]; `bias` is a pointer and the strides of rows and columns."""
    if bias is None:
        return
    else:
        ptr, stride_row, stride_column = bias
        ptr += tl.cast(first_row, tl.int64) * stride_row + tl.cast(first_column, tl.int64) * stride_column
        row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
        inside = (first_row + row < rows) & (first_column + column < columns)
        tile = tl.load(ptr + row * stride_row + column * stride_column, mask=inside, other=0)
        return tile.to(tl.float32) * 1.4426950408889634


@triton.jit
def base_2_scores(a, b, scale, bias):
    """a b^T as exponents of 2, [rows of a, rows of b]."""
    s = scores(a, b) * scale
    if bias is not None:
        s += bias
    return s


@triton.jit
def seeded(dropout, head_index):
    """The seed itself, the rate, and which head this is."""
    if dropout is None:
        return
    else:
        return tl.load(dropout[0]), dropout[1], head_index


@triton.jit
def halve(token):
    """A number that `token` and the token 8 further, or 8 back, have in common, and which of the two it is."""
    return token // 16 * 8 + token % 8, token // 8 % 2


@triton.jit
def draw_kept(dropout, first_row, first_column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ROWS_ARE_KEYS: tl.constexpr):
    """Which probabilities dropout keeps, [ROWS, COLUMNS]: decided by seed, head, query and key, whatever the block.

    One call of Philox gives four random numbers: for two queries, 8 apart, and two keys, 8 apart. In the layout of a
    matrix product these four scores are in the same thread, in rows as in columns.
    """
    if dropout is None:
        return
    else:
        seed, rate, head_index = dropout
        if ROWS == 1:
            row, second_row = halve(first_row)
            column, second_column = halve(first_column + tl.arange(0, COLUMNS)[None, :])
        else:
            row = first_row // 2 + tl.arange(0, ROWS // 2)[:, None]
            column = first_column // 2 + tl.arange(0, COLUMNS // 2)[None, :]
        if ROWS_ARE_KEYS:
            a, c, b, d = tl.philox(seed, row, column, head_index, 0)
        else:
            a, b, c, d = tl.philox(seed, column, row, head_index, 0)
        if ROWS == 1:
            random = tl.where(second_column == 0, tl.where(second_row == 0, a, c), tl.where(second_row == 0, b, d))
        else:
            random = tl.join(tl.join(a, c), tl.join(b, d))  # [ROWS / 2, COLUMNS / 2, 2, 2]
            random = tl.reshape(random, ROWS // 16, 8, COLUMNS // 16, 8, 2, 2)
            random = tl.reshape(tl.permute(random, 0, 4, 1, 2, 5, 3), ROWS, COLUMNS)
        return tl.uint_to_uniform_float(random) >= rate


@triton.jit
def drop(weights, kept):
    """Not yet divided by the chance to be kept."""
    if kept is None:
        return weights
    else:
        return tl.where(kept, weights, 0.0)


@triton.jit
def kept_scale(dropout):
    """What kept probabilities are multiplied by."""
    if dropout is None:
        return
    else:
        return 1 / (1 - dropout[1])
