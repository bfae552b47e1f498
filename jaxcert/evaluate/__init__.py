"""Evaluate: count what certificates prove over a data set. Host side, unlike the certifiers.

From a certifier, `(x, index) -> Certificate`, to numbers:

    results = evaluate.run(certifier, x, labels, path="run.jsonl", config={"net": "lenet"})
    evaluate.certified_accuracy(results, results.label, [0.25, 0.5])
    evaluate.show([evaluate.row("lenet", results, [0.25, 0.5])])
"""

from jaxcert.evaluate import records as records
from jaxcert.evaluate.cohen_log import read_cohen_log as read_cohen_log
from jaxcert.evaluate.cohen_log import write_cohen_log as write_cohen_log
from jaxcert.evaluate.curves import plot_certified_accuracy as plot_certified_accuracy
from jaxcert.evaluate.metrics import abstention_rate as abstention_rate
from jaxcert.evaluate.metrics import accuracy_interval as accuracy_interval
from jaxcert.evaluate.metrics import average_certified_radius as average_certified_radius
from jaxcert.evaluate.metrics import bernstein_failures as bernstein_failures
from jaxcert.evaluate.metrics import binomial_failures as binomial_failures
from jaxcert.evaluate.metrics import certified_accuracy as certified_accuracy
from jaxcert.evaluate.metrics import clean_accuracy as clean_accuracy
from jaxcert.evaluate.metrics import high_probability_accuracy as high_probability_accuracy
from jaxcert.evaluate.results import Results as Results
from jaxcert.evaluate.results import load as load
from jaxcert.evaluate.run import run as run
from jaxcert.evaluate.smoothed import merge as merge
from jaxcert.evaluate.smoothed import rebound as rebound
from jaxcert.evaluate.smoothed import run_smoothing as run_smoothing
from jaxcert.evaluate.tables import Row as Row
from jaxcert.evaluate.tables import row as row
from jaxcert.evaluate.tables import show as show
from jaxcert.evaluate.tables import table as table
