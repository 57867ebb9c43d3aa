"""What a save is made of, from the plan to the publishing of its parts; `checkpoint/save.py` is the pipeline."""
