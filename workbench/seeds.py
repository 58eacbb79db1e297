"""Seeded random generators keyed by what is drawn, so that one draw never shifts another."""

import hashlib

import numpy as np


def generator(*key: int | str) -> np.random.Generator:
    """A PCG64 generator whose stream depends on the whole key, e.g. `generator("lengths", seed)`. Equal on every machine."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))
