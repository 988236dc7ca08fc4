"""In-context learning measured: what shift heads recover of it, beside other methods.

`python -m benchmarks.icl` runs everything and writes docs/results; `python -m benchmarks.icl.pretrain` trains the small
vision-language models again. A caller of mimic_core like any other.
"""
