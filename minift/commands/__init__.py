"""The command line: flags, recipes, terminal output, and one module with a `main` for each `minift COMMAND`."""
