"""`python -m dtruntime_torch.cli`, the same as `dtruntime`."""

from __future__ import annotations

from dtruntime_torch.cli import main

if __name__ == "__main__":
    main()
