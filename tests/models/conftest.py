"""Let the tests of foreign models share their small configurations."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
