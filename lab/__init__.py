"""Exercises made of the project: lab/README.md."""
