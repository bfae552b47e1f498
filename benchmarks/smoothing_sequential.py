"""How many samples a certificate costs when the run stops as soon as the answer is clear.

`python -m benchmarks.smoothing_sequential [--quick] [--json PATH] [--data DIR]`. The data folder,
by default the variable JAXCERT_DATA, holds published certification logs: `cohen_logs` (Cohen,
Rosenfeld and Kolter, ICML 2019) and `rs_logs/mnist_*.npz` (Jeong and Shin, NeurIPS 2020).

An image enters by the probability p_A of its class, recovered from its logged radius: the fraction
of 100,000 votes whose Clopper-Pearson bound at alpha = 0.001 proves that radius. Where all votes
agree, 1 - p_A is drawn log-uniformly from [1e-7, 1e-5]; abstentions, of which the logs keep nothing
else, get p_A from U(0.05, 0.5). Votes are then simulated, the same ones for every test, and each
test decides from its tables whether the radius is certified. Samples are those of the test and the
100 of selection; `x` is how many times fewer than the 100,100 of a fixed size. `curve` is one run
that goes on until every radius of a grid is decided.
"""

import os
import pathlib
import time
from typing import Any, NamedTuple

import numpy as np
from scipy.special import ndtr

from benchmarks import harness
from jaxcert.certificate import ABSTAIN
from jaxcert.evaluate import read_cohen_log
from jaxcert.smoothing.confidence import (
    Betting,
    FixedSize,
    Hybrid,
    SequentialTest,
    StagedClopperPearson,
    UnionBound,
)
from jaxcert.smoothing.confidence.boundaries import NEVER, clopper_pearson_count

SEED = 0
ALPHA, BETA = 1e-3, 1e-3
N, PEEK, SELECTION = 100_000, 100, 100
TESTS: dict[str, SequentialTest] = {
    "fixed": FixedSize(),
    "fixed, curtailed": FixedSize(curtailed=True),
    "staged": StagedClopperPearson(),
    "union bound": UnionBound(),
    "betting": Betting(),
    "hybrid": Hybrid(),
}


class Case(NamedTuple):
    """A published run: the file of its log, its noise, a radius and a grid of radii."""

    path: str
    sigma: float
    radius: float
    grid: tuple[float, ...]
    repeats: int = 20


def steps(end: float, step: float) -> tuple[float, ...]:
    return tuple(float(r) for r in np.arange(0, end + step / 2, step))


COHEN = "cohen_logs/certify"
CASES = {
    "CIFAR-10 ResNet-110, sigma 0.5": Case(
        f"{COHEN}/cifar10/resnet110/noise_0.50/test/sigma_0.50", 0.5, 0.5, steps(1.5, 0.25)
    ),
    "CIFAR-10 ResNet-110, sigma 0.25": Case(
        f"{COHEN}/cifar10/resnet110/noise_0.25/test/sigma_0.25", 0.25, 0.25, steps(0.75, 0.25)
    ),
    "ImageNet ResNet-50, sigma 0.5": Case(
        f"{COHEN}/imagenet/resnet50/noise_0.50/test/sigma_0.50", 0.5, 1.0, steps(1.5, 0.5)
    ),
    "MNIST LeNet, sigma 0.5": Case(
        "rs_logs/mnist_Gaussian__Cohen__0.5.npz", 0.5, 1.0, steps(1.75, 0.25), repeats=1
    ),
}


