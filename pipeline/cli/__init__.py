"""The command line of `ddpm`."""
