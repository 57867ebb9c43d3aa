"""Tensors into the arena that is the image of the file, digested on the way."""
