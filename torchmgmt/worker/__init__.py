"""All that runs a model: in torchmgmt's own processes, the one that forks and the workers that it forks, or in threads.

Nothing here is imported by the embedding process, which starts it by its dotted name; where its workers are threads,
one of those does that.
"""
