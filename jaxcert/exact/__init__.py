"""Exact verification: complete search for a proof or a counterexample."""

from jaxcert.exact.certify import Distance as Distance
from jaxcert.exact.certify import certify as certify
from jaxcert.exact.certify import distance as distance
from jaxcert.exact.outcome import Budget as Budget
from jaxcert.exact.outcome import Progress as Progress
from jaxcert.exact.verify import verify as verify
from jaxcert.exact.within import decide_within as decide_within
