"""Training for certificates: losses on what a certifier proves.

Imported on demand: `from jaxcert.training import losses`.
"""

from jaxcert.training import losses as losses
