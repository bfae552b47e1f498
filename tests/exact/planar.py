"""The exact least value of a ReLU net of two inputs over convex sets, from finitely many points."""

import itertools

import numpy as np


def least_value(weights, row, edges, disc=None):
    """The least value over a set of one row of the outputs of a net with two hidden layers.

    Args:
      weights: [(w, b)] * 3 with layers x @ w + b and a ReLU after the first two.
      row: of the outputs, (k,).
      edges: A, b with A x <= b on the set, (e, 2) and (e,).
      disc: centre and radius of a disc that the set is cut by, if there is one.

    The net is affine on the parts of the plane between the lines where a neuron is zero. On such a
    part, cut by edges and disc, it is least at a corner, at a point where one of the lines meets
    the circle, or where its own slope is least on the disc. All of these points, for all patterns,
    are tried; those outside of the set are left out.
    """
    weights = [tuple(np.asarray(a, np.float64) for a in layer) for layer in weights]
    points = []
    for lines, slopes in _pieces(weights, row):
        lines = lines[0] + edges[0].tolist(), lines[1] + (-edges[1]).tolist()
        points += _meetings(np.array(lines[0]), np.array(lines[1]), disc)
        if disc is not None:
            size = np.linalg.norm(slopes, axis=1, keepdims=True)
            points += list(disc[0] - disc[1] * slopes / np.where(size > 0, size, 1.0))
    points = np.array(points)
    inside = np.all(points @ edges[0].T <= edges[1] + 1e-9, 1)
    if disc is not None:
        inside &= np.linalg.norm(points - disc[0], axis=1) <= disc[1] + 1e-9
    values = points[inside]
    for w, b in weights[:-1]:
        values = np.maximum(values @ w + b, 0)
    return np.min((values @ weights[-1][0] + weights[-1][1]) @ row)


def _pieces(weights, row):
    """For each pattern of the first layer: the lines a x + b = 0 of both layers' neurons, and the
    row's slopes for each pattern of the second layer."""
    (w, b), (v, c), (last, _) = weights
    patterns = [np.array(list(itertools.product([0.0, 1.0], repeat=len(x)))) for x in (b, c)]
    for on in patterns[0]:
        slope, offset = (w * on) @ v, (b * on) @ v + c
        yield ([*w.T, *slope.T], [*b, *offset]), (patterns[1] * (last @ row)) @ slope.T


def _meetings(normals, offsets, disc):
    """Where two of the lines meet, and where one meets the circle."""
    i, j = np.triu_indices(len(normals), 1)
    pairs, ends = np.stack([normals[i], normals[j]], 1), -np.stack([offsets[i], offsets[j]], 1)
    cross = np.abs(np.linalg.det(pairs)) > 1e-12
    found = list(np.linalg.solve(pairs[cross], ends[cross][..., None])[..., 0])
    if disc is not None:
        size = np.linalg.norm(normals, axis=1)
        normals, offsets = normals[size > 0], offsets[size > 0]
        size = size[size > 0][:, None]
        unit, along = normals / size, np.stack([-normals[:, 1], normals[:, 0]], 1) / size
        away = unit @ disc[0] + offsets / size[:, 0]
        half = np.sqrt(np.maximum(disc[1] ** 2 - away**2, 0.0))[:, None]
        foot = disc[0] - away[:, None] * unit
        near = np.abs(away) <= disc[1]
        found += [*(foot + half * along)[near], *(foot - half * along)[near]]
    return found
