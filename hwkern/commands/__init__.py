"""Subcommands of ``hwkern`` that work on a user's model; imported only when the command line runs."""
