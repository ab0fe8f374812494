"""What torchmgmt is compared with: one adapter a file. So far a bare script (:mod:`benchmarks.peers.bare`)."""

NOT_MEASURED = ("TorchServe 0.12.0",)
"""Peers that have no adapter yet. Each report says so, so that nobody takes their absence for a result."""
