"""The audit of a workspace: `rayrec verify`."""
