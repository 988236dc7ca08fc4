"""Train shift heads on real weights: `python -m mimic_core.demo` (needs `pip install "mimic_core[demo]"`)."""
