"""The papers' equations in plain NumPy float64, as slow and as literal as they come."""

import numpy as np


def keep_largest(scores: np.ndarray, zeros: int) -> np.ndarray:
    """All but the `zeros` smallest of an array; of equal scores the last by index go first."""
    order = np.lexsort((-np.arange(scores.size), scores.ravel()))
    mask = np.ones(scores.size, bool)
    mask[order[:zeros]] = False
    return mask.reshape(scores.shape)


def select(scores: np.ndarray, pattern: str, fraction: float, sparsity: float) -> np.ndarray:
    """The mask at `fraction` of the final sparsity; `pattern` is unstructured, per-output or N:M."""
    rows, columns = scores.shape
    if pattern == "unstructured":
        return keep_largest(scores, round(sparsity * fraction * scores.size))
    if pattern == "per-output":
        zeros = round(sparsity * fraction * rows)
        return np.stack([keep_largest(scores[:, j], zeros) for j in range(columns)], axis=1)
    n, m = map(int, pattern.split(":"))
    protected = np.zeros(scores.shape, bool)
    for j in range(columns):
        for i in range(0, rows, m):
            protected[i : i + m, j] = keep_largest(scores[i : i + m, j], m - n)
    zeros = round(fraction * (rows // m * (m - n) * columns))
    return keep_largest(np.where(protected, np.inf, scores), zeros)


def admm(
    gram: np.ndarray,
    weight: np.ndarray,
    pattern: str,
    sparsity: float,
    *,
    schedule: str,
    iterations: int,
    selections: int,
    damping: float = 0.1,
    rho: float = 1.0,
    mask: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Algorithm 1 of Boža 2024: the pruned kernel and its mask after a number of iterations."""
    scale = np.sqrt(np.diag(gram)) + 1e-8
    g = gram / np.outer(scale, scale)
    g = g + damping * np.mean(np.diag(g)) * np.eye(len(g))
    w0 = scale[:, None] * weight
    b = g @ w0
    inverse = np.linalg.inv(g + rho * np.eye(len(g)))
    w, u = w0, np.zeros_like(w0)
    steps = 0 if mask is not None else selections
    if mask is None and steps == 0:
        mask = select(np.abs(w0), pattern, 1.0, sparsity)
    for i in range(iterations):
        if i < steps:
            fraction = 1.0 if schedule == "constant" else 1 - (1 - (i + 1) / steps) ** 3
            mask = select(np.abs(w + u), pattern, fraction, sparsity)
        assert mask is not None
        z = mask * (w + u)
        u = u + w - z
        w = inverse @ (b + rho * (z - u))
    assert mask is not None
    return mask * (w + u) / scale[:, None], mask


def masked_least_squares(gram: np.ndarray, weight: np.ndarray, mask: np.ndarray, damping: float) -> np.ndarray:
    """The exact minimum, column by column, of the damped problem that ADMM solves."""
    scale = np.sqrt(np.diag(gram)) + 1e-8
    g = gram / np.outer(scale, scale)
    g = g + damping * np.mean(np.diag(g)) * np.eye(len(g))
    b = g @ (scale[:, None] * weight)
    solution = np.zeros_like(weight)
    for j in range(weight.shape[1]):
        kept = np.flatnonzero(mask[:, j])
        solution[kept, j] = np.linalg.solve(g[np.ix_(kept, kept)], b[kept, j])
    return solution / scale[:, None]


def correlated(generator: np.random.Generator, tokens: int, n: int) -> np.ndarray:
    """Activations with correlated channels of very different sizes, as in language models."""
    mixing = generator.normal(size=(n, n)) / np.sqrt(n) + np.eye(n)
    return generator.normal(size=(tokens, n)) @ mixing * np.exp(generator.normal(size=n))
