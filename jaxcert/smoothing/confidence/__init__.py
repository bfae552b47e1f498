"""What votes prove about the probability of a class: binomial bounds, and tests that stop early.

`binomial` and `classes` run inside of jit, in float64. Tests that look while the votes come in are
planned on the host, and enter the jitted loop as tables of integers: `sequential`.
"""

from jaxcert.smoothing.confidence.betting import betting_lower as betting_lower
from jaxcert.smoothing.confidence.binomial import clopper_pearson as clopper_pearson
from jaxcert.smoothing.confidence.binomial import clopper_pearson_lower as clopper_pearson_lower
from jaxcert.smoothing.confidence.binomial import clopper_pearson_upper as clopper_pearson_upper
from jaxcert.smoothing.confidence.binomial import leader_is_certain as leader_is_certain
from jaxcert.smoothing.confidence.binomial import upper_tail as upper_tail
from jaxcert.smoothing.confidence.boundaries import NEVER as NEVER
from jaxcert.smoothing.confidence.boundaries import Boundaries as Boundaries
from jaxcert.smoothing.confidence.boundaries import Spending as Spending
from jaxcert.smoothing.confidence.classes import class_bounds as class_bounds
from jaxcert.smoothing.confidence.sequential import Betting as Betting
from jaxcert.smoothing.confidence.sequential import FixedSize as FixedSize
from jaxcert.smoothing.confidence.sequential import Hybrid as Hybrid
from jaxcert.smoothing.confidence.sequential import SequentialTest as SequentialTest
from jaxcert.smoothing.confidence.sequential import StagedClopperPearson as StagedClopperPearson
from jaxcert.smoothing.confidence.sequential import UnionBound as UnionBound
