"""ColBench and the plumbing of the four scripts. The map is colbench/README.md."""
from colbench.run.variables import settle

settle()
