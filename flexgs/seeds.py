"""Random numbers that depend on nothing but the seed and what they are used for.

Every draw comes from a fresh generator keyed by (seed, purpose, step ...), so there is no generator state to
save: a resumed run, and every worker of a data-parallel run, draw the same numbers.
"""

import hashlib

import torch


def generator(seed: int, *key: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """Make a random generator for the purpose that `key` names, such as ("ratio", step)."""
    digest = hashlib.blake2b(repr((seed, *key)).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)
