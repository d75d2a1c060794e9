"""What the benches share. A bench is run by its path, and finds the repository (and its tests' jobs) through this."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("", "tests")]
