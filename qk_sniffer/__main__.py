"""Runs `python -m qk_sniffer`."""

import sys

from qk_sniffer.cli.app import main

sys.exit(main())
