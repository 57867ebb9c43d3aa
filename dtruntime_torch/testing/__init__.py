"""What tests of storage need: faults through the production seam, a power cut, and a suite for any backend.

Nothing here is imported by the package itself. `storage_conformance` needs pytest.
"""
