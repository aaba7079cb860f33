"""Measures the seconds for the sample plan of one long example in a new process: python benchmarks/plan.py SAMPLER"""

import sys
import time

from qk_sniffer.capture.sampling import Sampler
from qk_sniffer.config import SamplerConfig
from qk_sniffer.store.layout import KINDS

LENGTH, LAYERS = 131_072, 36

sampler = Sampler(SamplerConfig(type=sys.argv[1], min_bucket_size=8192))
start = time.perf_counter()
sampler.plan([0], [LENGTH], [(layer, kind) for layer in range(LAYERS) for kind in KINDS])
print(time.perf_counter() - start)
