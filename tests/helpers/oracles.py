"""The papers' equations in plain NumPy float64, as slow and as literal as they come."""

import numpy as np


def keep_largest(scores: np.ndarray, zeros: int) -> np.ndarray:
    """All but the `zeros` smallest of an array; of equal scores the last by index go first."""
    order = np.lexsort((-np.arange(scores.size), scores.ravel()))
    mask = np.ones(scores.size, bool)
    mask[order[:zeros]] = False
    return mask.reshape(scores.shape)


def select(scores: np.ndarray, pattern: str, fraction: float, sparsity: float) -> np.ndarray:
    """The mask at `fraction` of the final sparsity; `pattern` is unstructured, per-output or
    N:M."""
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


def sparsegpt(
    gram: np.ndarray,
    weight: np.ndarray,
    pattern: str,
    sparsity: float,
    *,
    block: int,
    damping: float = 0.01,
    mask: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Algorithm 1 of Frantar & Alistarh 2023, input by input: the pruned kernel and its mask."""
    (n, m), w = weight.shape, weight.copy()
    diagonal = np.diag(gram)
    dead = diagonal == 0
    w[dead] = 0
    h = gram + np.diag(np.where(dead, diagonal.mean(), 0)) + damping * diagonal.mean() * np.eye(n)
    r = np.linalg.cholesky(np.linalg.inv(h)).T
    keep = np.ones((n, m), bool) if mask is None else mask
    group = int(pattern.partition(":")[2]) if ":" in pattern else block
    for start in range(0, n, block):
        end = min(start + block, n)
        errors = np.zeros((end - start, m))
        for j in range(start, end):
            if mask is None and (j - start) % group == 0:
                last = min(j + group, end)
                scores = (w[j:last] / np.diag(r)[j:last, None]) ** 2
                if ":" in pattern:
                    keep[j:last] = select(scores, pattern, 1.0, sparsity)
                elif pattern == "per-output":
                    zeros = round(sparsity * last) - round(sparsity * j)
                    keep[j:last] = np.stack(
                        [keep_largest(scores[:, k], zeros) for k in range(m)], axis=1
                    )
                else:
                    keep[j:last] = keep_largest(
                        scores, round(sparsity * last * m) - round(sparsity * j * m)
                    )
            errors[j - start] = (w[j] - w[j] * keep[j]) / r[j, j]
            w[j + 1 : end] -= np.outer(r[j, j + 1 : end], errors[j - start])
            w[j] *= keep[j]
        w[end:] -= r[start:end, end:].T @ errors
    return w, keep


def alps(
    gram: np.ndarray,
    weight: np.ndarray,
    pattern: str,
    sparsity: float,
    *,
    iterations: int = 300,
    rho: float = 0.1,
    cg_steps: int = 10,
) -> tuple[np.ndarray, np.ndarray]:
    """Algorithm 1 of Meng et al. 2024 with its published update of the penalty: the pruned kernel
    and its mask."""
    h = gram + 0.01 * np.mean(np.diag(gram)) * np.eye(len(gram))
    scale = np.sqrt(np.diag(h)) + 1e-8
    g = h / np.outer(scale, scale)
    w0 = scale[:, None] * weight
    b = g @ w0

    def project(a: np.ndarray) -> np.ndarray:
        return a * select(np.abs(a), pattern, 1.0, sparsity)

    w, d, v, settling = w0, project(w0), np.zeros_like(w0), False
    support = d != 0
    kept = support.sum()
    for i in range(1, iterations + 1):
        w = np.linalg.solve(g + rho * np.eye(len(g)), b - v + rho * d)
        d = project(w + v / rho)
        v = v + rho * (w - d)
        if i % 3:
            continue
        changes = ((d != 0) != support).sum()
        support = d != 0
        c = changes / kept
        settling = settling or c > 0.005
        if settling and changes == 0:
            break
        if settling:
            rho *= 1.3 if c > 0.1 else 1.2 if c > 0.005 else 1.1
        else:
            rho /= 5
            if changes:
                w, d, v = w0, project(w0), np.zeros_like(w0)
        if i >= 30 and c < 0.0003:
            break
    mask = select(np.abs(w), pattern, 1.0, sparsity)
    w = w * mask
    for j in range(w.shape[1]):
        on = mask[:, j]
        r = np.where(on, b[:, j] - g @ w[:, j], 0)
        p = r / np.diag(g)
        for _ in range(cg_steps):
            z = r / np.diag(g)
            if np.linalg.norm(r) <= 1e-4 * np.linalg.norm(b[on, j]):
                break
            image = np.where(on, g @ p, 0)
            step = (r @ z) / (p @ image)
            w[:, j] += step * p
            after = r - step * image
            p = after / np.diag(g) + (after @ (after / np.diag(g))) / (r @ z) * p
            r = after
    return w / scale[:, None], mask


def masked_least_squares(
    gram: np.ndarray, weight: np.ndarray, mask: np.ndarray, damping: float
) -> np.ndarray:
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


def decaying(generator: np.random.Generator, tokens: int, n: int) -> np.ndarray:
    """Strongly correlated activations: the spectrum falls as a power, and channels differ a little
    in size."""
    rotation, _ = np.linalg.qr(generator.normal(size=(n, n)))
    spectrum = np.arange(1, n + 1.0) ** -0.7
    return (
        generator.normal(size=(tokens, n))
        * spectrum
        @ rotation
        * np.exp(0.5 * generator.normal(size=n))
    )
