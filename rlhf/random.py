"""Stateless randomness: a key is two 32-bit words, and a random number is a hash of (key, position).

The hash is Threefry-2x32 with 20 rounds, the generator of `jax.random`, in int32 tensor arithmetic. The bits are the
same on CPU and GPU, in any batch and in any order. No global generator is read or set.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", https://doi.org/10.1145/2063384.2063405.

Use each key once, either to draw numbers or to derive keys with `fold_in` and `split`. Derive keys by their purpose, as
in `fold_in(fold_in(key, iteration), prompt)`, so that no draw depends on the number of earlier draws.
"""

import math
from enum import IntEnum

import torch
from torch import Tensor

from rlhf.checks import check_value

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA
_WORD = 1 << 32
_FOLD = -(1 << 31)  # sets the top counter bit, which no position reaches: derived keys never equal drawn bits
_BLOCK = 1 << 16  # positions hashed at once: the 20 rounds then run inside the processor's cache


class Purpose(IntEnum):
    """Purposes of the keys of a run, as in `fold_in(key(seed), Purpose.SAMPLING)`. Numbers are never reused."""

    INIT = 0
    """Weights of a new trunk."""
    HEAD = 1
    """Weights of a new head."""
    SPLIT = 2
    """Selection of the held-out records."""
    ORDER = 3
    """Order of records and prompts, by epoch."""
    DROPOUT = 4
    """Dropout, by step and micro-batch."""
    SAMPLING = 5
    """Completions, by iteration, prompt and sample."""
    MINIBATCH = 6
    """Order of completions, by iteration and epoch."""
    EVALUATION = 7
    """Completions for the comparison of models."""


def key(seed: int) -> Tensor:
    """Return the key of a seed.

    Args:
        seed: an integer in [0, 2**64).

    Returns:
        [2] int32, the high and the low word of the seed.

    Raises:
        ValueError: the seed is negative or needs more than 64 bits.

    Example:
        >>> key(5)
        tensor([0, 5], dtype=torch.int32)
    """
    check_value("key", 0 <= seed < _WORD**2, "in [0, 2**64)", seed=seed)
    return torch.tensor([_signed(seed >> 32), _signed(seed & (_WORD - 1))], dtype=torch.int32)


def fold_in(key: Tensor, data: int | Tensor) -> Tensor:
    """Return the key derived from a key and an integer.

    Args:
        key: [..., 2] int32.
        data: an integer in [0, 2**63), or [...] int64 that is broadcast against the keys, to derive many at once.

    Returns:
        [..., 2] int32, the derived keys.

    Example:
        >>> iteration = fold_in(fold_in(key(0), Purpose.SAMPLING), 3)
        >>> fold_in(iteration, torch.arange(4)).shape  # one key per prompt
        torch.Size([4, 2])
    """
    data = torch.as_tensor(data, dtype=torch.int64, device=key.device)
    return torch.stack(_threefry(key[..., 0], key[..., 1], _high(data) | _FOLD, _low(data)), dim=-1)


def split(key: Tensor, num: int = 2) -> Tensor:
    """Return several keys derived from one.

    Args:
        key: [2] int32.
        num: number of keys.

    Returns:
        [num, 2] int32, the derived keys.

    Example:
        >>> split(key(0), 3).shape
        torch.Size([3, 2])
    """
    return fold_in(key.unsqueeze(0), torch.arange(num, device=key.device))


