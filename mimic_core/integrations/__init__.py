"""What other libraries need to train shifts. Nothing here is imported by `mimic_core` itself."""
