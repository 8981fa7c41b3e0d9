"""Frameworks that capture without an edit of theirs: one package each, loaded only where that framework asks for it."""
