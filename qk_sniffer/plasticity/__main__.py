"""`python -m qk_sniffer.plasticity`."""

import sys

from qk_sniffer.plasticity.app import main

sys.exit(main())
