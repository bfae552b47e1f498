"""`check PROOF NET PROP`: whether a file proves a property, without any search."""

import dataclasses
import pathlib
import sys

from jaxcert.cli.answers import said
from jaxcert.errors import ProofRejected

REJECTED = 13
"""The exit status of a file that proves nothing."""


@dataclasses.dataclass
class Checking:
    """A proof and what it is said to prove.

    Attributes:
      proof, network, property: the files.
      exact: whether to evaluate it in rationals.
      quiet: whether to say nothing on stderr.
    """

    proof: pathlib.Path
    network: pathlib.Path
    property: pathlib.Path
    exact: bool = False
    quiet: bool = False

    def run(self) -> int:
        """Check it and say so; returns the exit status."""
        from jaxcert.exact.proof import check

        try:
            report = check(self.proof, self.network, self.property, exact=self.exact)
        except ProofRejected as error:
            return self.finish("rejected", said(error), REJECTED)
        counts = f"{report.trees} trees, {report.splits} splits, {report.leaves} leaves"
        return self.finish("proved", f"{counts}; the smallest bound is {report.margin:.3g}", 0)

    def finish(self, verdict: str, remark: str, status: int) -> int:
        """Print the verdict on stdout and the remark on stderr."""
        print(verdict, flush=True)
        if not self.quiet:
            print(remark, file=sys.stderr, flush=True)
        return status
