"""Linear bounds of ReLU MLPs by the book, in float64 numpy, and their linear programs in HiGHS.

Layers are [(w, b), ...] with x @ w + b; everything is for one example.
"""

import numpy as np
from scipy import optimize


def _relu_lines(l, u):
    """Lower slope, upper slope and upper offset of relu on [l, u]; the lower line is s x."""
    chord = np.where(u <= 0, 0.0, np.where(l >= 0, 1.0, u / np.where(u > l, u - l, 1.0)))
    lower = np.where(u <= 0, 0.0, np.where(l >= 0, 1.0, (u > -l).astype(float)))
    return lower, chord, np.where((l < 0) & (u > 0), -chord * l, 0.0)


def _least(layers, hidden, rows, lower, upper):
    """Lower bounds of rows on the last layer's result (Zhang et al. 2018, Theorem 3.2)."""
    matrix, offset = np.asarray(rows, np.float64), 0.0
    for i in reversed(range(len(layers))):
        w, b = (np.asarray(a, np.float64) for a in layers[i])
        offset, matrix = offset + matrix @ b, matrix @ w.T
        if i > 0:
            low, chord, above = _relu_lines(*hidden[i - 1])
            offset = offset + np.minimum(matrix, 0) @ above
            matrix = np.maximum(matrix, 0) * low + np.minimum(matrix, 0) * chord
    return np.maximum(matrix, 0) @ lower + np.minimum(matrix, 0) @ upper + offset


def crown_of_mlp(layers, lower, upper, rows):
    """(lower, upper, boxes of the hidden layers) of rows on the output.

    The boxes are met with those of interval arithmetic from the layer before.
    """
    hidden, (l, u) = [], (lower, upper)
    for i in range(len(layers) - 1):
        w, b = (np.asarray(a, np.float64) for a in layers[i])
        pos, neg, unit = np.maximum(w, 0), np.minimum(w, 0), np.eye(w.shape[1])
        low = np.maximum(l @ pos + u @ neg + b, _least(layers[: i + 1], hidden, unit, lower, upper))
        high = np.minimum(
            u @ pos + l @ neg + b, -_least(layers[: i + 1], hidden, -unit, lower, upper)
        )
        hidden.append((low, high))
        l, u = np.maximum(low, 0), np.maximum(high, 0)
    ends = [s * _least(layers, hidden, s * rows, lower, upper) for s in (1, -1)]
    return *ends, hidden


def triangle_lp(layers, lower, upper, hidden, row):
    """The least row of the output over the triangle relaxation of each ReLU."""
    widths = [len(lower)] + [w.shape[1] for w, _ in layers[:-1]]
    starts = np.cumsum([0, *widths])
    inequalities, right, ends = [], [], list(zip(lower, upper, strict=True))

    def put(i, a, j, c, rhs):  # entries of layer i times a, plus of layer j times c, <= rhs
        rows = np.zeros((len(rhs), starts[-1]))
        rows[:, starts[i] : starts[i + 1]] = a
        rows[:, starts[j] : starts[j + 1]] = c
        inequalities.append(rows)
        right.append(rhs)

    for i, ((w, b), (l, u)) in enumerate(zip(layers, hidden, strict=False), start=1):
        w, b, unit = w.astype(np.float64), b.astype(np.float64), np.eye(w.shape[1])
        _, chord, above = _relu_lines(l, u)
        put(i - 1, w.T, i, -unit, -b)  # y >= z
        put(i - 1, -chord[:, None] * w.T, i, unit, chord * b + above)
        ends += [(0.0, max(0.0, top)) for top in u]
    w, b = (np.asarray(a, np.float64) for a in layers[-1])
    cost = np.zeros(starts[-1])
    cost[starts[-2] :] = w @ row
    found = optimize.linprog(cost, np.concatenate(inequalities), np.concatenate(right), bounds=ends)
    assert found.status == 0, found.message
    return found.fun + b @ row
