"""`python -m qk_sniffer`."""

import sys

from qk_sniffer.app import main

sys.exit(main())
