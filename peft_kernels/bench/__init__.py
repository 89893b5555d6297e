"""The command line: what is available here, a demonstration, and the measuring that the benchmarks share."""
