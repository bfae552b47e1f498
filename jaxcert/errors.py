"""The exceptions of jaxcert, all children of `JaxcertError`.

    JaxcertError
    ├── UnsupportedEquation   an equation of the model has no rule in the method asked for
    │   ├── DataDependent     control flow, indices or integers that depend on the bounded input
    │   └── UnsupportedOperator  a file holds an operator or attribute that cannot be translated
    ├── MixedRows             an equation mixes the rows of a batch, so no row has its own bound
    ├── StatefulModel         the model's output depends on counters that each call moves on
    ├── RecordMismatch        a log on disk belongs to another run configuration
    ├── VnnlibError           a property file says what cannot be read, or nothing at all
    ├── NotProved             no proof was found that could be written to a file
    └── ProofRejected         a file is no proof of this property of this net

Wrong arguments are plain `ValueError` and `TypeError`.
"""


class JaxcertError(Exception):
    """Anything jaxcert refuses to do."""


class UnsupportedEquation(JaxcertError, NotImplementedError):
    """The model holds an equation for which the method has no rule, so nothing can be proved."""


class DataDependent(UnsupportedEquation):
    """Control flow, indices or integers of the model depend on the bounded input."""


class UnsupportedOperator(UnsupportedEquation):
    """A file holds an operator, or an attribute of one, that has no translation."""


class MixedRows(JaxcertError, ValueError):
    """An equation lets one example of the batch change the output of another."""


class StatefulModel(JaxcertError, ValueError):
    """Each call of the model is another function, e.g. one with active dropout."""


class RecordMismatch(JaxcertError, ValueError):
    """A log on disk was written by a run with another configuration."""


class VnnlibError(JaxcertError, ValueError):
    """A property file cannot be read; the message names file, line and column."""


class NotProved(JaxcertError, RuntimeError):
    """No proof was found; the message says whether there is none or time ran out."""


class ProofRejected(JaxcertError, ValueError):
    """A file is no proof of this property of this net; the message says why."""
