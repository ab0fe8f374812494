"""What torchmgmt is compared with: one adapter a file.

A bare script and two processes that talk over a socket (:mod:`benchmarks.peers.bare`), a bare loop over batches
(:mod:`benchmarks.peers.loop`), and TorchServe where it is installed (:mod:`benchmarks.peers.torchserve`). A peer that
cannot be run raises :class:`benchmarks.measure.Missing`, and the notes of the table say so: its absence is no result.
"""
