"""Measurements of mimic_core: `python -m benchmarks` (needs `pip install "mimic_core[bench]"`)."""

import os

# The profiler that counts memory writes its start and stop to stderr otherwise. Read when torch is first imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
