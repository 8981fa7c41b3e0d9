"""What users call: PrecisionDebugger, seed_all, flush."""
