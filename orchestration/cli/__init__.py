"""The command `throughline`: one module per command, started without heavy imports."""
