"""All that runs inside torchmgmt's own processes: the one that forks, and the workers that it forks.

Nothing here is imported by the embedding process, which starts it by its dotted name.
"""
