"""The workers' output: cut into lines by the launcher, shown by the driver."""
