"""What dumps say: reads them, and never runs a model."""
