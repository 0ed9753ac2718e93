"""Define which keys of a history a query sees where both are sorted, head by head."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def order_of(at: Tensor, first: int, block: int) -> Tensor:
    """Sort the tokens of one head into blocks, `[first + N]` int64.

    ```text
    sort(tokens) = tokens in ascending order                      if they are one block
                 = sort(lower half), sort(upper half)             otherwise
    ```

    The halves are those below and above the median of the axis along which the tokens of the part
    differ most, each a whole number of blocks; where values are equal the earlier token is lower.

    Args:
        at: coordinates of the tokens behind the first `[N, axes]`.
        first: tokens that stay in front as they lie.
        block: places of a block.
    """

    def sort(tokens: list[int], begin: int) -> list[int]:
        blocks = math.ceil((begin + len(tokens)) / block) - begin // block
        if blocks <= 1:
            return sorted(tokens)
        rows = at[tokens].double()
        axis = int((rows - rows.mean(0)).square().sum(0).argmax())
        by_value = sorted(tokens, key=lambda n: (float(at[n, axis]), n))
        middle = (begin // block + blocks // 2) * block - begin
        return sort(by_value[:middle], begin) + sort(by_value[middle:], begin + middle)

    found = sort(list(range(len(at))), first)
    return torch.tensor([*range(first), *(n + first for n in found)])


def seen_keys(
    q: Tensor, keys: Tensor, orders: tuple[Tensor, Tensor], first: int, budget: float,
    blocks: tuple[int, int],
) -> Tensor:  # fmt: skip
    """Say which keys of the history `[L, D]` each query of a head sees, `[Lq, L]` bool.

    Blocks are runs of the orders of queries and of keys. Those with one of the first keys are seen
    by all; of the rest the best `ceil(budget * rest)` by the product of the means of queries and
    keys.
    """
    by_query, by_key = (order.split(size) for order, size in zip(orders, blocks, strict=True))
    seen = torch.zeros(len(q), len(keys), dtype=torch.bool)
    means = torch.stack([keys[block].float().mean(0) for block in by_key])
    spared = math.ceil(first / blocks[1])
    wanted = spared + math.ceil(budget * (len(by_key) - spared) - 1e-6)
    for rows in by_query:
        score = means @ q[rows].float().mean(0)
        score[:spared] = math.inf
        for n in score.argsort(descending=True, stable=True)[:wanted].tolist():
            seen[rows[:, None], by_key[n]] = True
    return seen
