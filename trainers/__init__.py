"""Who learns: losses, training group, preference building, evaluation, and the driver loop."""
