"""Small blocks for maps z (N, 6, 12, 12) of a convolution, and whether explanations of a model with them are exact.

`EXACT` and `INEXACT` stand behind the first layer, `READS_EXACT` and `READS_INEXACT` before it, where z is the image.
"""

from .exact import EXACT
from .images import READS_EXACT, READS_INEXACT
from .inexact import INEXACT
from .spellings import SPELLINGS

__all__ = ["EXACT", "INEXACT", "READS_EXACT", "READS_INEXACT", "SPELLINGS"]
