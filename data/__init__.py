"""Text becomes a data folder (the scripts here), and batches (store.py)."""