def bits(key: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """Return two independent words of 32 random bits for each (key, position).

    Args:
        key: [..., 2] int32.
        position: [...] int64 in [0, 2**63), broadcast against the keys.

    Returns:
        Two int32 tensors of the broadcast shape.

    Example:
        >>> high, low = bits(key(0), torch.arange(3))
        >>> high.shape, high.dtype
        (torch.Size([3]), torch.int32)
    """
    return _threefry(key[..., 0], key[..., 1], _high(position), _low(position))


def uniform_at(key: Tensor, position: Tensor) -> Tensor:
    """Return a uniform number in [0, 1) for each (key, position).

    The numbers are multiples of 2**-53, so that no token of a large vocabulary lies between two of them.

    Args:
        key: [..., 2] int32.
        position: [...] int64 in [0, 2**63), broadcast against the keys.

    Returns:
        float64 tensor of the broadcast shape.

    Example:
        >>> uniform_at(key(0), torch.tensor([7])) == uniform_at(key(0), torch.arange(10))[7]
        tensor([True])
    """
    high, low = bits(key, position)
    number = ((high.long() & (_WORD - 1)) << 21) | ((low.long() >> 11) & ((1 << 21) - 1))
    return number.double() * 2.0**-53


def uniform(key: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return uniform numbers in [0, 1), in float32.

    Element i, in row-major order, is `uniform_at(key, i)` truncated to 23 bits.

    Args:
        key: [2] int32.
        shape: shape of the result.

    Example:
        >>> numbers = uniform(key(0), (2, 3))
        >>> numbers.shape, bool(((numbers >= 0) & (numbers < 1)).all())
        (torch.Size([2, 3]), True)
    """
    return _unit(_words(key, math.prod(shape))[0]).view(shape)


def normal(key: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return standard normal numbers, in float32, by the Box-Muller transform.

    Elements 2i and 2i + 1, in row-major order, are computed from position i.

    Args:
        key: [2] int32.
        shape: shape of the result.

    Example:
        >>> noise = normal(key(0), (100, 100))
        >>> round(float(noise.mean()), 1) + 0.0, round(float(noise.std()), 1)
        (0.0, 1.0)
    """
    count = math.prod(shape)
    first, second = _words(key, (count + 1) // 2)
    radius, angle = torch.sqrt(-2.0 * torch.log1p(-_unit(first))), 2.0 * math.pi * _unit(second)
    pairs = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)
    return pairs.view(-1)[:count].view(shape)


def permutation(key: Tensor, n: int) -> Tensor:
    """Return the numbers 0..n-1 in a random order, [n] int64.

    Args:
        key: [2] int32.
        n: number of elements.

    Example:
        >>> permutation(key(0), 4).sort().values
        tensor([0, 1, 2, 3])
    """
    high, low = _words(key, n)
    return torch.argsort(high.long() * _WORD + (low.long() & (_WORD - 1)), stable=True)


def _words(key: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Return two int32 [n] words at positions 0..n-1, computed in blocks that stay in cache."""
    starts = range(0, max(n, 1), _BLOCK)
    blocks = [bits(key, torch.arange(start, min(start + _BLOCK, n), device=key.device)) for start in starts]
    return torch.cat([first for first, _ in blocks]), torch.cat([second for _, second in blocks])


def _threefry(k0: Tensor, k1: Tensor, x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two words of Threefry-2x32-20; int32 additions wrap, as the algorithm requires."""
    schedule = (k0, k1, k0 ^ k1 ^ _PARITY)
    x0, x1 = x0 + k0, x1 + k1
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            x0 = x0 + x1
            x1 = _rotate_left(x1, rotation) ^ x0
        x0 = x0 + schedule[(group + 1) % 3]
        x1 = x1 + schedule[(group + 2) % 3] + (group + 1)
    return x0, x1


def _rotate_left(x: Tensor, distance: int) -> Tensor:
    return (x << distance) | ((x >> (32 - distance)) & ((1 << distance) - 1))


def _unit(word: Tensor) -> Tensor:
    return ((word >> 9) & 0x7FFFFF).float() * 2.0**-23


def _high(data: Tensor) -> Tensor:
    return (data >> 32).int()


def _low(data: Tensor) -> Tensor:
    return data.int()  # keeps the low 32 bits


def _signed(word: int) -> int:
    return word - _WORD if word >= _WORD // 2 else word
