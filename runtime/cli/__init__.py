"""The command line covo-run, and what all command lines of the project share."""
