"""Evaluation: metrics on masks, and the runs that produce them."""
