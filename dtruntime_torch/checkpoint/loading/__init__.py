"""What a load is made of, from what is needed to tensors that are filled; `checkpoint/restore.py` is the pipeline."""
