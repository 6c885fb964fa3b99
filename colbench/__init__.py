"""ColBench and the plumbing of the four scripts, in rooms. colbench/README.md is the map; the scripts learn."""
from colbench.run.variables import settle

settle()
