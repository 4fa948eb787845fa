"""What a new token begins with in the embedding and in the head: the mean of the rows that the base model has.

As `resize_token_embeddings` of transformers (https://nlp.stanford.edu/~johnhew/vocab-expansion.html), which adds noise
of 3e-5 of their spread. Here all are exactly the mean: a function of the weights alone, the same on every mesh.
"""

from collections.abc import Callable

import torch
from torch import Tensor

BLOCK = 1024
"""Rows that are read at a time."""


def mean_of_rows(read: Callable[[tuple[slice, ...]], Tensor], rows: int, others: tuple[slice, ...]) -> Tensor:
    """The mean of the first `rows` rows of a tensor within the slices `others` of its other dims, in float64.

    `read` gives slices of the tensor. Rows are added two by two, element by element: torch's own sum may order its
    terms by the width of what it adds, so that a rank with half of the columns would round otherwise.
    """
    total = torch.zeros((), dtype=torch.float64)
    for start in range(0, rows, BLOCK):
        block = read((slice(start, min(start + BLOCK, rows)), *others)).double()
        while len(block) > 1:
            half = len(block) // 2
            pairs = block[:half] + block[half : 2 * half]
            block = torch.cat([pairs, block[2 * half :]])
        total = total + block[0]
    return total / rows
