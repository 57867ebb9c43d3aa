"""What all tests share."""

from __future__ import annotations

from hypothesis import settings

# No deadline: how long an example takes depends on what else the machine does, and says nothing of the code.
settings.register_profile("dtruntime", deadline=None, print_blob=True)
settings.load_profile("dtruntime")
