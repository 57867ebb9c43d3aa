"""`python -m dtruntime_torch.gpucheck`."""

from __future__ import annotations

import sys

from dtruntime_torch.gpucheck.run import main

if __name__ == "__main__":
    sys.exit(main())
