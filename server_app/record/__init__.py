"""The records of a run: the measures of each round, the judge, the run folder, and checkpoints."""
