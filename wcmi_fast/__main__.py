"""`python -m wcmi_fast`: the command line; without a command, the diagnosis."""

from wcmi_fast.cli import main

main()
