"""Gradient-boosted regression trees: fitted by scikit-learn, kept and evaluated as plain arrays.

scikit-learn takes seconds to import and stores models as pickles; a query needs neither.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Trees:
    """A sum of trees.

    Attributes:
        initial: What the sum starts from.
        rate: Learning rate.
        depth: Greatest depth.
        roots: (num_trees,) node index of each root.
        feature: (num_nodes,) feature that a node splits on; -1 at a leaf.
        threshold: (num_nodes,) go left when the feature, in single precision, is at most this.
        left: (num_nodes,) node index; itself at a leaf.
        right: (num_nodes,) node index; itself at a leaf.
        value: (num_nodes,) output at a leaf.
    """

    initial: float
    rate: float
    depth: int
    roots: np.ndarray
    feature: np.ndarray
    threshold: np.ndarray
    left: np.ndarray
    right: np.ndarray
    value: np.ndarray

    @classmethod
    def none(cls) -> Trees:
        """Of no tree: predicts zero."""
        return cls(0.0, 0.0, 0, *(np.empty(0, dtype=np.int64),) * 6)

    @classmethod
    def fit(
        cls,
        features: np.ndarray,
        target: np.ndarray,
        *,
        num_trees: int,
        depth: int,
        rate: float,
        subsample: float,
        seed: int,
        weight: np.ndarray | None = None,
    ) -> Trees:
        """Fit to `target` (rows,) on `features` (rows, columns) with squared error."""
        from sklearn.ensemble import GradientBoostingRegressor

        model = GradientBoostingRegressor(
            n_estimators=num_trees,
            max_depth=depth,
            learning_rate=rate,
            subsample=subsample,
            min_samples_leaf=2,
            random_state=seed,
        )
        model.fit(features, target, sample_weight=weight)
        roots, columns = [], []
        count = 0
        for estimator in model.estimators_[:, 0]:
            tree = estimator.tree_
            own = np.arange(tree.node_count)
            leaf = tree.children_left < 0
            roots.append(count)
            columns.append(
                (
                    np.where(leaf, -1, tree.feature),
                    tree.threshold,
                    np.where(leaf, own, tree.children_left) + count,
                    np.where(leaf, own, tree.children_right) + count,
                    tree.value[:, 0, 0],
                )
            )
            count += tree.node_count
        joined = [np.concatenate(parts) for parts in zip(*columns, strict=True)]
        return cls(
            initial=float(np.asarray(model.init_.constant_).ravel()[0]),
            rate=rate,
            depth=depth,
            roots=np.array(roots),
            feature=joined[0],
            threshold=joined[1],
            left=joined[2],
            right=joined[3],
            value=joined[4],
        )

    def predict(self, features: np.ndarray) -> np.ndarray:
        """(rows, columns) to (rows,)."""
        single = np.asarray(features, dtype=np.float32)
        result = np.empty(len(single))
        for start in range(0, len(single), 512):
            chunk = single[start : start + 512]
            node = np.broadcast_to(self.roots, (len(chunk), len(self.roots)))
            for _ in range(self.depth):
                split = np.take_along_axis(chunk, np.maximum(self.feature[node], 0), axis=1)
                node = np.where(split <= self.threshold[node], self.left[node], self.right[node])
            result[start : start + 512] = self.initial + self.rate * self.value[node].sum(axis=1)
        return result

    def to_arrays(self, prefix: str) -> dict[str, np.ndarray]:
        """Plain arrays by name."""
        head = np.array([self.initial, self.rate, self.depth])
        return {
            f"{prefix}.head": head,
            **{f"{prefix}.{name}": getattr(self, name) for name in _ARRAYS},
        }

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray], prefix: str) -> Trees:
        """The inverse of `to_arrays`."""
        initial, rate, depth = arrays[f"{prefix}.head"]
        return cls(float(initial), float(rate), int(depth), **{name: arrays[f"{prefix}.{name}"] for name in _ARRAYS})


_ARRAYS = ("roots", "feature", "threshold", "left", "right", "value")
