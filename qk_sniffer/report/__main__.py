"""Runs `python -m qk_sniffer.report`."""

import sys

from qk_sniffer.report.cli import main

sys.exit(main())
