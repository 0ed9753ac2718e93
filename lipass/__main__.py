"""Run the command where its script is not on the path: `python -m lipass`."""

from lipass.cli import main

raise SystemExit(main())
