"""Behind `flatten` and `targets`: what torch's states consist of, leaf by leaf, and how each kind is filled."""
