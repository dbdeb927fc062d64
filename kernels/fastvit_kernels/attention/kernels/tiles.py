"""Blocks of rows of one head: where they are, how they are loaded and stored, and their products.

`rows` are a pointer to the first token of a head, the stride from token to token, and the number of tokens. A block of
them is a tuple of matrices, one per piece of the head dimension.
"""

import triton
import triton.language as tl
from triton.language.target_info import current_target

TRITON = tuple(int(number) for number in triton.__version__.split(".")[:2])


@triton.constexpr_function
def first_of(sizes, i):
    """Where part i begins, when parts of these sizes follow each other."""
    return sum(sizes[:i])


@triton.constexpr_function
def products_may_chain():
    """Whether a product may add to the one just before it.

    With tcgen05, Triton before 3.9 may start the second before the first is done (triton-lang/triton#10821).
    """
    target = current_target()
    if target is None or target.backend != "cuda" or not 100 <= target.arch < 120:
        return True
    return TRITON >= (3, 9)


@triton.jit
def load_rows(rows, first, ROWS: tl.constexpr, MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, PIECES: tl.constexpr):
    """ROWS rows from `first` on: a tuple of [ROWS, PIECES[i]]. A MASKED block reads 0 behind the last row."""
    ptr, stride, count = rows
    ptr += tl.cast(first, tl.int64) * stride
    row = tl.arange(0, ROWS)  # [ROWS]
    tiles = ()  # type: tuple
    for i in tl.static_range(len(PIECES)):
        column = first_of(PIECES, i) + tl.arange(0, PIECES[i])  # [PIECES[i]]
        pointer = ptr + row[:, None] * stride + column[None, :]
        if MASKED:
            tile = tl.load(pointer, mask=(first + row < count)[:, None] & (column < HEAD_DIM)[None, :], other=0)
        elif first_of(PIECES, i + 1) > HEAD_DIM:
            tile = tl.load(pointer, mask=(column < HEAD_DIM)[None, :], other=0)
        else:
            tile = tl.load(pointer)
        tiles += (tile,)
    return tiles


@triton.jit
def store_rows(rows, tiles, first, HEAD_DIM: tl.constexpr, PIECES: tl.constexpr):
    """Stores a block, [ROWS, PIECES[i]] each, from row `first` on."""
    ptr, stride, count = rows
    ptr += tl.cast(first, tl.int64) * stride
    row = tl.arange(0, tiles[0].shape[0])  # [ROWS]
    for i in tl.static_range(len(PIECES)):
        column = first_of(PIECES, i) + tl.arange(0, PIECES[i])  # [PIECES[i]]
        inside = (first + row < count)[:, None] & (column < HEAD_DIM)[None, :]
        tl.store(ptr + row[:, None] * stride + column[None, :], tiles[i].to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def zero_rows(ROWS: tl.constexpr, PIECES: tl.constexpr):
    """A block of sums, float32."""
    tiles = ()  # type: tuple
    for i in tl.static_range(len(PIECES)):
        tiles += (tl.full([ROWS, PIECES[i]], 0.0, tl.float32),)
    return tiles


@triton.jit
def scale_rows(tiles, factor):
    scaled = ()
    for i in tl.static_range(len(tiles)):
        scaled += (tiles[i] * factor,)
    return scaled


@triton.jit
def row_dots(a, b):
    """Sums of a * b over the head dimension, [ROWS]."""
    total = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), axis=1)
    for i in tl.static_range(1, len(a)):
        total += tl.sum(a[i].to(tl.float32) * b[i].to(tl.float32), axis=1)
    return total


@triton.jit
def scores(a, b):
    """a b^T, a product over the head dimension, [rows of a, rows of b]."""
    if a[0].shape[0] == 1:
        return row_dots(a, b)[None, :]
    total = tl.dot(a[0], tl.trans(b[0]), input_precision="ieee")
    for i in tl.static_range(1, len(a)):
        if products_may_chain() or a[i].dtype == tl.float32:
            total = tl.dot(a[i], tl.trans(b[i]), total, input_precision="ieee")
        else:  # the minus signs keep Triton from merging product and sum
            negative = -a[i].to(tl.float32)
            total -= tl.dot(negative.to(b[i].dtype), tl.trans(b[i]), input_precision="ieee")
    return total


@triton.jit
def add_weighted(total, weights, tiles):
    """total + weights @ tiles, with weights [M, N], N rows in tiles and M in total."""
    weights = weights.to(tiles[0].dtype)
    result = ()
    for i in tl.static_range(len(tiles)):
        if weights.shape[0] == 1:
            products = tl.trans(weights).to(tl.float32) * tiles[i].to(tl.float32)
            result += (total[i] + tl.sum(products, axis=0)[None, :],)
        else:
            result += (tl.dot(weights, tiles[i], total[i], input_precision="ieee"),)
    return result


@triton.jit
def sees(first, queries, key, keys, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A block of a causal mask, [ROWS, COLUMNS]: which queries, from `first` on, see which keys, from `key` on.

    The last query sees the last key, and every query one key more than the query before it.
    """
    row, column = first + tl.arange(0, ROWS), key + tl.arange(0, COLUMNS)
    return column[None, :] <= row[:, None] + (keys - queries)


@triton.jit
def owned(tokens, heads, lengths, BLOCK_M: tl.constexpr, TAILS_M: tl.constexpr):
    """Which part of the work is this program's: head among all, image or sequence, head in it, block, blocks."""
    blocks = tokens // BLOCK_M + len(TAILS_M) if lengths is None else lengths[3]
    head_index, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    return head_index, (head_index // heads).to(tl.int64), head_index % heads, block, blocks


@triton.jit
def span(lengths, WHICH: tl.constexpr, sequence, tokens, end):
    """Where an image or a sequence begins among all tokens, and its number of tokens. WHICH: 0 queries, 1 keys.

    What lies behind the last sequence counts as one more sequence, which reaches to `end`.
    """
    if lengths is None:
        return sequence * tokens, tokens
    else:
        cu_seqlens_ptr, sequences = lengths[WHICH], lengths[2]
        first = tl.load(cu_seqlens_ptr + sequence)
        end = tl.load(cu_seqlens_ptr + sequence + 1, mask=sequence < sequences, other=end)
        return first.to(tl.int64), end - first


@triton.jit
def strides_of(qkv):
    """The strides of q, of k and of v, which share one pair if there is only one."""
    if len(qkv) == 4:
        return qkv[3], qkv[3], qkv[3]
    else:
        return qkv[3], qkv[4], qkv[5]


@triton.jit
def locate(ptr, strides, lengths, image, first, count, column):
    """The rows of one head, whose numbers begin at `column` of a token: in an image, or in a sequence from `first` on.

    `strides` are those of images and of tokens.
    """
    if lengths is None:
        return ptr + (image * strides[0] + column), strides[1], count
    else:
        return ptr + (first * strides[1] + column), strides[1], count


@triton.jit
def locate_statistics(ptr, lengths, head_index, head, first, tokens):
    """The statistics of one head, a float32 per query."""
    if lengths is None:
        return ptr + head_index.to(tl.int64) * tokens
    else:
        return ptr + (head.to(tl.int64) * tokens + first)
