"""The folder's own modules are found by name."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))  # for `from own_cluster import …`
