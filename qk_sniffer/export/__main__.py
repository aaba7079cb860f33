"""Runs `python -m qk_sniffer.export`."""

import sys

from qk_sniffer.export.cli import main

sys.exit(main())
