"""Relative position embeddings: what a query says of its distance from each key, as a bias of attention."""

from torch import Tensor


def relative_bias(queries: Tensor, rel_pos_embed: Tensor) -> Tensor:
    """The bias q · r / sqrt(d) of attention, where r is the vector of the distance between a query and a key.

    It is part of the scores of Shaw et al. 2018 (arXiv:1803.02155), without their vectors for values.

    Args:
        queries: [B, Q, H, d], of the first Q of N tokens.
        rel_pos_embed: [2N - 1, d], for all heads. Row i - j + N - 1 is for query i and key j.

    Returns [B, H, Q, N] in the dtype of a product of the two, a view that `attention` reads in place. Its memory is
    B * H * Q * (N + Q - 1) numbers, which the backward pass of attention keeps. Both arguments have a gradient.
    """
    count, tokens = queries.shape[1], (len(rel_pos_embed) + 1) // 2
    # Upside down, rows come in the order of keys; those after row N + Q - 2 are of later queries.
    rows = rel_pos_embed.flip(0)[tokens - count :] * rel_pos_embed.shape[1] ** -0.5  # [N + Q - 1, d]
    products = queries.transpose(1, 2) @ rows.T  # [B, H, Q, N + Q - 1]
    if count == 1:
        return products
    # Key 0 of query i is in column Q - 1 - i: seen as rows that are shorter by one, they all begin in the same column.
    shifted = products.flatten(-2)[..., count - 1 : -1].unflatten(-1, (count, len(rows) - 1))
    return shifted[..., :tokens]
