"""A made-up catalogue of vectors: clustered as products are, with queries beside it as texts are beside photos."""

import numpy as np

from askew.ann import Vectors


class World:
    """A made-up catalogue of so many items, drawn a part at a time."""

    def __init__(self, size: int, dim: int, seed: int = 7) -> None:
        random = np.random.default_rng(seed)
        latent, categories, clusters = 32, 64, max(size // 200, 1)
        centres = random.normal(size=(categories, latent))
        of = random.integers(categories, size=clusters)
        self._products = centres[of] + 0.5 * random.normal(size=(clusters, latent))
        share = 1 / np.arange(1, clusters + 1) ** 0.8
        self._share = share / share.sum()
        self._lift = np.linalg.qr(random.normal(size=(dim, latent)))[0].T
        self._gap = random.normal(size=dim) / dim**0.5
        self.size, self.dim, self._seed = size, dim, seed

    def vectors(self, part: int, size: int) -> Vectors:
        """Draw part number `part`, of so many unit vectors, the same whenever it is drawn."""
        random = np.random.default_rng((self._seed, part))
        out = np.empty((size, self.dim), dtype=np.float32)
        of = random.choice(len(self._products), size, p=self._share)
        for at in range(0, size, 100_000):
            products = self._products[of[at : at + 100_000]]
            inner = products + 0.3 * random.normal(size=products.shape)
            noise = 0.15 * random.normal(size=(len(inner), self.dim))
            out[at : at + 100_000] = inner @ self._lift + noise
        out /= np.linalg.norm(out, axis=1, keepdims=True)
        return out

    def queries(self, vectors: Vectors, count: int) -> Vectors:
        """Draw queries near some of these vectors."""
        random = np.random.default_rng((self._seed, 1 << 20))
        found = vectors[random.integers(len(vectors), size=count)] + 0.25 * self._gap
        found = found + 0.3 / self.dim**0.5 * random.normal(size=found.shape)
        found /= np.linalg.norm(found, axis=1, keepdims=True)
        return found.astype(np.float32)
