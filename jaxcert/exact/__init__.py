"""Exact verification: complete search for a proof or a counterexample."""

from jaxcert.exact.verify import Budget as Budget
from jaxcert.exact.verify import Progress as Progress
from jaxcert.exact.verify import verify as verify
