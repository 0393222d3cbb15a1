"""`vla2 bench`: how long each stage takes, and how far that is from what the machine can do."""
