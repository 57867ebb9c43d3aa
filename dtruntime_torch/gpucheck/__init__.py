"""Checks and measures on a GPU what the tests can only show on the CPU: `python -m dtruntime_torch.gpucheck`.

It builds nothing and needs nothing but torch. Everything it does goes through `device.Bench`, behind which the tests
put the CPU, so that each check and each measurement runs there too, on small sizes.
"""
