"""Runs `python -m qk_sniffer.plasticity`."""

import sys

from qk_sniffer.plasticity.cli import main

sys.exit(main())
