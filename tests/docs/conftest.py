"""Let tests of the docs import their helper."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # for `page_blocks`
