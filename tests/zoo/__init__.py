"""Tiny random models of every model type of transformers, and the conformance kit over all of them."""
