"""Files, checkpoints, processes, interruptions, and a record of the environment."""
