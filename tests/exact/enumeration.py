"""The exact least value of rows of a small ReLU net, one linear program per activation pattern."""

import itertools

import numpy as np
from scipy.optimize import linprog


def least_row(weights, lower, upper, C, d, cuts=None):
    """The least value over a box of max_i (C y + d)_i, for y the outputs of a ReLU net; infinite if
    there is no x.

    Args:
      weights: [(w, b), ...] with layers x @ w + b and a ReLU after each but the last; of N hidden
        neurons together, for 2^N linear programs.
      lower, upper: the box, (n,).
      C, d: the rows of one clause, (s, k) and (s,).
      cuts: A, b with A x + b <= 0 on the set, (p, n) and (p,).

    On the set where each neuron has a given sign, outputs are affine in x: the program minimises t
    over x of that set with t >= each row.
    """
    weights = [tuple(np.asarray(a, np.float64) for a in layer) for layer in weights]
    lower, upper, C, d = (np.asarray(a, np.float64) for a in (lower, upper, C, d))
    bounds = [*zip(lower, upper, strict=True), (None, None)]
    hidden = [len(b) for _, b in weights[:-1]]
    goal = np.eye(len(bounds))[-1]
    values = []
    for pattern in itertools.product([0.0, 1.0], repeat=sum(hidden)):
        signs = np.split(np.array(pattern), np.cumsum(hidden)[:-1])
        matrix, offset, rows, ends = np.eye(len(lower)), np.zeros(len(lower)), [], []
        if cuts is not None:
            rows.append(np.append(cuts[0], np.zeros((len(cuts[1]), 1)), 1))
            ends.append(-np.asarray(cuts[1], np.float64))
        for (w, b), on in zip(weights[:-1], signs, strict=True):
            matrix, offset = matrix @ w, offset @ w + b
            side = np.where(on > 0, -1.0, 1.0)  # active: -z <= 0, else z <= 0
            rows.append(np.append(side[:, None] * matrix.T, np.zeros((len(b), 1)), 1))
            ends.append(-side * offset)
            matrix, offset = matrix * on, offset * on
        matrix, offset = (
            C @ (matrix @ weights[-1][0]).T,
            C @ (offset @ weights[-1][0] + weights[-1][1]),
        )
        rows.append(np.append(matrix, -np.ones((len(d), 1)), 1))
        ends.append(-offset - d)
        found = linprog(goal, np.concatenate(rows), np.concatenate(ends), bounds=bounds)
        values += [found.fun] if found.status == 0 else []
    return min(values, default=np.inf)
