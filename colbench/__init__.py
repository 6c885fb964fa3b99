"""ColBench: tasks, the turn protocol, simulated humans and the scorer. Learning is in the scripts."""
