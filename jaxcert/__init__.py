"""Certified robustness of neural classifiers in JAX.

*Can any perturbation within this bound change the prediction?*, answered with a proof.
"""

from jaxcert import bounds as bounds
from jaxcert import evaluate as evaluate
from jaxcert import exact as exact
from jaxcert import lipschitz as lipschitz
from jaxcert import smoothing as smoothing
from jaxcert.certificate import ABSTAIN as ABSTAIN
from jaxcert.certificate import Certificate as Certificate
from jaxcert.certificate import Reason as Reason
from jaxcert.certificate import Status as Status
from jaxcert.certificate import Verdict as Verdict
from jaxcert.certificate import explain as explain
from jaxcert.errors import DataDependent as DataDependent
from jaxcert.errors import JaxcertError as JaxcertError
from jaxcert.errors import MixedRows as MixedRows
from jaxcert.errors import NotProved as NotProved
from jaxcert.errors import ProofRejected as ProofRejected
from jaxcert.errors import RecordMismatch as RecordMismatch
from jaxcert.errors import StatefulModel as StatefulModel
from jaxcert.errors import UnsupportedEquation as UnsupportedEquation
from jaxcert.errors import UnsupportedOperator as UnsupportedOperator
from jaxcert.errors import VnnlibError as VnnlibError
from jaxcert.sets import Box as Box
from jaxcert.sets import Grid as Grid
from jaxcert.sets import L1Ball as L1Ball
from jaxcert.sets import L2Ball as L2Ball
from jaxcert.sets import LinfBall as LinfBall
from jaxcert.sets import Polytope as Polytope
from jaxcert.specs import AllOf as AllOf
from jaxcert.specs import AnyOf as AnyOf
from jaxcert.specs import Spec as Spec
from jaxcert.specs import margins as margins

__version__ = "0.1.0"
