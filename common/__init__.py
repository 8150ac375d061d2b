"""Plumbing that no lesson is in. Nothing here knows the model."""
