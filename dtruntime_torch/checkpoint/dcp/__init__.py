"""The checkpoints of `torch.distributed.checkpoint` (DCP) in our files: what it writes through and reads through."""