def read(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """label, prediction and radius of every image; of several seeds the first one."""
    if path.suffix == ".npz":
        log = np.load(path)
        return tuple(log[name][0] for name in ("label", "predict", "radius"))
    log = read_cohen_log(path)
    return log.label, log.prediction, log.radius


def probabilities(prediction: np.ndarray, radius: np.ndarray, sigma: float, rng: Any) -> np.ndarray:
    """p_A of every image, as the head of this file says."""
    proved = ndtr(np.asarray(radius, np.float64) / sigma) - 1e-9
    votes = np.minimum(clopper_pearson_count(N, proved, ALPHA), N)
    # Logs keep three digits of a radius, so that the last two counts look alike.
    unanimous = 1 - 10 ** rng.uniform(-7, -5, votes.shape)
    p = np.where(votes >= N - 1, unanimous, votes / N)
    return np.where(prediction == ABSTAIN, rng.uniform(0.05, 0.5, p.shape), p)


def decide(
    test: SequentialTest, p0: np.ndarray, counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Whether each p0 is certified on each path, and after how many draws: both (paths, R)."""
    tables = test.boundaries(p0, n_max=N, alpha=ALPHA, peek=PEEK, beta=BETA)
    first = [
        np.stack([_first(compare(counts, column)) for column in table.T], axis=1)
        for compare, table in ((np.greater_equal, tables.certify), (np.less_equal, tables.give_up))
    ]
    return first[0] < first[1], (np.minimum(*first) + 1) * PEEK


def _first(holds: np.ndarray) -> np.ndarray:
    return np.where(holds.any(axis=1), holds.argmax(axis=1), NEVER)


def compare(name: str, case: Case, data: pathlib.Path, quick: bool) -> dict[str, Any]:
    rng = np.random.default_rng(SEED)
    label, prediction, radius = read(data / case.path)
    p = probabilities(prediction, radius, case.sigma, rng)
    correct = label == prediction
    if quick:
        p, correct = p[:: len(p) // 100], correct[:: len(p) // 100]
    repeats = 1 if quick else case.repeats
    p, correct = np.tile(p, repeats), np.tile(correct, repeats)
    blocks = rng.binomial(PEEK, p[:, None], (len(p), N // PEEK)).astype(np.int32)
    counts = np.cumsum(blocks, axis=1, dtype=np.int32)
    # Above Phi(r / sigma), as a certificate needs it.
    single, grid = (
        np.nextafter(ndtr(np.array(radii) / case.sigma), 1) for radii in ([case.radius], case.grid)
    )
    rows = {}
    for test_name, test in TESTS.items():
        start = time.process_time()
        test.boundaries(grid, n_max=N, alpha=ALPHA, peek=PEEK, beta=BETA)
        seconds = time.process_time() - start
        certified, draws = decide(test, single, counts)
        all_certified, all_draws = decide(test, grid, counts)
        cost, curve = (x.max(axis=1).mean() + SELECTION for x in (draws, all_draws))
        rows[test_name] = {
            "samples": float(cost),
            "times_fewer": float((N + SELECTION) / cost),
            "median_samples": float(np.median(draws)) + SELECTION,
            "certified_accuracy_percent": 100 * float(np.mean(certified[:, 0] & correct)),
            "curve_samples": float(curve),
            "curve_times_fewer": float((N + SELECTION) / curve),
            "curve_certified_accuracy_percent": [
                100 * float(np.mean(column & correct)) for column in all_certified.T
            ],
            "tables_cpu_s": seconds,
        }
    show(name, case, rows)
    return {
        "log": case.path,
        "sigma": case.sigma,
        "radius": case.radius,
        "grid": case.grid,
        "paths": len(p),
        "tests": rows,
    }


def show(name: str, case: Case, rows: dict[str, dict[str, Any]]) -> None:
    print(f"\n{name}: radius {case.radius}; curve of {len(case.grid)} radii to {case.grid[-1]}")
    print(
        f"  {'':18}{'samples':>9}{'x':>7}{'certified %':>13}{'curve':>9}{'x':>7}{'most lost':>11}"
    )
    fixed = np.array(rows["fixed"]["curve_certified_accuracy_percent"])
    for test, row in rows.items():
        lost = np.max(fixed - np.array(row["curve_certified_accuracy_percent"]))
        print(
            f"  {test:18}{row['samples']:9.0f}{row['times_fewer']:7.1f}"
            f"{row['certified_accuracy_percent']:13.2f}{row['curve_samples']:9.0f}"
            f"{row['curve_times_fewer']:7.1f}{lost:11.2f}"
        )


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--data", default=os.environ.get("JAXCERT_DATA"), metavar="DIR")
    options = parser.parse_args()
    data = pathlib.Path(options.data or "")
    missing = [case.path for case in CASES.values() if not (data / case.path).is_file()]
    if not options.data or missing:
        parser.error(
            "say where the published logs are: --data DIR, or the variable JAXCERT_DATA; "
            f"{options.data or 'nothing'} lacks {', '.join(missing)}"
        )
    results = {name: compare(name, case, data, options.quick) for name, case in CASES.items()}
    harness.write_json(options.json, results, seed=SEED)


if __name__ == "__main__":
    main()
