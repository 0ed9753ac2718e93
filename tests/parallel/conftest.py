import sys
from pathlib import Path

# For `checks` and `ulysses`, in the processes of the ranks too.
sys.path.insert(0, str(Path(__file__).parent))
