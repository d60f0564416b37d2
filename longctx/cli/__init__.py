"""The `longctx` command, a file for each subcommand."""
