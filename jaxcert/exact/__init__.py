"""Exact verification: complete search for a proof or a counterexample."""
